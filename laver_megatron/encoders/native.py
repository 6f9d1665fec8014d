"""Native resolution: a picture keeps its shape, and larger ones have more visual tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from laver_megatron.encoders.interface import EncoderShape, ImagePreprocessor
from laver_megatron.hf.files import read_image_processor
from laver_megatron.hf.shape import is_size

if TYPE_CHECKING:
    from PIL import Image
    from transformers import BaseImageProcessor

MOST_TOKENS = 2048  # of one image, where neither the run nor the image processor says


def native_size(width: int, height: int, token_size: int, *, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) nearest to those of the picture that are multiples of `token_size` and hold between `min_pixels`
    and `max_pixels` pixels; width to height stays what it is, as nearly as the multiples let it.

    It is Qwen2.5-VL's own size wherever that keeps to `max_pixels`. Of a picture so long and narrow that one token on
    its short side is already too many, the long side is cut down, which Qwen's does not do. max_pixels goes before
    min_pixels (0: none), and must hold one token.
    """
    assert max_pixels >= token_size**2, (max_pixels, token_size)
    # Halves go to the even neighbour, as Python rounds.
    rows, columns = round(height / token_size), round(width / token_size)
    if rows * columns * token_size**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (max(1, math.floor(side / shrink / token_size)) for side in (height, width))
    elif rows * columns * token_size**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / token_size) for side in (height, width))
    rows, columns = max(1, rows), max(1, columns)
    most_tokens = max_pixels // token_size**2
    if rows * columns > most_tokens:
        rows = min(rows, most_tokens if rows >= columns else max(1, most_tokens // columns))
        columns = min(columns, most_tokens // rows)
    return rows * token_size, columns * token_size


class NativePreprocessor(ImagePreprocessor):
    """Resizes a picture to whole visual tokens (`native_size`), then rescales and normalises it as the image processor
    does. min_pixels and max_pixels limit an image after resizing."""

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

    def fitted(self, image: Image.Image) -> Image.Image:
        height, width = self.size(*image.size)
        return image.resize((width, height), self.processor.resample)


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
        ValueError: a processor that makes images of one size, patches of other sizes than the encoder's, or a limit
            that is not a number or does not hold one token.
    """
    said = read_image_processor(file.parent)[1]
    _check_sizes_are_free(processor, file)
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
        max_pixels = said.get("max_pixels")
        max_pixels = MOST_TOKENS * area if max_pixels is None else max_pixels
        if not is_size(max_pixels):
            raise ValueError(f"{file}: max_pixels is {max_pixels!r}, but must be a positive integer")
    if max_pixels < area:
        raise ValueError(
            f"{file}: images of at most {max_pixels} pixels do not hold one visual token of {shape.token_size} x "
            f"{shape.token_size}; raise max_pixels"
        )
    return NativePreprocessor(processor, token_size=shape.token_size, min_pixels=min_pixels, max_pixels=max_pixels)


def _check_sizes_are_free(processor: BaseImageProcessor, file: Path) -> None:
    """Raises ValueError if the processor itself would make every picture as large. What it says of a shortest edge
    alone is not used, as pictures are resized by `native_size`."""
    size = getattr(processor, "size", None) or {}
    if size.get("height") or size.get("width"):
        fault = f"size makes every image {size.get('height')} x {size.get('width')} pixels"
    elif getattr(processor, "do_center_crop", False):
        fault = "images are cropped (do_center_crop, which is on unless the file says false)"
    else:
        return
    raise ValueError(
        f"{file}: {fault}, but the encoder is of native resolution; set do_center_crop to false, remove size, and say "
        "max_pixels instead"
    )
