"""The table of families, and what all encoders have in common."""

import json
import pickle

import pytest
import torch
from transformers import AutoConfig

from laver_megatron.config.fields import ConfigError
from laver_megatron.demo.encoders import KINDS, save_encoder
from laver_megatron.encoders import (
    FAMILIES,
    build_encoder,
    encoder_settings,
    encoder_tensor_sizes,
    open_preprocessor,
    read_encoder,
)
from tests.encoders import altered, picture


def test_every_type_has_one_family():
    types = [model_type for family in FAMILIES for model_type in family.model_types]
    assert len(types) == len(set(types)) and len(FAMILIES) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_shape_and_model_agree(encoders, kind):
    shape, sizes = read_encoder(encoders[kind]), encoder_tensor_sizes(encoders[kind])
    encoder = build_encoder(encoders[kind], None, torch.float32, load_weights=True)
    assert sizes == {
        name.removeprefix("model."): tuple(parameter.shape) for name, parameter in encoder.named_parameters()
    }
    pixels = open_preprocessor(encoders[kind])(picture(80, 64))
    assert encoder([pixels]).shape[1] == encoder.feature_size == shape.feature_size
    assert bool(sizes) == shape.has_weights


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_as_use(encoders, tmp_path, kind):
    """Dropout of the encoder's own would depend on who computes which image."""
    dropout = {"attention_dropout": 0.5, "attention_probs_dropout_prob": 0.5, "hidden_dropout_prob": 0.5}
    directory = altered(encoders[kind], tmp_path / "dropping", "config.json", **dropout)
    encoder = build_encoder(directory, None, torch.float32, load_weights=True).train()
    pixels = open_preprocessor(directory)(picture(80, 64))
    assert torch.equal(encoder([pixels]), encoder([pixels]))
    assert not any(module.training for module in encoder.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_preprocessors_travel_to_other_processes(encoders, kind):
    preprocessor = open_preprocessor(encoders[kind])
    other = pickle.loads(pickle.dumps(preprocessor))
    assert torch.equal(other(picture(70, 50)), preprocessor(picture(70, 50)))
    assert other.settings == preprocessor.settings


def test_settings_name_all_that_counts_depend_on(encoders):
    caps = (None, 10, 64, 100)
    settings = [open_preprocessor(encoders["qwen2_5_vl"], cap).settings for cap in caps]
    assert len(set(settings)) == 3 and settings[0] == settings[2]  # 64 is what its file says


@pytest.mark.parametrize("content", [{"model_type": "vit"}, {"model_type": ["clip"]}, {}])
def test_encoders_of_no_family(encoders, tmp_path, content):
    directory = altered(encoders["clip"], tmp_path / "other", "config.json")
    (directory / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="the encoder must be one of siglip, .*clip, .*dinov2, .*laver_patches"):
        read_encoder(directory)


def test_settings_that_transformers_refuses(encoders, tmp_path):
    directory = altered(encoders["clip"], tmp_path / "odd", "config.json", hidden_act="none")
    with pytest.raises(ValueError, match="transformers builds no image encoder from it"):
        encoder_tensor_sizes(directory)


# Of published files (google/siglip2-base-patch16-224 and others) the whole vision part.
SILENT = {
    "siglip": {"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model"}},
    "siglip_384": {"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model", "image_size": 384}},
    "clip": {"model_type": "clip", "vision_config": {"patch_size": 16}},
    "dinov2": {"model_type": "dinov2", "image_size": 518},
    "dinov2_with_registers": {"model_type": "dinov2_with_registers", "patch_size": 14},
    "aimv2": {"model_type": "aimv2", "vision_config": {"is_native": True}},
    "qwen2_5_vl": {"model_type": "qwen2_5_vl", "vision_config": {"hidden_size": 1280, "out_hidden_size": 2048}},
}


@pytest.mark.parametrize("name", SILENT)
def test_what_a_file_does_not_say_is_as_transformers_assumes(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(SILENT[name]))
    shape = read_encoder(tmp_path)
    whole = AutoConfig.from_pretrained(tmp_path)
    config = getattr(whole, "vision_config", whole)
    assert shape.hidden_size == config.hidden_size
    assert shape.num_layers == getattr(config, "num_hidden_layers", getattr(config, "depth", None))
    assert shape.patch_size == config.patch_size
    if name.startswith("dinov2"):
        assert shape.intermediate_size == config.hidden_size * config.mlp_ratio
    else:
        assert shape.intermediate_size == config.intermediate_size
    assert shape.num_prefix_tokens == {"clip": 1, "dinov2": 1, "dinov2_with_registers": 5}.get(name, 0)
    if not shape.is_native:
        assert shape.image_size == (config.image_size, config.image_size)
    said = encoder_settings(tmp_path)
    assert said["model_type"] == shape.model_type
    (tmp_path / "config.json").write_text(json.dumps(said))
    assert read_encoder(tmp_path) == shape
    assert AutoConfig.for_model(**said).to_diff_dict() == config.to_diff_dict()


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("siglip", {"num_attention_heads": 5}, "hidden_size 64 is not a multiple of num_attention_heads 5"),
        ("aimv2", {"num_attention_heads": 5}, "hidden_size 64 is not a multiple of num_attention_heads 5"),
        ("siglip", {"hidden_size": 10**12}, "hidden_size is 1000000000000, above 1048576; copy the file"),
        ("clip", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, above 10000; copy the file"),
        ("clip", {"patch_size": 65}, "patch_size 65 is above image_size 64"),
        ("siglip", {"image_size": None, "patch_size": 225}, "patch_size 225 is above image_size 224"),
        (
            "siglip",
            {"hidden_size": "64"},
            "hidden_size missing from the vision model's settings, or not a positive integer",
        ),
        ("dinov2", {"num_hidden_layers": 0}, "num_hidden_layers missing"),
        ("clip", {"vision_config": 3}, "vision_config is 3, but must be the settings of a vision model"),
    ],
)
def test_sizes_that_cannot_be(encoders, tmp_path, kind, changes, expected):
    directory = altered(encoders[kind], tmp_path / "odd", "config.json", **changes)
    with pytest.raises(ConfigError, match=f"odd/config.json: {expected}"):
        read_encoder(directory)


def test_grey_pictures_are_refused(encoders, tmp_path):
    directory = altered(encoders["clip"], tmp_path / "grey", "config.json", num_channels=1)
    with pytest.raises(ValueError, match="num_channels is 1, but pictures have 3 colours"):
        read_encoder(directory)


def test_a_demo_encoder_of_no_kind(tmp_path):
    with pytest.raises(ValueError, match="no demo encoder of kind 'vit'; choose from siglip, clip"):
        save_encoder(tmp_path / "vit", "vit")
