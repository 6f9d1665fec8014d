"""Pictures from files: which may be decoded, and how they become upright RGB (resizing is the encoders')."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

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
