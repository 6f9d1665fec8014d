"""Where the weights lie in a directory: one file or several, alone or among a larger model's."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from laver_megatron.encoders import build_encoder, check_encoder, open_preprocessor
from tests.encoders import altered, assert_same_encoder

KINDS = ("siglip", "clip", "dinov2", "aimv2", "qwen2_5_vl")


@pytest.fixture
def split(encoders, tmp_path):
    """split(kind, prefix) -> a copy with its weights in two files, names prefixed, beside another model's."""

    def split_(kind, prefix):
        directory = altered(encoders[kind], tmp_path / kind, "preprocessor_config.json")
        tensors = {prefix + name: tensor for name, tensor in load_file(directory / "model.safetensors").items()}
        tensors |= {"text_model.embedding": torch.full((3,), float("nan"))} if prefix else {}
        (directory / "model.safetensors").unlink()
        names = sorted(tensors)
        parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
        for file, of_file in parts.items():
            save_file({name: tensors[name] for name in of_file}, directory / file)
        file_of = {name: file for file, of_file in parts.items() for name in of_file}
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": file_of}))
        return directory

    return split_


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_several_files_and_other_models_tensors(encoders, split, kind, prefix):
    """What is not the vision model's is never looked at."""
    assert_same_encoder(split(kind, prefix), encoders[kind])


def test_weights_have_memory_of_their_own(encoders):
    """Not the file's pages: kernels differ in the last bit with the place of a tensor in its file, and a run that is
    resumed has its encoder from another one."""
    weights = list(build_encoder(encoders["siglip"], None, torch.float32, load_weights=True).parameters())
    assert weights and all(weight.untyped_storage().nbytes() == weight.nbytes for weight in weights)


def test_older_names_are_brought_up_to_date(encoders):
    """Published DINOv2 names its queries otherwise than transformers' module does, and so do files it writes."""
    names = load_file(encoders["dinov2"] / "model.safetensors")
    encoder = build_encoder(encoders["dinov2"], None, torch.float32, load_weights=True)
    query = encoder.model.encoder.layer[1].attention.q_proj.weight
    assert torch.equal(names["encoder.layer.1.attention.attention.query.weight"], query)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_headers_know_the_names_that_loading_knows(split, kind, prefix):
    check_encoder(split(kind, prefix), with_weights=True)


def test_registers_that_config_json_does_not_know(encoders, tmp_path):
    directory = encoders["dinov2_with_registers"]
    check_encoder(directory, with_weights=True)
    without = altered(directory, tmp_path / "without", "config.json", model_type="dinov2")
    fewer = altered(directory, tmp_path / "fewer", "config.json", num_register_tokens=2)
    for other, problem in ((without, "is larger than its config.json says, by 1"), (fewer, "in another size .* 1")):
        check_encoder(other, with_weights=False)
        with pytest.raises(ValueError, match=f"{problem} tensors, such as .*register_tokens"):
            check_encoder(other, with_weights=True)
        with pytest.raises(ValueError, match=f"{problem} tensors, such as .*register_tokens"):
            build_encoder(other, None, torch.float32, load_weights=True)


def test_an_index_that_is_none(split):
    directory = split("clip", "")
    (directory / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="the encoder of .* cannot be read"):
        build_encoder(directory, None, torch.float32, load_weights=True)
    assert open_preprocessor(directory).most_tokens == 64
