"""Encoders whose tensors are all there, with something before their names."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from laver_megatron.encoders import build_encoder, check_encoder
from tests.encoders import altered

KINDS = ("siglip", "clip", "dinov2", "dinov2_with_registers", "aimv2", "qwen2_5_vl")


def rename(directory, new_name):
    tensors = load_file(directory / "model.safetensors")
    save_file({new_name(name): tensor for name, tensor in tensors.items()}, directory / "model.safetensors")


def refusals(directory):
    """What checking the headers and loading the weights say."""
    with pytest.raises(ValueError) as checking:
        check_encoder(directory, with_weights=True)
    with pytest.raises(ValueError) as loading:
        build_encoder(directory, None, torch.float32, load_weights=True)
    return [str(checking.value), str(loading.value)]


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_says_how_to_rename(encoders, tmp_path, kind, prefix):
    directory = altered(encoders[kind], tmp_path / "wrapped", "config.json")
    rename(directory, lambda name: prefix + name)
    for refusal in refusals(directory):
        assert f"begin with '{prefix}' (" in refusal and "download" not in refusal
        assert f"rename each such tensor to name.removeprefix('{prefix}')," in refusal
    rename(directory, lambda name: name.removeprefix(prefix))
    check_encoder(directory, with_weights=True)
    loaded = build_encoder(directory, None, torch.float32, load_weights=True)
    original = build_encoder(encoders[kind], None, torch.float32, load_weights=True)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), original.parameters(), strict=True))


def test_a_wrapped_larger_model(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 24, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=sizes, vision_config=vision)).save_pretrained(tmp_path)
    rename(tmp_path, lambda name: f"module.{name}")
    for refusal in refusals(tmp_path):
        assert "rename each such tensor to name.removeprefix('module.')," in refusal
    rename(tmp_path, lambda name: name.removeprefix("module."))
    build_encoder(tmp_path, None, torch.float32, load_weights=True)


def test_another_model_is_no_matter_of_names(encoders, tmp_path):
    directory = altered(encoders["siglip"], tmp_path / "deeper", "config.json")
    content = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**content, "num_hidden_layers": 9}))
    assert all("download or copy it again" in refusal and "rename" not in refusal for refusal in refusals(directory))
