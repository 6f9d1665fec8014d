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
    UnidentifiedImageError,
    WebPImagePlugin,
)

from laver_megatron.data.index.faults import Fault, SampleFault

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
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = range(5, 9)  # orientations that turn the picture by a quarter
# What a PNG may say behind its pixels about how it is to be turned.
_LATE_PNG_TAGS = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type exif")
# What files named like pictures often are instead, by how they begin (lower case, without leading space).
_OTHER_KINDS = {
    b"<!doctype html": "an HTML page", b"<html": "an HTML page", b"<svg": "an SVG drawing", b"<?xml": "an XML file",
    b"{": "a JSON file", b"version https://git-lfs": "a Git LFS pointer", b"%pdf": "a PDF file",
    b"\x1f\x8b": "a gzip file", b"pk\x03\x04": "a zip file",
}  # fmt: skip
_OTHER_BRANDS = {b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF", b"avif": "AVIF"}  # after `ftyp`, at byte 8


def image_size(content: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) in pixels of an image as it is to be seen, from the file's header alone wherever it says so.

    Raises:
        SampleFault: an unreadable header, more than `max_pixels`, or a shape beyond `MAX_ASPECT_RATIO`.
    """
    with _opened(content, max_pixels) as image:
        width, height = image.size
        if isinstance(image, TiffImagePlugin.TiffImageFile) and _EXIF_ORIENTATION in image.tag_v2:
            return width, height  # Pillow has turned them already
        if image.format == "PNG" and not any(tag in content for tag in _LATE_PNG_TAGS):
            return width, height  # asked for its EXIF tag, Pillow would decode all of it
        return (height, width) if image.getexif().get(_EXIF_ORIENTATION) in _SWAPS_SIDES else (width, height)


def decode_image(content: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image of a file as `upright_rgb`; of an animation the first frame.

    Raises:
        SampleFault: as `image_size`, or an image that cannot be decoded to its end.
    """
    with _opened(content, max_pixels) as image:
        return upright_rgb(image)


# These two are the one definition of what a picture's pixels are. The model that is exported stands alone and carries a
# copy of them (convert/export/modeling_laver.py); a test holds the two together.


def upright_rgb(image: Image.Image) -> Image.Image:
    """A picture in 8-bit RGB, turned upright as its EXIF or XMP tag says.

    What is transparent is laid over white; 16-bit grey is scaled to 8 bits.

    Raises:
        ValueError: floating-point pixels, which have no agreed range.
    """
    image.load()  # a PNG may say behind its pixels how it is to be turned; a TIFF is turned here, by Pillow
    turn = _UPRIGHT.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    picture = _opaque_rgb(image)
    return picture if turn is None else picture.transpose(turn)


def _opaque_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.mode.startswith("I"):  # I;16 and its kin, and I, which holds 16 bits too
        grey_HW = np.asarray(image.convert("I")).clip(0, 65535)
        grey_HW = np.where(grey_HW == image.info.get("transparency", -1), 65535, grey_HW) >> 8
        return Image.fromarray(grey_HW.astype(np.uint8), "L").convert("RGB")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


@contextmanager
def _opened(content: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """An image whose header has passed, not decoded yet."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own cap follows
            image = Image.open(io.BytesIO(content), formats=_FORMATS)
        with image:
            _check_size(*image.size, max_pixels)
            yield image
    except SampleFault:
        raise
    except Image.DecompressionBombError as error:
        raise SampleFault(Fault.image_too_large, f"a picture of {len(content)} bytes is too large: {error}") from error
    except UnidentifiedImageError:  # its message names an object in memory
        raise SampleFault(
            Fault.unreadable_image,
            f"cannot decode a picture of {len(content)} bytes: it is {_kind(content)}; read are {', '.join(_FORMATS)}",
        ) from None
    except Exception as error:  # Pillow's decoders raise what they like on broken files
        raise SampleFault(
            Fault.unreadable_image, f"cannot decode a picture of {len(content)} bytes: {error}"
        ) from error


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise SampleFault(Fault.image_too_large, f"{width} x {height} pixels are more than {max_pixels}")
    if min(width, height) == 0 or max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise SampleFault(Fault.image_shape, f"{width} x {height} pixels are longer than {MAX_ASPECT_RATIO}:1")


def _kind(content: bytes) -> str:
    """What a file is that is no picture, as far as its first bytes say."""
    if not content:
        return "empty"
    if content[4:8] == b"ftyp" and content[8:12] in _OTHER_BRANDS:
        return _OTHER_BRANDS[content[8:12]]
    start = content[:256].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    found = next((kind for mark, kind in _OTHER_KINDS.items() if start.startswith(mark)), None)
    return found or f"a file that begins {content[:8]!r}"
