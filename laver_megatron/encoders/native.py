"""Native resolution: a picture keeps its shape, and larger ones have more visual tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from laver_megatron.encoders.interface import EncoderShape, ImagePreprocessor
from laver_megatron.encoders.resizing import native_size

if TYPE_CHECKING:
    from PIL import Image
    from transformers import BaseImageProcessor

MOST_TOKENS = 2048  # of one image, where neither the run nor the image processor says


class NativePreprocessor(ImagePreprocessor):
    """Resizes a picture to whole visual tokens (`native_size`), then rescales and normalises it as the image processor
    does. min_pixels, max_pixels: of an image after resizing."""

    def __init__(self, processor: BaseImageProcessor, *, token_size: int, min_pixels: int, max_pixels: int) -> None:
        super().__init__(processor, token_size)
        self.min_pixels, self.max_pixels = min_pixels, max_pixels

    @property
    def settings(self) -> str:
        return f"{self.min_pixels} to {self.max_pixels} pixels in tokens of {self.token_size}"

    @property
    def most_tokens(self) -> int:
        return self.max_pixels // self.token_size**2

    def size(self, width: int, height: int) -> tuple[int, int]:
        return native_size(width, height, self.token_size, min_pixels=self.min_pixels, max_pixels=self.max_pixels)

    def __call__(self, image: Image.Image) -> Tensor:
        height, width = self.size(*image.size)
        resized = image.convert("RGB").resize((width, height), self.processor.resample)
        pixels_3HW = np.moveaxis(np.asarray(resized), -1, 0)
        if self.processor.do_rescale:
            pixels_3HW = self.processor.rescale(pixels_3HW, self.processor.rescale_factor)
        if self.processor.do_normalize:
            pixels_3HW = self.processor.normalize(pixels_3HW, self.processor.image_mean, self.processor.image_std)
        return torch.from_numpy(np.ascontiguousarray(pixels_3HW)).float()


def native_preprocessor(
    processor: BaseImageProcessor,
    shape: EncoderShape,
    file: Path,
    max_image_tokens: int | None,
    *,
    min_pixels: int = 0,
    max_pixels: int | None = None,
) -> NativePreprocessor:
    """`Family.preprocessor` of encoders of native resolution. min_pixels, max_pixels: what the processor says, unless
    `max_image_tokens` does; None: `max_pixels` of its file, else MOST_TOKENS.

    Raises:
        ValueError: patches of other sizes than the encoder's, or a limit that holds no token.
    """
    said = json.loads(file.read_text(encoding="utf-8"))
    for name, of_encoder in (
        ("patch_size", shape.patch_size),
        ("merge_size", shape.merge_size),
        ("temporal_patch_size", shape.temporal_patch_size),
    ):
        of_processor = getattr(processor, name, said.get(name))
        if of_processor not in (None, of_encoder):
            raise ValueError(
                f"{file}: {name} is {of_processor}, but {of_encoder} in the encoder's config.json; copy both files "
                "from the same model"
            )
    area = shape.token_size**2
    if max_image_tokens is not None:
        max_pixels = max_image_tokens * area
    elif max_pixels is None:
        max_pixels = said.get("max_pixels") or MOST_TOKENS * area
    if max_pixels < area:
        raise ValueError(
            f"{file}: images of at most {max_pixels} pixels do not hold one visual token of {shape.token_size} x "
            f"{shape.token_size}; raise max_pixels"
        )
    return NativePreprocessor(processor, token_size=shape.token_size, min_pixels=min_pixels, max_pixels=max_pixels)


def check_sizes(images: Sequence[Tensor], token_size: int) -> None:
    """Whether pixels `[3, H, W]` divide into visual tokens.

    Raises:
        ValueError: the first that do not.
    """
    for number, pixels_3HW in enumerate(images):
        height, width = pixels_3HW.shape[1:]
        if height % token_size or width % token_size:
            raise ValueError(
                f"image {number} has {height} x {width} pixels, which visual tokens of {token_size} x {token_size} "
                "pixels do not divide; prepare it with the encoder's own preprocessor"
            )
