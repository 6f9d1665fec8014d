"""Directories whose tensors are all there, with something before their names or missing there."""

import json

import pytest
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model

from laver_megatron.convert.hf_to_megatron import hf_to_megatron
from tests.conversions import assert_same_files, write_laver

WRAPPERS = ("_orig_mod.", "module.")


def save(directory, *, tied, kind=Qwen2ForCausalLM):
    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    kind(config).save_pretrained(directory)
    return directory


def rename(directory, new_name):
    for path in directory.glob("*.safetensors"):
        save_file({new_name(name): tensor for name, tensor in load_file(path).items()}, path)


def refusal(directory, tmp_path):
    with pytest.raises(ValueError) as raised:
        hf_to_megatron(directory, tmp_path / "refused")
    assert "download" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("prefix", WRAPPERS)
def test_the_error_says_how_to_rename(tmp_path, prefix, tied):
    source = save(tmp_path / "hf", tied=tied)
    hf_to_megatron(source, tmp_path / "meant")
    rename(source, lambda name: prefix + name)
    said = refusal(source, tmp_path)
    assert f"begin with '{prefix}' (" in said
    assert f"rename each such tensor to name.removeprefix('{prefix}')," in said and "besides" not in said
    rename(source, lambda name: name.removeprefix(prefix))
    hf_to_megatron(source, tmp_path / "found")
    assert_same_files(tmp_path / "meant", tmp_path / "found")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_model_saved_without_its_head(tmp_path, tied):
    """transformers' Qwen2Model calls its tensors otherwise than Qwen2ForCausalLM."""
    source = save(tmp_path / "hf", tied=tied, kind=Qwen2Model)
    said = refusal(source, tmp_path)
    assert "lack 'model.' at their beginning: rename each such tensor to 'model.' + name," in said
    assert ("besides, 1 are missing, such as lm_head.weight" in said) == (not tied)
    rename(source, lambda name: f"model.{name}")
    if tied:
        hf_to_megatron(source, tmp_path / "found")


def test_a_head_beside_names_without_their_beginning(tmp_path):
    """It has no embedding to be compared with, which is not what is wrong."""
    source = save(tmp_path / "hf", tied=True)

    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors")
    rename(source, lambda name: name.removeprefix("model."))
    assert "rename each such tensor to 'model.' + name," in refusal(source, tmp_path)


@pytest.mark.parametrize("prefix", WRAPPERS)
def test_an_export(tmp_path, demo_dir, prefix):
    source = write_laver(tmp_path / "hf", demo_dir, training_state=False)
    rename(source, lambda name: prefix + name)
    assert f"rename each such tensor to name.removeprefix('{prefix}')," in refusal(source, tmp_path)


def test_several_files_and_their_index(tmp_path):
    source = save(tmp_path / "hf", tied=False)
    Qwen2ForCausalLM.from_pretrained(source).save_pretrained(source, max_shard_size="20KB")
    (source / "model.safetensors").unlink()
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {f"_orig_mod.{name}": file for name, file in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    rename(source, lambda name: f"_orig_mod.{name}")
    assert "in the files (load_file and save_file of safetensors.torch) and in their index" in refusal(source, tmp_path)
