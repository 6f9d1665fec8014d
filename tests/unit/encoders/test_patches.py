"""Patches as features: every pixel is in its place, and there is nothing else."""

from pathlib import Path

import torch
from transformers import AutoImageProcessor

from laver_megatron.encoders import build_encoder, encoder_tensor_sizes, open_preprocessor, read_encoder
from tests.encoders import features, pictures

EXAMPLE = Path(__file__).parents[3] / "examples" / "encoder_free"


def test_features_are_the_normalised_patches(encoders):
    directory = encoders["patches"]
    processor = AutoImageProcessor.from_pretrained(directory, backend="pil")
    size_of, expected = open_preprocessor(directory).size, []
    for image in pictures():
        height, width = size_of(*image.size)
        pixels = processor(images=image, size={"height": height, "width": width}, return_tensors="pt")["pixel_values"][
            0
        ]
        for top in range(0, height, 16):
            for left in range(0, width, 16):
                expected.append(pixels[:, top : top + 16, left : left + 16].flatten())
    assert torch.equal(features(directory, pictures()), torch.stack(expected))


def test_the_example_works():
    shape, preprocessor = read_encoder(EXAMPLE), open_preprocessor(EXAMPLE)
    assert shape.feature_size == 3 * 28 * 28 and not shape.has_weights and preprocessor.most_tokens == 2048
    encoder = build_encoder(EXAMPLE, None, torch.bfloat16, load_weights=True)
    assert not list(encoder.parameters()) and encoder_tensor_sizes(EXAMPLE) == {}
    found = encoder([preprocessor(image) for image in pictures()])
    assert found.shape == (sum(preprocessor.num_tokens(*image.size) for image in pictures()), 3 * 28 * 28)
