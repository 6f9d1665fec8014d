"""What an ablation starts from: captions that are true, an encoder that learns from them, parts a trainer can read."""

import json

import pytest
import torch
from transformers import AutoTokenizer, SiglipVisionConfig, SiglipVisionModel

from laver_megatron.demo.ablation import make_parts
from laver_megatron.demo.ablation_command import main
from laver_megatron.demo.contrastive import PairLoss, train_encoder
from laver_megatron.demo.scenes import captions_of, description_of, make_descriptions, make_scenes
from laver_megatron.encoders import build_encoder, open_preprocessor
from laver_megatron.tasks.drawing import Mark

SHAPES = (
    Mark("circle", "red", 2, 3, 10, 10),
    Mark("cross", "blue", 50, 48, 10, 10),
    Mark("circle", "red", 25, 2, 12, 12),
)
TEXT = (Mark("text", "white", 32, 30, 0, 20, "AB7"),)
BARS = (Mark("line", "line", 0, 62, 64, 1), Mark("bar", "red", 4, 32, 8, 30), Mark("bar", "green", 24, 12, 8, 50))


def test_captions_say_what_was_drawn():
    found = captions_of(SHAPES, 64)
    assert {"red circle", "red circle top left", "cross bottom right", "blue bottom right"} <= found
    assert {"count 2 red circle", "count 3 shapes", "count 1 cross"} <= found
    assert not {"blue circle", "cross top left", "count 1 circle"} & found
    assert {"text AB7", "sign 2 B", "last 0 7", "A before B", "white text"} <= captions_of(TEXT, 64)
    assert {"tallest bar green", "shortest bar red", "bar 1 red", "red height 30"} <= captions_of(BARS, 64)


def test_descriptions_name_every_mark():
    assert description_of(SHAPES, 64) == "top left red circle, top centre red circle, bottom right blue cross"
    assert description_of(TEXT, 64) == "text AB7"
    assert description_of(BARS, 64) == "red 3, green 5"
    (example, *_) = make_descriptions(3, 64)
    assert example.images[0].size == (64, 64) and example.conversation[0]["value"] == "<image>\nDescribe."


def test_pair_loss_is_a_sigmoid_over_all_pairs():
    torch.manual_seed(0)
    loss = PairLoss(16)
    features_BPE, captions_CE = torch.randn(2, 5, 16), torch.nn.functional.normalize(torch.randn(3, 64), dim=-1)
    is_true_BC = torch.tensor([[True, False, True], [False, True, False]])
    true, false = [], []
    for b in range(2):
        for c in range(3):
            cosines = [
                torch.cosine_similarity(loss.project(features_BPE[b, p]), captions_CE[c], dim=0) for p in range(5)
            ]
            score = torch.stack(cosines).mul(loss.log_scale.exp()).exp().sum().log() + loss.bias
            (true if is_true_BC[b, c] else false).append(
                -torch.nn.functional.logsigmoid(score if is_true_BC[b, c] else -score)
            )
    expected = torch.stack(true).mean() + torch.stack(false).mean()
    torch.testing.assert_close(loss(features_BPE, captions_CE, is_true_BC), expected)


def test_an_encoder_learns_from_captions():
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=16
    )
    model = SiglipVisionModel(config)
    losses = [loss for _, loss in train_encoder(model, make_scenes(64, 64), num_steps=30, batch_size=16)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_parts(tmp_path):
    sizes = {"hidden_size": 16, "num_layers": 1, "encoder_width": 16, "encoder_layers": 1}
    make_parts(tmp_path, **sizes, encoder_steps=2, num_pictures=64, num_captions=9)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "What?"}], tokenize=False)
    assert asked.startswith("<|im_start|>system\nAnswer.<|im_end|>")
    assert tokenizer.tokenize("KQ") == ["K", "Q"]
    probes = json.loads((tmp_path / "encoder" / "probes.json").read_text())
    assert probes.keys() == {"cell", "colour", "shape"} and probes["colour"]["accuracy"] > probes["colour"]["chance"]
    assert build_encoder(tmp_path / "encoder", -1, torch.float32, load_weights=True) is not None
    assert open_preprocessor(tmp_path / "encoder") is not None
    before = (tmp_path / "encoder" / "model.safetensors").read_bytes()
    make_parts(tmp_path, **sizes, encoder_steps=2, num_pictures=64, num_captions=9)
    with pytest.raises(ValueError, match=r"encoder is there, and was made with --encoder-steps 2, not 3; name another"):
        make_parts(tmp_path, **sizes, encoder_steps=3, num_pictures=64, num_captions=9)
    (tmp_path / "encoder.json").unlink()  # as an earlier version left it
    make_parts(tmp_path, **sizes, encoder_steps=3, num_pictures=64, num_captions=9)
    assert (tmp_path / "encoder" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--encoder-width", "20"], "a multiple of 16"),
        (["--hidden-size", "-64"], "a multiple of 16"),
        (["--num-layers", "0"], "at least one layer"),
        (["--num-captions", "0"], "--num-captions 0 must be a positive number"),
    ],
)
def test_wrong_sizes_are_refused_before_anything_is_made(tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as ended:
        main(["--dir", str(tmp_path / "parts"), *words])
    assert ended.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "parts").exists()
