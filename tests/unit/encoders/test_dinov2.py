"""DINOv2: positions interpolated to what the processor makes, class token and registers dropped."""

import pytest
import torch
from transformers import AutoImageProcessor, AutoModel

from laver_megatron.encoders import build_encoder, open_preprocessor, read_encoder
from tests.encoders import altered, assert_same_features, features, hidden_states, pictures

NUM_PREFIX_TOKENS = {"dinov2": 1, "dinov2_with_registers": 5}


def own_features(directory, kind, layer):
    model = AutoModel.from_pretrained(directory).eval()
    processor = AutoImageProcessor.from_pretrained(directory, backend="pil")
    return [
        hidden_states(model, processor(images=image, return_tensors="pt"))[layer][0, NUM_PREFIX_TOKENS[kind] :]
        for image in pictures()
    ]


@pytest.mark.parametrize("kind", NUM_PREFIX_TOKENS)
@pytest.mark.parametrize("layer", [None, -4, -2, -1, 0, 3])
def test_features_are_those_of_transformers(encoders, kind, layer):
    expected = own_features(encoders[kind], kind, -1 if layer is None else layer)
    assert expected[0].shape == (64, 64)  # 64 pixels in patches of 8, of a table of 13 x 13
    assert_same_features(features(encoders[kind], pictures(), layer), expected)


@pytest.mark.parametrize("kind", NUM_PREFIX_TOKENS)
def test_the_processor_decides_the_size(encoders, tmp_path, kind):
    """Also one that is not square; and the table's own."""
    crop = {"height": 32, "width": 88}
    directory = altered(encoders[kind], tmp_path / "wide", "preprocessor_config.json", crop_size=crop)
    preprocessor = open_preprocessor(directory)
    assert preprocessor.grid(500, 20) == (4, 11) and preprocessor.most_tokens == 44
    assert_same_features(features(directory, pictures()), own_features(directory, kind, -1))
    crop = {"height": 104, "width": 104}
    directory = altered(encoders[kind], tmp_path / "table", "preprocessor_config.json", crop_size=crop)
    assert open_preprocessor(directory).most_tokens == read_encoder(directory).num_tokens == 169
    assert_same_features(features(directory, pictures()), own_features(directory, kind, -1))


def test_sizes_that_patches_do_not_divide(encoders, tmp_path):
    crop = {"height": 66, "width": 66}
    directory = altered(encoders["dinov2"], tmp_path / "odd", "preprocessor_config.json", crop_size=crop)
    with pytest.raises(ValueError, match="66 x 66 pixels, which patches of 8 pixels .* do not divide"):
        open_preprocessor(directory)


def test_registers_are_no_features(encoders):
    """Other registers change what patches become, and their number is not that of the features."""
    directory = encoders["dinov2_with_registers"]
    encoder = build_encoder(directory, -1, torch.float32, load_weights=True)
    pixels = [open_preprocessor(directory)(image) for image in pictures()[:1]]
    with torch.no_grad():
        before = encoder(pixels)
        encoder.model.embeddings.register_tokens.copy_(torch.randn(1, 4, 64))
        after = encoder(pixels)
    assert before.shape == after.shape == (64, 64) and not torch.allclose(before, after, atol=1e-4)


def test_sizes(encoders):
    plain, gated = (read_encoder(encoders[kind]) for kind in NUM_PREFIX_TOKENS)
    assert (plain.num_prefix_tokens, gated.num_prefix_tokens) == (1, 5)
    sizes = {kind: AutoModel.from_pretrained(encoders[kind]).encoder.layer[0].mlp for kind in NUM_PREFIX_TOKENS}
    assert plain.intermediate_size == sizes["dinov2"].fc1.out_features and plain.num_mlp_matrices == 2
    assert gated.intermediate_size == sizes["dinov2_with_registers"].gate_proj.out_features
    assert gated.num_mlp_matrices == 3
