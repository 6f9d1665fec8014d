"""What is drawn of a pack, and what is said of it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from laver_megatron.config.command_line import load_config
from laver_megatron.data.batch.data_spec import DataSpec
from laver_megatron.data.batch.pack_reader import open_reader
from laver_megatron.objective.language import IGNORE_LABEL
from laver_megatron.shards import MakeSettings, make_shards
from laver_megatron.shards.show import (
    ANSWER,
    IMAGE,
    MASKED,
    OTHER_IMAGE,
    PADDING,
    TEXT,
    ShownPack,
    describe,
    draw,
    show_packs,
    token_kinds,
)
from tests.content import picture_bytes
from tests.packs import pack, padding
from tests.programs import run_here

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def config(demo_dir):
    arguments = ["--config", str(ROOT / "examples/demo.yaml"), "--data-path", str(demo_dir / "shards/train-*.tar")]
    return load_config([*arguments, "--num-workers", "0", "--mask-ratio-schedule", "cosine"])


@pytest.fixture(scope="module")
def reader(config, tokenizer, preprocessor):
    return open_reader(DataSpec.of(config, config.data.data_path), tokenizer, preprocessor)


def test_kinds_of_tokens():
    shown_pack = pack([3, (1, 2), (1, 2), 2], padding(2), image_size=16)
    shown_pack.labels_BS[:] = IGNORE_LABEL
    shown_pack.labels_BS[0, 6] = 5  # the token after it is to be predicted
    masked_BS = torch.zeros_like(shown_pack.image_BS, dtype=torch.bool)
    masked_BS[0, 4] = True
    shown = ShownPack(shown_pack, masked_BS, 3, 0.25, 8, "mixed")
    kinds = [TEXT] * 3 + [IMAGE, MASKED] + [OTHER_IMAGE] * 2 + [ANSWER, TEXT] + [PADDING] * 2
    assert token_kinds(shown).tolist() == kinds
    for words in ("pack 3: 1 samples, 2 images", "9 of 11 tokens", "4 of 8 visual slots", "1 to predict", "1 masked"):
        assert words in shown.headline()


def test_words(config, reader, tokenizer):
    (shown,) = show_packs(config, reader, [0])
    text = describe(shown, tokenizer)
    assert all(f"--- {key}: " in text for key in shown.pack.keys[0])
    trained = [part.split("]]")[0] for part in text.split("[[")[1:]]
    labels = shown.pack.labels_BS[shown.pack.labels_BS != IGNORE_LABEL]
    assert "".join(trained) == tokenizer.decode(labels)
    assert text.count("<8 x 8 visual tokens>") == len(shown.pack.pixels[0])


def test_what_is_learnt_of_records_of_every_kind(config, tokenizer, preprocessor, tmp_path):
    """From records as they are published to what a person sees: what is trained, and what is only read."""
    (tmp_path / "a.jpg").write_bytes(picture_bytes())
    turns = [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "See ![fig](<image>)."}]
    marked = [
        {"role": "user", "content": "A"}, {"role": "assistant", "content": "WRONG", "loss": False},
        {"role": "user", "content": "C"}, {"role": "assistant", "content": "D"},
    ]  # fmt: skip
    records = [
        {"id": "c", "system": "Be terse.", "conversations": turns},
        {"id": "d", "messages": marked},
        {"id": "f", "image": "a.jpg", "conversations": turns},
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    make_shards(MakeSettings([tmp_path / "data.json"], tmp_path / "shards", images=tmp_path))
    reader = open_reader(DataSpec.of(config, [tmp_path / "shards"]), tokenizer, preprocessor)
    (shown,) = show_packs(config, reader, [0])
    samples = {part.split(":")[0]: part for part in describe(shown, tokenizer).split("--- ")[1:]}
    terse, untrained, placed = (samples[f"{number:09d}"] for number in range(3))
    assert "system\nBe terse.<|im_end|>" in terse and "[[See ![fig](<image>).<|im_end|>]]" in terse
    assert ", 0 images" in terse and "visual tokens" not in terse
    assert "WRONG<|im_end|>" in untrained and "[[WRONG" not in untrained and "[[D<|im_end|>]]" in untrained
    assert placed.index("<8 x 8 visual tokens>") < placed.index("Q?") and ", 1 images" in placed
    assert "[[See ![fig](<image>).<|im_end|>]]" in placed
    for text, answer in ((untrained, "D"), (placed, "See ![fig](<image>).")):
        assert f" {len(tokenizer(answer)['input_ids']) + 1} trained, " in text


def test_masks_are_those_of_the_step(config, reader):
    """By default the step that trains on the pack; the ratio rises from 0."""
    number = config.data.global_batch_size * 20
    by_default, at_20, at_90 = (next(show_packs(config, reader, [number], step)) for step in (None, 20, 90))
    assert torch.equal(by_default.masked_BS, at_20.masked_BS)
    assert 0 < at_20.mask_ratio < at_90.mask_ratio
    assert at_20.masked_BS.sum() < at_90.masked_BS.sum()


def test_picture(config, reader, tmp_path):
    """Masked patches are red in it."""
    step = config.training.train_iters - 1
    shown = next(pack for pack in show_packs(config, reader, range(10), step) if len(pack.pack.pixels[0]) > 0)
    draw(shown, reader.maker.preprocessor, tmp_path / "masked.png")
    plain = ShownPack(shown.pack, torch.zeros_like(shown.masked_BS), shown.number, 0.0, 128, "causal")
    draw(plain, reader.maker.preprocessor, tmp_path / "plain.png")
    masked, plain = (np.asarray(Image.open(tmp_path / name).convert("RGB")) for name in ("masked.png", "plain.png"))
    assert masked.shape == plain.shape and masked.shape[1] == 1300
    red = [((p[..., 0] > 160) & (p[..., 1] < 90) & (p[..., 2] < 90)).sum() for p in (masked, plain)]
    assert red[0] > 2 * red[1]


@pytest.mark.processes
@pytest.mark.parametrize(
    "options, code, words",
    [
        (["--packs", "1", "2"], 0, ["pack 1: ", "pack 2: ", "[[", "pack-2.png"]),
        (["--packs", "99999"], 2, ["error: pack 99999 is far beyond the data"]),
        (["--packs", "-1"], 2, ["error: ", "packs from 0 on"]),
        (["--data-path", "nowhere"], 2, ["error: ", "nowhere does not exist"]),
    ],
)
def test_the_tool(demo_dir, tmp_path, options, code, words):
    parts = {"--load": f"hf:{demo_dir / 'model'}", "--encoder": demo_dir / "encoder", "--num-workers": 0}
    parts["--data-path"] = demo_dir / "shards/valid-00000.tar"
    command = [ROOT / "tools/show_sample.py", "--config", ROOT / "examples/demo.yaml"]
    command += [word for pair in parts.items() for word in pair if pair[0] not in options]
    command += [*options, "--output", tmp_path / "shown", "--run-dir", tmp_path / "run"]
    if code == 0:
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            capture_output=True,
            text=True,
            env={"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path)},
        )
    else:
        done = run_here(*command)
    assert done.returncode == code, done.stderr
    assert all(word in done.stdout + done.stderr for word in words), done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
