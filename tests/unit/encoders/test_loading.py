"""Where the weights lie in a directory: one file or several, alone or among a larger model's."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from laver_megatron.encoders import build_encoder, open_preprocessor
from tests.encoders import altered, features, pictures

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
    assert torch.equal(features(split(kind, prefix), pictures()), features(encoders[kind], pictures()))


def test_older_names_are_brought_up_to_date(encoders):
    """Published DINOv2 names its queries otherwise than transformers' module does, and so do files it writes."""
    names = load_file(encoders["dinov2"] / "model.safetensors")
    encoder = build_encoder(encoders["dinov2"], None, torch.float32, load_weights=True)
    query = encoder.model.encoder.layer[1].attention.q_proj.weight
    assert torch.equal(names["encoder.layer.1.attention.attention.query.weight"], query)


def test_an_index_that_is_none(split):
    directory = split("clip", "")
    (directory / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="the encoder of .* cannot be read"):
        build_encoder(directory, None, torch.float32, load_weights=True)
    assert open_preprocessor(directory).most_tokens == 64
