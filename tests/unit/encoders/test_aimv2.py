"""AIMv2 of native and of fixed resolution."""

import json

import pytest
import torch
from PIL import Image
from transformers import Aimv2VisionModel, AutoImageProcessor

from laver_megatron.config.fields import ConfigError
from laver_megatron.encoders import build_encoder, open_preprocessor, read_encoder
from tests.encoders import altered, assert_same_features, features, hidden_states, pictures


def own_features(directory, layer, size_of=None):
    """size_of: (height, width) in pixels to which transformers' processor is told to resize an image."""
    model = Aimv2VisionModel.from_pretrained(directory).eval()
    processor = AutoImageProcessor.from_pretrained(directory, backend="pil")
    found = []
    for image in pictures():
        told = {}
        if size_of is not None:
            height, width = size_of(*image.size)
            told = {"size": {"height": height, "width": width}, "do_center_crop": False}
        found.append(hidden_states(model, processor(images=image, return_tensors="pt", **told))[layer][0])
    return found


@pytest.mark.parametrize("layer", [None, -4, -2, -1, 0, 3])
def test_native_features_are_those_of_transformers(encoders, layer):
    directory = encoders["aimv2"]
    expected = own_features(directory, -1 if layer is None else layer, open_preprocessor(directory).size)
    assert len({len(of_image) for of_image in expected}) > 3
    assert_same_features(features(directory, pictures(), layer), expected)


@pytest.mark.parametrize("layer", [None, -2])
def test_fixed_features_are_those_of_transformers(encoders, layer):
    expected = own_features(encoders["aimv2_fixed"], -1 if layer is None else layer)
    assert {len(of_image) for of_image in expected} == {64}
    assert_same_features(features(encoders["aimv2_fixed"], pictures(), layer), expected)


@pytest.mark.parametrize("cap", [1, 7, 2000])
def test_the_cap(encoders, cap):
    preprocessor = open_preprocessor(encoders["aimv2"], cap)
    image = Image.new("RGB", (1000, 700))
    rows, columns = preprocessor.grid(*image.size)
    assert preprocessor(image).shape == (3, 8 * rows, 8 * columns)
    assert cap * 0.5 < rows * columns <= cap == preprocessor.most_tokens
    assert open_preprocessor(encoders["aimv2"]).most_tokens == 64  # what its own file says


def test_without_a_limit_of_its_own(encoders, tmp_path):
    directory = altered(encoders["aimv2"], tmp_path / "unlimited", "preprocessor_config.json", max_pixels=None)
    assert open_preprocessor(directory).most_tokens == 2048


def test_pixels_that_do_not_divide(encoders):
    encoder = build_encoder(encoders["aimv2"], None, torch.float32, load_weights=True)
    with pytest.raises(ValueError, match="image 1 has 16 x 20 pixels, which visual tokens of 8 x 8 pixels do not"):
        encoder([torch.zeros(3, 16, 16), torch.zeros(3, 16, 20)])


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({}, "neither is_native nor image_size in it"),
        ({"image_size": 224, "use_bias": False}, "use_bias in it"),
        ({"image_size": 224, "auto_map": {"AutoModel": "modeling_aimv2.AIMv2Model"}}, "auto_map in it"),
    ],
)
def test_apples_own_format(tmp_path, content, why):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "aimv2", "hidden_size": 1024, **content}))
    with pytest.raises(ConfigError, match=rf"Apple's own format \({why}\).* transformers' own format"):
        read_encoder(tmp_path)


def test_sizes(encoders):
    native, fixed = read_encoder(encoders["aimv2"]), read_encoder(encoders["aimv2_fixed"])
    assert native.is_native and native.num_tokens is None
    assert not fixed.is_native and fixed.num_tokens == 64
    assert native.num_mlp_matrices == fixed.num_mlp_matrices == 3
