"""Pictures to pixels: decoding, and the encoder's own resizing and normalisation.

Letters: 3 colours, height and width of the pixels that the encoder sees.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from laver_megatron.data.faults import Fault, SampleFault

if TYPE_CHECKING:  # indexing needs neither, and both take seconds to import
    from torch import Tensor
    from transformers import BaseImageProcessor

MAX_PIXELS = 100_000_000  # of a picture before it is decoded: 300 MB
MAX_ASPECT_RATIO = 200
# Only these are ever asked whether a file is theirs; Pillow knows plugins by name once they are imported.
_PLUGINS = (
    JpegImagePlugin.JpegImageFile,
    PngImagePlugin.PngImageFile,
    WebPImagePlugin.WebPImageFile,
    GifImagePlugin.GifImageFile,
    BmpImagePlugin.BmpImageFile,
    TiffImagePlugin.TiffImageFile,
)
_FORMATS = tuple(plugin.format for plugin in _PLUGINS)  # JPEG brings MPO along
_EXIF_ORIENTATION = 0x0112
_SWAPS_SIDES = range(5, 9)  # EXIF orientations that turn the picture by a quarter
_TRANSPOSE = Image.Transpose
_UPRIGHT = {
    2: _TRANSPOSE.FLIP_LEFT_RIGHT,
    3: _TRANSPOSE.ROTATE_180,
    4: _TRANSPOSE.FLIP_TOP_BOTTOM,
    5: _TRANSPOSE.TRANSPOSE,
    6: _TRANSPOSE.ROTATE_270,
    7: _TRANSPOSE.TRANSVERSE,
    8: _TRANSPOSE.ROTATE_90,
}

# Encoders whose table of positions is as large as their training resolution.
_FIXED_TABLE = ("siglip", "siglip_vision_model", "clip", "clip_vision_model")


class ImagePreprocessor:
    """What the image processor of an encoder of fixed resolution does, and what it costs in tokens.

    height, width: pixels the encoder sees; patch_size: side of a patch in pixels. A visual token is a patch,
    in raster order; a border narrower than a patch has none, as in the encoder's own convolution.
    """

    def __init__(self, processor: BaseImageProcessor, *, height: int, width: int, patch_size: int) -> None:
        self.processor, self.height, self.width, self.patch_size = processor, height, width, patch_size
        from laver_megatron.data.pixel_table import PixelTable

        self._table = PixelTable(processor)

    @classmethod
    def from_pretrained(cls, encoder_dir: str | Path) -> ImagePreprocessor:
        """Reads config.json and preprocessor_config.json of an encoder's directory.

        The processor is always transformers' PIL class: the torchvision one resizes a little differently, and
        training and use of a model must not depend on what happens to be installed.

        Raises:
            ValueError: a file is missing, the resolution is not fixed, or it is not the encoder's.
        """
        from transformers import AutoImageProcessor

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
        preprocessor = cls(processor, height=height, width=width, patch_size=vision["patch_size"])
        if not preprocessor.agrees_with_processor():
            raise ValueError(
                f"{type(processor).__name__} of {directory} does something to pictures besides resizing, cutting out "
                "the centre, rescaling and normalising, which is not supported"
            )
        return preprocessor

    @property
    def settings(self) -> str:
        """All that the number of visual tokens of a picture depends on, as a name for caches of counts."""
        return f"{self.height} x {self.width} pixels in patches of {self.patch_size}"

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(rows, columns) of the visual tokens of a picture of this size in pixels: one for every size."""
        return self.height // self.patch_size, self.width // self.patch_size

    def num_tokens(self, width: int, height: int) -> int:
        """Visual tokens of a picture of this size in pixels."""
        rows, columns = self.grid(width, height)
        return rows * columns

    @property
    def pixels_per_token(self) -> int:
        """Pixels that the encoder sees for a visual token, at most."""
        rows, columns = self.grid(self.width, self.height)
        return -(-self.height * self.width // (rows * columns))

    def num_features(self, pixels_3HW: Tensor) -> int:
        """Features the encoder makes of these pixels."""
        _, height, width = pixels_3HW.shape
        return (height // self.patch_size) * (width // self.patch_size)

    def __call__(self, image: Image.Image, memory: Tensor | None = None) -> Tensor:
        """Normalised pixels of an RGB picture, float32 `[3, height, width]`, equal to the processor's own to the bit.
        memory: float32, flat; the pixels are put at its beginning, or into memory of their own."""
        return self._table(self._fitted(image), memory)

    def agrees_with_processor(self) -> bool:
        """Whether a picture of noise gets the same pixels here as from the processor itself."""
        noise_HW3 = np.random.default_rng(0).integers(0, 256, (53, 37, 3), np.uint8)
        picture = Image.fromarray(noise_HW3)
        return self(picture).equal(self.processor(images=picture, return_tensors="pt")["pixel_values"][0])

    def _fitted(self, image: Image.Image) -> Image.Image:
        processor = self.processor
        if processor.do_resize:
            size, resample = processor.size, processor.resample
            height, width = size.get("height"), size.get("width")
            if size.get("shortest_edge"):
                shortest = size["shortest_edge"]
                # The longer edge is rounded down, as transformers does it.
                width, height = (int(shortest * edge / min(image.size)) for edge in image.size)
            image = image.resize((width, height), Image.Resampling.BILINEAR if resample is None else resample)
        if getattr(processor, "do_center_crop", False):
            # What is cut out beyond the picture is black, as with transformers.
            left, top = (image.width - self.width) // 2, (image.height - self.height) // 2
            image = image.crop((left, top, left + self.width, top + self.height))
        return image


def image_size(content: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) in pixels of an image as it is to be seen, from the file's header alone.

    Raises:
        SampleFault: an unreadable header, more than `max_pixels`, or a shape beyond `MAX_ASPECT_RATIO`.
    """
    with _opened(content, max_pixels) as (image, orientation):
        width, height = image.size
        return (height, width) if orientation in _SWAPS_SIDES else (width, height)


def decode_image(content: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image of a file in RGB, turned upright as its EXIF tag says.

    What is transparent is laid over white; 16-bit grey is scaled to 8 bits; of an animation the first frame counts.

    Raises:
        SampleFault: as `image_size`, or an image that cannot be decoded to its end.
    """
    with _opened(content, max_pixels) as (image, orientation):
        image.load()
        picture = _to_rgb(image)
        return picture if orientation == 1 else picture.transpose(_UPRIGHT[orientation])


@contextmanager
def _opened(content: bytes, max_pixels: int) -> Iterator[tuple[Image.Image, int]]:
    """An image whose header has passed, not decoded yet, and its EXIF orientation."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own cap follows
            image = Image.open(io.BytesIO(content), formats=_FORMATS)
        with image:
            _check_size(*image.size, max_pixels)
            yield image, _orientation(image)
    except SampleFault:
        raise
    except Image.DecompressionBombError as error:
        raise SampleFault(Fault.image_too_large, f"a picture of {len(content)} bytes is too large: {error}") from error
    except Exception as error:  # Pillow's decoders raise what they like on broken files
        raise SampleFault(
            Fault.unreadable_image, f"cannot decode a picture of {len(content)} bytes: {error}"
        ) from error


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise SampleFault(Fault.image_too_large, f"{width} x {height} pixels are more than {max_pixels}")
    if min(width, height) == 0 or max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise SampleFault(Fault.image_shape, f"{width} x {height} pixels are longer than {MAX_ASPECT_RATIO}:1")


def _orientation(image: Image.Image) -> int:
    # A PNG is decoded whole if asked for EXIF that it has not announced in front; a TIFF is turned by Pillow itself.
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    return orientation if orientation in _UPRIGHT else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.mode.startswith("I"):  # I;16 and its kin, and I, which holds 16 bits too
        grey_HW = np.asarray(image.convert("I")).clip(0, 65535) >> 8
        return Image.fromarray(grey_HW.astype(np.uint8), "L").convert("RGB")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _fixed_resolution(processor: BaseImageProcessor, directory: Path) -> tuple[int, int]:
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    if not (size.get("height") and size.get("width")):
        raise ValueError(
            f"the image processor of {directory} has no fixed height and width (it says {dict(size)}); only "
            "encoders of fixed resolution can be used"
        )
    return size["height"], size["width"]
