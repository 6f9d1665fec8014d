"""Picture files of every Pillow mode that a format training reads can hold, with and without transparency and tags.

    picture_files() -> {"TIFF I;16B, turned by exif": bytes, ...}

Pixels are noise, so that any two ways of reading a file differ wherever they can.
"""

import io
import struct
import zlib
from functools import cache

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
QUARTER_TURN = 6  # EXIF orientation; the width becomes the height
_SIZE = (37, 23)  # width, height
_XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def images() -> dict[str, Image.Image]:
    """A picture of noise in every mode that Pillow can make, and those of 16 bits with all their values."""
    width, height = _SIZE
    random = np.random.default_rng(0)
    colours = Image.fromarray(random.integers(0, 256, (height, width, 4), np.uint8))
    grey_16 = random.integers(0, 1 << 16, (height, width), np.uint16)
    found = {mode: colours.convert(mode) for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LA", "PA")}
    found |= {mode: colours.convert(mode) for mode in ("LAB", "RGBX", "RGBa")}
    found["I;16"] = Image.fromarray(grey_16)
    found["I;16B"] = Image.frombytes("I;16B", _SIZE, grey_16.astype(">u2").tobytes())
    found["I"] = Image.fromarray(grey_16.astype(np.int32))
    found["F"] = Image.fromarray(random.random((height, width)).astype(np.float32))
    return found


@cache
def picture_files() -> dict[str, bytes]:
    """Every file by what it is; those of mode F, which training refuses, are not among them."""
    found: dict[str, bytes] = {}
    exif = Image.Exif()
    exif[0x0112] = QUARTER_TURN
    for mode, image in images().items():
        if mode == "F":
            continue
        for format in FORMATS:
            plain = _saved(image, format)
            if plain is None:
                continue
            found[f"{format} {mode}"] = plain
            xmp = {"tiffinfo": {700: _XMP}} if format == "TIFF" else {"xmp": _XMP}
            for tag, options in (("exif", {"exif": exif}), ("xmp", xmp)):
                if format in ("JPEG", "PNG", "WEBP", "TIFF") and (turned := _saved(image, format, **options)):
                    found[f"{format} {mode}, turned by {tag}"] = turned
            if format == "PNG":
                found[f"{format} {mode}, turned behind its pixels"] = _with_late_exif(plain, exif.tobytes())
                found[f"{format} {mode}, turned by xmp"] = _with_xmp(plain)
            transparent = _transparent(image)
            if format in ("PNG", "GIF") and transparent is not None:
                clear = _saved(image, format, transparency=transparent)
                if clear is not None:
                    found[f"{format} {mode}, transparent"] = clear
    return found


def _saved(image: Image.Image, format: str, **options) -> bytes | None:
    buffer = io.BytesIO()
    try:
        image.save(buffer, format, **options)
    except (OSError, ValueError, KeyError, TypeError):  # the format has no such mode or option
        return None
    return buffer.getvalue()


def _transparent(image: Image.Image) -> int | tuple[int, ...] | None:
    """A colour of the picture that is to be transparent."""
    first = image.getpixel((0, 0))
    if image.mode in ("1", "L", "P", "I;16"):
        return int(first)
    return first if image.mode == "RGB" else None


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _with_late_exif(png: bytes, exif: bytes) -> bytes:
    end = png.rindex(b"IEND") - 4
    return png[:end] + _chunk(b"eXIf", exif.removeprefix(b"Exif\0\0")) + png[end:]


def _with_xmp(png: bytes) -> bytes:
    end = png.rindex(b"IEND") - 4
    return png[:end] + _chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + _XMP) + png[end:]
