"""The table of families, and what all encoders have in common."""

import json
import pickle

import pytest
import torch

from laver_megatron.demo.encoders import KINDS, save_encoder
from laver_megatron.encoders import FAMILIES, build_encoder, encoder_tensor_sizes, open_preprocessor, read_encoder
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
    directory = altered(encoders["clip"], tmp_path / "odd", "config.json", num_attention_heads=5)
    with pytest.raises(ValueError, match="transformers builds no image encoder from it"):
        encoder_tensor_sizes(directory)


def test_grey_pictures_are_refused(encoders, tmp_path):
    directory = altered(encoders["clip"], tmp_path / "grey", "config.json", num_channels=1)
    with pytest.raises(ValueError, match="num_channels is 1, but pictures have 3 colours"):
        read_encoder(directory)


def test_a_demo_encoder_of_no_kind(tmp_path):
    with pytest.raises(ValueError, match="no demo encoder of kind 'vit'; choose from siglip, clip"):
        save_encoder(tmp_path / "vit", "vit")
