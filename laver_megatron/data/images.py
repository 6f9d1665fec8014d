"""Pictures to pixels: decoding, and the encoder's own resizing and normalisation.

Letters: 3 colours, height and width of the pixels that the encoder sees.
"""

import io
import json
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import AutoImageProcessor, BaseImageProcessor

# Encoders whose table of positions is as large as their training resolution.
_FIXED_TABLE = ("siglip", "siglip_vision_model", "clip", "clip_vision_model")


class ImagePreprocessor:
    """What the image processor of an encoder of fixed resolution does, and what it costs in tokens.

    height, width: pixels the encoder sees; patch_size: side of a patch in pixels. A visual token is a patch,
    in raster order; a border narrower than a patch has none, as in the encoder's own convolution.
    """

    def __init__(self, processor: BaseImageProcessor, *, height: int, width: int, patch_size: int) -> None:
        self.processor, self.height, self.width, self.patch_size = processor, height, width, patch_size

    @classmethod
    def from_pretrained(cls, encoder_dir: str | Path) -> "ImagePreprocessor":
        """Reads config.json and preprocessor_config.json of an encoder's directory.

        The processor is always transformers' PIL class: the torchvision one resizes a little differently, and
        training and use of a model must not depend on what happens to be installed.

        Raises:
            ValueError: a file is missing, the resolution is not fixed, or it is not the encoder's.
        """
        directory = Path(encoder_dir)
        for name in ("config.json", "preprocessor_config.json"):
            if not (directory / name).is_file():
                raise ValueError(f"the encoder's directory {directory} has no {name}")
        config = json.loads((directory / "config.json").read_text())
        vision = config.get("vision_config", config)
        processor = AutoImageProcessor.from_pretrained(directory, backend="pil", local_files_only=True)
        if getattr(processor, "backend", "pil") != "pil":
            raise ValueError(f"{type(processor).__name__} of {directory} has no PIL version in transformers")
        if "patch_size" not in vision:
            raise ValueError(f"{directory}/config.json names no patch_size: is this an image encoder?")
        height, width = _fixed_resolution(processor, directory)
        size = vision.get("image_size")
        if vision.get("model_type", config.get("model_type")) in _FIXED_TABLE and size not in (None, height):
            raise ValueError(
                f"{directory}: preprocessor_config.json makes images of {height} pixels, but the encoder "
                f"of config.json takes {size}"
            )
        return cls(processor, height=height, width=width, patch_size=vision["patch_size"])

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(rows, columns) of the visual tokens of a picture of this size in pixels: one for every size."""
        return self.height // self.patch_size, self.width // self.patch_size

    def num_tokens(self, width: int, height: int) -> int:
        """Visual tokens of a picture of this size in pixels."""
        rows, columns = self.grid(width, height)
        return rows * columns

    def num_features(self, pixels_3HW: Tensor) -> int:
        """Features the encoder makes of these pixels."""
        _, height, width = pixels_3HW.shape
        return (height // self.patch_size) * (width // self.patch_size)

    def __call__(self, image: Image.Image) -> Tensor:
        """Normalised pixels, float32 `[3, height, width]`."""
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0].to(torch.float32)


def decode_image(content: bytes) -> Image.Image:
    """The picture of an image file in RGB, turned upright as its EXIF tag says.

    Raises:
        OSError: whatever is wrong with it; the message says what.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow's decoders raise what they like on broken files
        raise OSError(f"cannot decode a picture of {len(content)} bytes: {error}") from error


def _fixed_resolution(processor: BaseImageProcessor, directory: Path) -> tuple[int, int]:
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    if not (size.get("height") and size.get("width")):
        raise ValueError(
            f"the image processor of {directory} has no fixed height and width (it says {dict(size)}); only "
            "encoders of fixed resolution can be used"
        )
    return size["height"], size["width"]
