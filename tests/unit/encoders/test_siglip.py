"""SigLIP: which hidden state becomes the features, alone and out of a whole model; damaged weights."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, SiglipConfig, SiglipModel, SiglipVisionConfig, SiglipVisionModel

from laver_megatron.encoders import build_encoder, read_encoder
from tests.encoders import altered, assert_same_encoder, assert_same_features, features, hidden_states, pictures

CONFIG = SiglipVisionConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=8
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("encoder")
    SiglipVisionModel(CONFIG).save_pretrained(path)
    return path


def states_of_layers(directory, pixels):
    """Output of the embedding and of each layer, before any final norm, seen from outside."""
    model = SiglipVisionModel.from_pretrained(directory).eval()
    states = []
    for module in [model.embeddings, *model.encoder.layers]:
        module.register_forward_hook(
            lambda module, args, output: states.append(output[0] if isinstance(output, tuple) else output)
        )
    with torch.no_grad():
        model(pixels)
    return states


@pytest.mark.parametrize("feature_layer", [-4, -3, -2, -1, 0, 1, 2, 3])
def test_feature_layer(directory, feature_layer):
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    encoder = build_encoder(directory, feature_layer, torch.float32, load_weights=True)
    features = encoder(list(pixels))
    # Every patch and no class token.
    assert features.shape == (2 * 4, encoder.feature_size)
    states = states_of_layers(directory, pixels)
    assert len(states) == 4
    torch.testing.assert_close(features.view(2, 4, -1), states[feature_layer])


def test_features_are_those_of_transformers(encoders):
    directory = encoders["siglip"]
    model = SiglipVisionModel.from_pretrained(directory).eval()
    processor = AutoImageProcessor.from_pretrained(directory, backend="pil")
    expected = [hidden_states(model, processor(images=image, return_tensors="pt"))[-2][0] for image in pictures()]
    assert_same_features(features(directory, pictures()), expected)


def test_a_whole_siglip_is_its_vision_model(encoders, tmp_path):
    """As SigLIP2 of fixed resolution is published."""
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = SiglipVisionModel.from_pretrained(encoders["siglip"])
    whole = SiglipModel(SiglipConfig(text_config={**text, "vocab_size": 64}, vision_config=vision.config.to_dict()))
    whole.vision_model.load_state_dict(vision.state_dict())
    whole_dir = altered(encoders["siglip"], tmp_path / "whole", "preprocessor_config.json")
    whole.save_pretrained(whole_dir)
    assert read_encoder(whole_dir) == read_encoder(encoders["siglip"])
    assert_same_encoder(whole_dir, encoders["siglip"])


@pytest.mark.parametrize("feature_layer", [-5, 4])
def test_a_layer_that_is_not_there(directory, feature_layer):
    with pytest.raises(ValueError, match=rf"is {feature_layer}, but the encoder has 3 layers; use -4 to 3"):
        build_encoder(directory, feature_layer, torch.float32, load_weights=False)


def test_pixels_are_cast_to_the_encoders_type(directory):
    encoder = build_encoder(directory, -2, torch.bfloat16, load_weights=True)
    assert encoder([torch.zeros(3, 16, 16)]).dtype == torch.bfloat16


@pytest.fixture
def damaged(directory, tmp_path):
    shutil.copytree(directory, tmp_path / "encoder")
    return tmp_path / "encoder"


def damage(directory, edit):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def spoiled(tensors, name):
    tensors[name] = tensors[name].clone().fill_(float("nan"))


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda tensors, name: tensors.pop(name), "lacks 1 tensors"),
        (lambda tensors, name: tensors.update({name: torch.zeros(3)}), "in another size"),
        (spoiled, "NaN or infinite"),
    ],
)
def test_damaged_encoder(damaged, edit, problem):
    name = next(name for name in load_file(damaged / "model.safetensors") if name.endswith("layers.0.layer_norm2.bias"))
    damage(damaged, lambda tensors: edit(tensors, name))
    with pytest.raises(ValueError, match=rf"(?s){damaged}.*{problem}.*layers\.0\.layer_norm2\.bias"):
        build_encoder(damaged, -2, torch.float32, load_weights=True)


def test_truncated_encoder(damaged):
    path = damaged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"the encoder of {damaged} cannot be read"):
        build_encoder(damaged, -2, torch.float32, load_weights=True)
