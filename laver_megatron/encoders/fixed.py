"""Fixed resolution: every picture becomes as many pixels and as many visual tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from laver_megatron.encoders.hidden_states import HiddenStateFamily
from laver_megatron.encoders.interface import EncoderShape, ImagePreprocessor

if TYPE_CHECKING:
    from PIL import Image
    from transformers import BaseImageProcessor


class FixedPreprocessor(ImagePreprocessor):
    """What the image processor of an encoder of fixed resolution does. height, width: pixels the encoder sees;
    patch_size: side of a patch, which is a visual token."""

    def __init__(self, processor: BaseImageProcessor, *, height: int, width: int, patch_size: int) -> None:
        super().__init__(processor, patch_size)
        self.height, self.width = height, width

    @property
    def settings(self) -> str:
        return f"{self.height} x {self.width} pixels in patches of {self.token_size}"

    @property
    def most_tokens(self) -> int:
        return self.num_tokens(self.width, self.height)

    def size(self, width: int, height: int) -> tuple[int, int]:
        return self.height, self.width

    def __call__(self, image: Image.Image) -> Tensor:
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0].float()


class FixedFamily(HiddenStateFamily):
    """Families of fixed resolution."""

    def preprocessor(
        self, processor: BaseImageProcessor, shape: EncoderShape, file: Path, max_image_tokens: int | None
    ) -> ImagePreprocessor:
        crops = getattr(processor, "do_center_crop", False)
        size = processor.crop_size if crops else processor.size
        if not (crops or processor.do_resize) or not (size.get("height") and size.get("width")):
            said = dict(size) if crops or processor.do_resize else "do_resize is false"
            raise ValueError(f"{file}: no fixed height and width ({said}), but the encoder is of fixed resolution")
        height, width = size["height"], size["width"]
        if shape.interpolates_positions:
            if height % shape.patch_size or width % shape.patch_size:
                raise ValueError(
                    f"{file}: makes images of {height} x {width} pixels, which patches of {shape.patch_size} pixels "
                    "(config.json) do not divide; set size or crop_size to a multiple"
                )
        elif shape.image_size != (height, width):
            taken = " x ".join(map(str, shape.image_size or ()))
            raise ValueError(
                f"{file}: makes images of {height} x {width} pixels, but the encoder of config.json takes {taken}"
            )
        preprocessor = FixedPreprocessor(processor, height=height, width=width, patch_size=shape.patch_size)
        if max_image_tokens is not None and preprocessor.most_tokens > max_image_tokens:
            raise ValueError(
                f"{file}: every image has {preprocessor.most_tokens} visual tokens, above max_image_tokens "
                f"{max_image_tokens}; raise it or leave it out (an encoder of fixed resolution cannot shrink images)"
            )
        return preprocessor
