"""Token counts and grids of 200 pictures of random sizes are what the encoder yields, for every kind."""

import pytest
import torch

from laver_megatron.demo.encoders import KINDS
from laver_megatron.encoders import build_encoder, open_preprocessor
from tests.encoders import picture, random_sizes


@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_what_the_encoder_yields(encoders, kind):
    preprocessor = open_preprocessor(encoders[kind])
    encoder = build_encoder(encoders[kind], None, torch.float32, load_weights=True)
    sizes = random_sizes()
    for start in range(0, len(sizes), 20):
        batch = sizes[start : start + 20]
        images = [preprocessor(picture(*size)) for size in batch]
        counts = [preprocessor.num_tokens(*size) for size in batch]
        for size, pixels_3HW, count in zip(batch, images, counts, strict=True):
            rows, columns = preprocessor.grid(*size)
            assert pixels_3HW.dtype == torch.float32 and pixels_3HW.shape == (3, *preprocessor.size(*size))
            assert rows * columns == count == preprocessor.num_features(pixels_3HW) <= preprocessor.most_tokens
            assert min(rows, columns) > 0
        with torch.no_grad():
            together = encoder(images)
            assert len(together) == sum(counts)
            # The first image's features are its own, wherever its neighbours begin.
            torch.testing.assert_close(encoder(images[:1]), together[: counts[0]], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(encoder(images[-1:]), together[-counts[-1] :], atol=1e-5, rtol=1e-5)
