"""A value that differs in one place is found, wherever it came from and whatever the type it was stored in."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from laver_megatron.convert.hf_to_megatron import hf_to_megatron
from laver_megatron.stages.weight_changes import ModuleChange, changes_of_modules
from tests.distributed.build import make_assets


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return make_assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture(scope="module")
def converted(assets, tmp_path_factory):
    """The decoder as a checkpoint: untied, so with an LM head of its own."""
    return hf_to_megatron_at(assets.untied, tmp_path_factory.mktemp("converted") / "it")


def hf_to_megatron_at(source, target):
    hf_to_megatron(source, target)
    return target


@pytest.fixture
def edited(assets, tmp_path):
    """A copy of the model's directory with one value of one tensor changed, by its name."""

    def edit(name):
        directory = tmp_path / name
        directory.mkdir()
        for file in assets.untied.iterdir():
            (directory / file.name).write_bytes(file.read_bytes())
        tensors = load_file(directory / "model.safetensors")
        tensors[name].view(-1)[-1] += 1e-3
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return directory

    return edit


NUM_TENSORS = 4 * 7 + 3  # layers; embedding, final norm and LM head


def test_nothing_has_changed(assets, converted):
    same = {"decoder": ModuleChange(NUM_TENSORS, 0, 0)}
    assert changes_of_modules(f"hf:{assets.untied}", None, converted) == same
    assert changes_of_modules(str(converted), None, converted) == same


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.3.self_attn.k_proj.bias", "model.norm.weight", "lm_head.weight"]
)
def test_one_value_has_changed(converted, edited, tmp_path, name):
    directory = edited(name)
    found = {"decoder": ModuleChange(NUM_TENSORS, 1, 0)}
    assert changes_of_modules(f"hf:{directory}", None, converted) == found
    again = hf_to_megatron_at(directory, tmp_path / "again")
    assert changes_of_modules(str(again), None, converted) == found


def test_another_type_is_no_change(assets, tmp_path):
    """What a bf16 run takes up from fp32 files is their rounding."""
    directory = tmp_path / "bf16"
    directory.mkdir()
    for file in assets.untied.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(directory / "model.safetensors").items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    checkpoint = hf_to_megatron_at(directory, tmp_path / "checkpoint")
    assert changes_of_modules(f"hf:{assets.untied}", None, checkpoint) == {"decoder": ModuleChange(NUM_TENSORS, 0, 0)}


def test_what_was_there_before_is_gone(converted, tmp_path):
    with pytest.raises(ValueError, match=f"^{tmp_path}/gone: no checkpoint in it any more"):
        changes_of_modules(str(tmp_path / "gone"), None, converted)
