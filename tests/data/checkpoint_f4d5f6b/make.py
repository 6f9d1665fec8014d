"""Makes this directory with the code of commit f4d5f6b: `PYTHONPATH=<that tree> python make.py DIR`.

A Qwen2.5 and a SigLIP of some thousand weights with LaVer on are trained for four steps in one process. Kept are the
checkpoint after two steps, the shard, the records of steps 3 and 4, and the hashes of the exports of that checkpoint.
"""

import hashlib
import io
import json
import os
import re
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from laver_megatron.convert.megatron_to_hf import megatron_to_hf
from laver_megatron.demo import make_demo
from laver_megatron.train import main

NUM_MERGES = 24
VOCABULARY = 304
IMAGE_SIZE = 32
RUN = """\
load: hf:model
encoder: encoder
data_path: shards/train-*.tar
run_dir: run
seq_length: 192
visual_seq_length: 32
micro_batch_size: 1
global_batch_size: 2
train_iters: 4
save_interval: 2
lr: 1e-2
adam_eps: 1e-3
student_temperature: 0.2
teacher_temperature: 0.2
mask_ratio: 0.4
mask_sampling: fixed
ema_momentum: 0.9
centre_momentum: 0.9
vision_head_hidden_size: 16
num_workers: 0
seed: 3
"""


def make_model(demo: Path) -> None:
    """model/: the tokenizer of the demo with its first merges only; random weights, norms and biases among them."""
    Path("model").mkdir()
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        shutil.copyfile(demo / "model" / name, f"model/{name}")
    tokenizer = json.loads((demo / "model/tokenizer.json").read_text())
    merges = tokenizer["model"]["merges"][:NUM_MERGES]
    words = [word for word, number in tokenizer["model"]["vocab"].items() if number < 256]
    words += ["".join(pair) for pair in merges]
    tokenizer["model"]["merges"] = merges
    tokenizer["model"]["vocab"] = {word: number for number, word in enumerate(words)}
    for number, token in enumerate(tokenizer["added_tokens"], start=len(words)):
        token["id"] = number
    Path("model/tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    config = json.loads((demo / "model/config.json").read_text())
    config.update(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, max_window_layers=2, vocab_size=VOCABULARY,
        bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"],
    )  # fmt: skip
    torch.manual_seed(1)
    with_norms_and_biases(Qwen2ForCausalLM(Qwen2Config(**config))).save_pretrained("model")
    Path("model/config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": [ids["<|im_end|>"]], "do_sample": False}
    Path("model/generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def make_encoder(demo: Path) -> None:
    torch.manual_seed(2)
    config = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=IMAGE_SIZE,
        patch_size=8,
    )  # fmt: skip
    with_norms_and_biases(SiglipVisionModel(config)).save_pretrained("encoder")
    preprocessor = json.loads((demo / "encoder/preprocessor_config.json").read_text())
    preprocessor["size"] = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    Path("encoder/preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")


@torch.no_grad()
def with_norms_and_biases(model: torch.nn.Module) -> torch.nn.Module:
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.normal_(float("norm" in name and name.endswith("weight")), 0.1)
    return model


def make_shard() -> None:
    """Eight samples with one or two pictures of waves, in tar files as WebDataset has them."""
    Path("shards").mkdir()
    rows, columns = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE]
    with tarfile.open("shards/train-00000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(8):
            waves = [np.sin(rows * (number + 1) / 9 + c) * np.cos(columns * (c + 1) / 7) for c in range(3)]
            picture = io.BytesIO()
            Image.fromarray((127 + 120 * np.stack(waves, -1)).astype("uint8")).save(picture, "PNG")
            question = {"from": "human", "value": f"<image>\nWhich wave is it, the {number}th or the next?"}
            answer = {"from": "gpt", "value": f"It is wave {number}, of length {56 // (number + 1)}."}
            text = json.dumps({"conversations": [question, answer]}).encode()
            for extension, content in (("json", text), ("png", picture.getvalue())):
                entry = tarfile.TarInfo(f"{number:04d}.{extension}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def export(name: str, **options: object) -> dict[str, str]:
    """sha256 of every file of an export; of code without lines of comment, which name files that may move."""
    target = Path("exports") / name
    megatron_to_hf(Path("run/checkpoints/iter_0000002"), target, **options)
    hashes = {}
    for path in sorted(path for path in target.rglob("*") if path.is_file()):
        content = path.read_bytes()
        if path.suffix == ".py":
            content = re.sub(rb"(?m)^ *#.*\n", b"", content)
        hashes[str(path.relative_to(target))] = hashlib.sha256(content).hexdigest()
    return hashes


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    made = make_demo(Path("demo"), num_train_samples=8, num_valid_samples=1)
    make_model(made)
    make_encoder(made)
    make_shard()
    Path("config.yaml").write_text(RUN)
    main(["--config", "config.yaml"])
    Path("exports").mkdir()
    hashes = {
        "student": export("student", training_state=True),
        "teacher": export("teacher", weights="teacher"),
    }
    Path("exports.json").write_text(json.dumps(hashes, indent=1) + "\n")
    lines = Path("run/metrics.jsonl").read_text().splitlines()
    Path("metrics.jsonl").write_text("\n".join(lines[2:]) + "\n")
    Path("run/metrics.jsonl").write_text("\n".join(lines[:2]) + "\n")
    Path("run/checkpoints/latest").write_text("2")
    shutil.rmtree("run/checkpoints/iter_0000004")
    with tarfile.open("run.tar.xz", "w:xz") as archive:
        for path in ("config.yaml", "shards", "run/metrics.jsonl", "run/checkpoints"):
            archive.add(path)
