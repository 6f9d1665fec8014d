"""CLIP: features without the class token, from the vision model alone and from a whole CLIP."""

import pytest
import torch
from transformers import AutoImageProcessor, CLIPConfig, CLIPModel, CLIPVisionModel

from laver_megatron.encoders import read_encoder
from tests.encoders import altered, assert_same_encoder, assert_same_features, features, hidden_states, pictures


@pytest.mark.parametrize("layer", [None, -4, -2, -1, 0, 3])
def test_features_are_those_of_transformers(encoders, layer):
    directory = encoders["clip"]
    model = CLIPVisionModel.from_pretrained(directory).eval()
    processor = AutoImageProcessor.from_pretrained(directory, backend="pil")
    expected = [
        hidden_states(model, processor(images=image, return_tensors="pt"))[-2 if layer is None else layer][0, 1:]
        for image in pictures()
    ]
    assert expected[0].shape == (64, 64)
    assert_same_features(features(directory, pictures(), layer), expected)


def test_a_whole_clip_is_its_vision_model(encoders, tmp_path):
    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = CLIPVisionModel.from_pretrained(encoders["clip"])
    whole = CLIPModel(CLIPConfig(text_config=text, vision_config=vision.config.to_dict()))
    whole.vision_model.load_state_dict(vision.state_dict())
    directory = altered(encoders["clip"], tmp_path / "clip", "preprocessor_config.json")
    whole.save_pretrained(directory)
    assert read_encoder(directory) == read_encoder(encoders["clip"])
    assert_same_encoder(directory, encoders["clip"])


def test_sizes(encoders):
    shape = read_encoder(encoders["clip"])
    assert (shape.num_prefix_tokens, shape.num_tokens, shape.default_feature_layer) == (1, 64, -2)
