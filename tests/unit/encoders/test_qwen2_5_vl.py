"""Qwen2.5-VL's vision model: its patches to the bit, its sizes, its merged features, alone and out of a whole model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from laver_megatron.encoders import build_encoder, open_preprocessor, read_encoder
from laver_megatron.encoders.modules import image_patches
from tests.encoders import altered, assert_same_encoder, assert_same_features, features, picture, pictures, random_sizes

TOKEN = 16  # pixels on the side of a visual token


def own_inputs(directory, image, **options):
    processor = AutoImageProcessor.from_pretrained(directory, backend="pil")
    return processor(images=image, return_tensors="pt", **options)


@pytest.fixture(scope="module")
def own_model(encoders):
    return Qwen2_5_VisionTransformerPretrainedModel.from_pretrained(encoders["qwen2_5_vl"]).eval()


def own_features(model, directory, images):
    found = []
    for image in images:
        inputs = own_inputs(directory, image)
        with torch.no_grad():
            found.append(model(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output)
    return found


def test_features_are_those_of_transformers(encoders, own_model):
    directory = encoders["qwen2_5_vl"]
    expected = own_features(own_model, directory, pictures())
    assert min(map(len, expected)) < 20 < max(map(len, expected))
    assert_same_features(features(directory, pictures()), expected)


def test_a_different_window_gives_other_features(encoders, own_model, tmp_path):
    """The comparison above sees the windows."""
    directory = altered(encoders["qwen2_5_vl"], tmp_path / "wide", "config.json", window_size=128)
    ours = features(directory, pictures())
    expected = torch.cat(own_features(own_model, directory, pictures()))
    assert ours.shape == expected.shape and not torch.allclose(ours, expected, atol=1e-3)


def test_patches_are_the_processors_to_the_bit(encoders):
    directory = encoders["qwen2_5_vl"]
    preprocessor, shape = open_preprocessor(directory), read_encoder(directory)
    for image in pictures():
        inputs = own_inputs(directory, image)
        assert torch.equal(image_patches(preprocessor(image), shape), inputs["pixel_values"])
        rows, columns = preprocessor.grid(*image.size)
        assert inputs["image_grid_thw"].tolist() == [[1, 2 * rows, 2 * columns]]


@pytest.mark.parametrize("cap", [None, 40, 300])
def test_sizes_are_those_of_its_own_processor(encoders, cap):
    """For 200 pictures; where its own goes beyond the cap (long and narrow ones), ours does not."""
    directory = encoders["qwen2_5_vl"]
    preprocessor = open_preprocessor(directory, cap)
    limit = 64 if cap is None else cap
    processor = AutoImageProcessor.from_pretrained(directory, backend="pil")
    pixels = {"min_pixels": 4 * TOKEN**2, "max_pixels": limit * TOKEN**2}
    beyond = 0
    for width, height in random_sizes():
        own = processor.get_number_of_image_patches(height, width, pixels) // 4
        if own > limit:
            beyond += 1
            assert 0 < preprocessor.num_tokens(width, height) <= limit
        else:
            assert preprocessor.num_tokens(width, height) == own
    assert (0 < beyond < 100) == (cap == 40)  # the others leave room for every long one


@pytest.mark.parametrize("prefix", ["visual.", "model.visual."])
def test_a_whole_qwen_is_its_vision_model(encoders, tmp_path, prefix):
    torch.manual_seed(0)
    vision = Qwen2_5_VisionTransformerPretrainedModel.from_pretrained(encoders["qwen2_5_vl"])
    text = {"hidden_size": 96, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "vocab_size": 64}
    tokens = {f"{name}_id": 1 for name in ("vision_start_token", "vision_end_token", "image_token", "video_token")}
    whole = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(vision_config=vision.config.to_dict(), text_config=text, **tokens)
    )
    whole.model.visual.load_state_dict(vision.state_dict())
    directory = altered(encoders["qwen2_5_vl"], tmp_path / "whole", "preprocessor_config.json")
    whole.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    assert any(name.startswith("visual.") for name in tensors)
    save_file(
        {name.replace("visual.", prefix): tensor for name, tensor in tensors.items()}, directory / "model.safetensors"
    )
    # Published files give the vision model the whole one's type, and the colours another name.
    config = json.loads((directory / "config.json").read_text())
    config["vision_config"] |= {"model_type": "qwen2_5_vl", "in_chans": 3}
    del config["vision_config"]["in_channels"], config["vision_config"]["temporal_patch_size"]
    (directory / "config.json").write_text(json.dumps(config))
    assert read_encoder(directory) == read_encoder(encoders["qwen2_5_vl"])
    assert_same_encoder(directory, encoders["qwen2_5_vl"])


def test_frequencies_stay_exact_in_bf16(encoders):
    for load_weights in (True, False):
        encoder = build_encoder(encoders["qwen2_5_vl"], None, torch.bfloat16, load_weights=load_weights)
        assert {parameter.dtype for parameter in encoder.parameters()} == {torch.bfloat16}
        assert encoder.model.rotary_pos_emb.inv_freq.dtype == torch.float32
        assert encoder([torch.zeros(3, 32, 32)]).dtype == torch.bfloat16


def test_there_is_no_choice_of_layers(encoders):
    with pytest.raises(
        ValueError, match="encoder_feature_layer is -2, but an encoder of type qwen2_5_vl_vision has one"
    ):
        build_encoder(encoders["qwen2_5_vl"], -2, torch.float32, load_weights=False)


def test_pixels_that_the_merging_does_not_divide(encoders):
    encoder = build_encoder(encoders["qwen2_5_vl"], None, torch.float32, load_weights=False)
    with pytest.raises(ValueError, match="image 0 has 32 x 24 pixels, which visual tokens of 16 x 16 pixels do not"):
        encoder([torch.zeros(3, 32, 24)])


@pytest.mark.parametrize("name, other", [("patch_size", 14), ("merge_size", 1), ("temporal_patch_size", 1)])
def test_processors_of_another_model(encoders, tmp_path, name, other):
    directory = altered(encoders["qwen2_5_vl"], tmp_path / "other", "preprocessor_config.json", **{name: other})
    with pytest.raises(ValueError, match=rf"{name} is {other}, but \d in the encoder's config.json"):
        open_preprocessor(directory)


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"fullatt_block_indexes": 3}, "fullatt_block_indexes is 3"),
        ({"num_heads": 5}, "hidden_size 64 is not a multiple of num_heads 5"),
        ({"in_channels": 4}, "num_channels is 4, but pictures have 3 colours"),
        ({"window_size": 8}, "window_size 8 does not hold one visual token of 16 pixels"),
        ({"out_hidden_size": "x", "depth": 0}, "depth, out_hidden_size missing"),
    ],
)
def test_settings_that_cannot_be(encoders, tmp_path, changes, problem):
    with pytest.raises(ValueError, match=problem):
        read_encoder(altered(encoders["qwen2_5_vl"], tmp_path / "other", "config.json", **changes))


def test_an_image_of_2048_tokens(encoders):
    preprocessor = open_preprocessor(encoders["qwen2_5_vl"], 2048)
    image = picture(1024, 512)
    assert preprocessor.grid(*image.size) == (32, 64) and preprocessor.num_tokens(4096, 2048) == 2048
    assert features(encoders["qwen2_5_vl"], [image], max_image_tokens=2048).shape == (2048, 96)
