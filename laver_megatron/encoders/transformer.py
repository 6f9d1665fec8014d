"""Vision transformers whose features are a hidden state. At fixed resolution every picture becomes as many pixels and
as many visual tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laver_megatron.encoders.interface import EncoderShape, Family, ImagePreprocessor
from laver_megatron.encoders.native import native_preprocessor
from laver_megatron.hf.shape import is_size

if TYPE_CHECKING:
    from PIL import Image
    from transformers import BaseImageProcessor, PreTrainedModel

    from laver_megatron.encoders.modules import HiddenStateEncoder

TRANSFORMER_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
)  # fmt: skip
_LAYER = re.compile(r"(?:^|\.)layers?\.(\d+)\.")  # in the name of a parameter, the number of its layer


class FixedPreprocessor(ImagePreprocessor):
    """What the image processor of an encoder of fixed resolution does.

    Args:
        height, width: pixels that the encoder sees.
        patch_size: side of a patch, which is a visual token.
    """

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

    @property
    def pixels_per_token(self) -> int:
        return -(-self.height * self.width // self.most_tokens)  # with the border that no token sees

    def fitted(self, image: Image.Image) -> Image.Image:
        processor = self.processor
        if processor.do_resize:
            size = processor.size
            height, width = size.get("height"), size.get("width")
            if size.get("shortest_edge"):
                shortest = size["shortest_edge"]
                # The longer edge is rounded down, as transformers does it.
                width, height = (int(shortest * edge / min(image.size)) for edge in image.size)
            image = image.resize((width, height), self.processor.resample)
        if getattr(processor, "do_center_crop", False):
            # What is cut out beyond the picture is black, as with transformers.
            left, top = (image.width - self.width) // 2, (image.height - self.height) // 2
            image = image.crop((left, top, left + self.width, top + self.height))
        return image

    def agrees_with_processor(self) -> bool:
        """Whether a picture of noise gets the same pixels here as from the processor itself."""
        import numpy as np
        from PIL import Image

        noise_HW3 = np.random.default_rng(0).integers(0, 256, (53, 37, 3), np.uint8)
        picture = Image.fromarray(noise_HW3)
        return self(picture).equal(self.processor(images=picture, return_tensors="pt")["pixel_values"][0])


def transformer_shape(model_type: str, sizes: Mapping[str, int], **others: Any) -> EncoderShape:
    """The shape of a vision transformer by TRANSFORMER_SIZES; without an image_size it is of native resolution."""
    side = sizes.get("image_size")
    return EncoderShape(
        model_type=model_type,
        feature_size=sizes["hidden_size"],
        num_layers=sizes["num_hidden_layers"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        patch_size=sizes["patch_size"],
        image_size=None if side is None else (side, side),
        **others,
    )


class TransformerFamily(Family):
    """Vision transformers, of fixed resolution unless their shape says otherwise.

    Attributes:
        behind_layers: beginnings of the names of parameters that no hidden state depends on, such as those of the final
            norm and of a pooling head.
    """

    behind_layers: tuple[str, ...]

    def is_idle(self, name: str, num_layers: int | None) -> bool:
        assert num_layers is not None
        layer = _LAYER.search(name)
        # Some versions of transformers have another module around the vision model.
        behind = name.removeprefix("vision_model.").startswith(self.behind_layers)
        return behind or (layer is not None and int(layer[1]) >= num_layers)

    def encoder(
        self, model: PreTrainedModel | None, shape: EncoderShape, feature_layer: int | None
    ) -> HiddenStateEncoder:
        from laver_megatron.encoders.modules import HiddenStateEncoder

        assert model is not None and feature_layer is not None
        return HiddenStateEncoder(model, shape, feature_layer)

    def preprocessor(
        self, processor: BaseImageProcessor, shape: EncoderShape, file: Path, max_image_tokens: int | None
    ) -> ImagePreprocessor:
        if shape.is_native:
            return native_preprocessor(processor, shape, file, max_image_tokens)
        crops = getattr(processor, "do_center_crop", False)
        size = processor.crop_size if crops else processor.size
        if not (crops or processor.do_resize) or not (size.get("height") and size.get("width")):
            said = dict(size) if crops or processor.do_resize else "do_resize is false"
            raise ValueError(f"{file}: no fixed height and width ({said}), but the encoder is of fixed resolution")
        height, width = size["height"], size["width"]
        if not (is_size(height) and is_size(width)):
            raise ValueError(f"{file}: height {height!r} and width {width!r} must be positive integers")
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
        if not preprocessor.agrees_with_processor():
            raise ValueError(
                f"{file}: {type(processor).__name__} does something to pictures besides resizing, cutting out the "
                "centre, rescaling and normalising, which is not supported"
            )
        if max_image_tokens is not None and preprocessor.most_tokens > max_image_tokens:
            raise ValueError(
                f"{file}: every image has {preprocessor.most_tokens} visual tokens, above max_image_tokens "
                f"{max_image_tokens}; raise it or leave it out (an encoder of fixed resolution cannot shrink images)"
            )
        return preprocessor
