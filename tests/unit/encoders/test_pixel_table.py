"""Pixels equal those of transformers' image processors to the bit."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from laver_megatron.encoders.transformer import FixedPreprocessor

SQUARE = {"height": 48, "width": 48}
PROCESSORS = {
    "siglip": SiglipImageProcessorPil(size=SQUARE),
    "uneven": SiglipImageProcessorPil(size={"height": 40, "width": 56}, image_mean=[0.1, 0.5, 0.7]),
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size=SQUARE),
    "dinov2": BitImageProcessorPil(size={"shortest_edge": 55}, crop_size=SQUARE, resample=3),
    "beyond the edge": CLIPImageProcessorPil(size={"shortest_edge": 31}, crop_size=SQUARE),
    "not resized": CLIPImageProcessorPil(do_resize=False, crop_size=SQUARE),
    "not normalised": SiglipImageProcessorPil(size=SQUARE, do_normalize=False),
    "not rescaled": SiglipImageProcessorPil(size=SQUARE, do_rescale=False),
    "another filter": SiglipImageProcessorPil(size=SQUARE, resample=0),
}


def preprocessor_of(processor):
    cut = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    return FixedPreprocessor(processor, height=cut["height"], width=cut["width"], patch_size=8)


def noise(width, height):
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", [(48, 48), (91, 67), (67, 91), (1, 50), (200, 1), (640, 33)])
def test_pixels_are_the_processors(name, size):
    processor = PROCESSORS[name]
    expected = processor(images=noise(*size), return_tensors="pt")["pixel_values"][0]
    pixels = preprocessor_of(processor)(noise(*size))
    assert pixels.dtype == torch.float32 and torch.equal(pixels, expected.float())


def test_pixels_go_where_they_are_wanted():
    preprocessor, memory = preprocessor_of(PROCESSORS["clip"]), torch.full((3 * 48 * 48 + 2,), 9.0)
    pixels = preprocessor(noise(70, 50), memory)
    assert pixels.data_ptr() == memory.data_ptr() and memory[-2:].tolist() == [9.0, 9.0]
    assert torch.equal(pixels, preprocessor(noise(70, 50)))


def test_pixels_in_bfloat16_are_those_in_float32_rounded():
    preprocessor, memory = preprocessor_of(PROCESSORS["clip"]), torch.empty(3 * 48 * 48 + 2, dtype=torch.bfloat16)
    pixels = preprocessor(noise(70, 50), memory)
    assert pixels.data_ptr() == memory.data_ptr()
    assert torch.equal(pixels, preprocessor(noise(70, 50)).to(torch.bfloat16))


def test_a_processor_that_does_more_is_noticed():
    assert preprocessor_of(PROCESSORS["siglip"]).agrees_with_processor()
    longest = CLIPImageProcessorPil(size={"shortest_edge": 48, "longest_edge": 50}, crop_size=SQUARE)
    assert not preprocessor_of(longest).agrees_with_processor()
