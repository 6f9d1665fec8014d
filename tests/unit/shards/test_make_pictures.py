import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from laver_megatron.data.index.faults import SampleFault
from laver_megatron.data.read.images import decode_image
from laver_megatron.shards.assemble import prepare_picture
from tests.unit.shards.form import encoded, jpeg, noise


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


COPIED = {
    "jpeg": ("jpg", jpeg()),
    "grey jpeg": ("jpg", encoded(noise(mode="L"), "JPEG")),
    "cmyk jpeg": ("jpg", encoded(noise(mode="CMYK"), "JPEG")),
    "progressive jpeg": ("jpg", encoded(noise(), "JPEG", progressive=True)),
    "turned jpeg": ("jpg", encoded(noise((30, 40)), "JPEG", exif=exif(6))),
    "two pictures in a jpeg": ("jpg", encoded(noise(), "MPO", save_all=True, append_images=[noise()])),
    "png": ("png", encoded(noise(), "PNG")),
    "rgba png": ("png", encoded(noise(mode="RGBA"), "PNG")),
    "palette png": ("png", encoded(noise(mode="P"), "PNG")),
    "16-bit png": ("png", encoded(Image.new("I;16", (40, 30), 999), "PNG")),
    "webp": ("webp", encoded(noise(), "WEBP")),
    "animated webp": ("webp", encoded(noise(), "WEBP", save_all=True, append_images=[noise()])),
}


@pytest.mark.parametrize("name", COPIED)
@pytest.mark.parametrize("decode", [False, True])
def test_what_training_can_read_keeps_its_bytes(name, decode):
    extension, content = COPIED[name]
    picture = prepare_picture(content, "x", decode)
    assert (picture.extension, picture.content) == (extension, content)
    assert (picture.width, picture.height) == decode_image(content).size == (40, 30)


CONVERTED = {
    "bmp": encoded(noise(), "BMP"),
    "palette bmp": encoded(noise(mode="P"), "BMP"),
    "gif": encoded(noise(mode="P"), "GIF"),
    "animated gif": encoded(noise(mode="P"), "GIF", save_all=True, append_images=[noise(mode="P")] * 3),
    "transparent gif": encoded(noise(mode="P"), "GIF", transparency=7),
    "tiff": encoded(noise(), "TIFF", compression="tiff_lzw"),
    "black and white tiff": encoded(noise(mode="1"), "TIFF"),
    "rgba tiff": encoded(noise(mode="RGBA"), "TIFF"),
    "16-bit tiff": encoded(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50), "TIFF"),
    "turned tiff": encoded(noise((30, 40)), "TIFF", exif=exif(6)),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_other_formats_become_png_of_the_same_look(name):
    picture = prepare_picture(CONVERTED[name], "x", decode=False)
    assert picture.extension == "png" and picture.content.startswith(b"\x89PNG")
    assert (picture.width, picture.height) == (40, 30)
    ours, theirs = decode_image(picture.content), decode_image(CONVERTED[name])
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    assert prepare_picture(CONVERTED[name], "x", decode=False).content == picture.content


def test_colours_that_png_lacks_are_converted():
    picture = prepare_picture(encoded(noise(mode="CMYK"), "TIFF"), "x", decode=False)
    assert Image.open(io.BytesIO(picture.content)).mode == "RGB"


@pytest.mark.parametrize("size", [(1, 150), (150, 1), (1, 1)])
def test_a_pixel_wide(size):
    assert prepare_picture(encoded(noise(size), "PNG"), "x", decode=True).extension == "png"


def bomb_png(width, height):
    """A header that promises these pixels, and next to nothing behind it."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def bomb_bmp(width, height):
    return b"BM" + struct.pack("<IIIIiiHHIIIIII", 99, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


UNUSABLE = {
    "nothing": (b"", "unreadable_image"),
    "a text": (b"<html>404</html>", "unreadable_image"),
    "a script for another program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unreadable_image"),
    "half a jpeg": (jpeg((200, 200))[:3000], "unreadable_image"),
    "half a png": (encoded(noise(), "PNG")[:2000], "unreadable_image"),
    "half a webp": (encoded(noise((200, 200)), "WEBP", quality=90)[:3000], "unreadable_image"),
    "half a gif": (encoded(noise((200, 200), "P"), "GIF")[:2000], "unreadable_image"),
    "half a bmp": (encoded(noise(), "BMP")[:2000], "unreadable_image"),
    "the start of a jpeg": (jpeg()[:20], "unreadable_image"),
    "bomb": (bomb_png(100_000, 100_000), "image_too_large"),
    "large bomb": (bomb_png(2**31 - 1, 2**31 - 1), "image_too_large"),
    "bomb of bmp": (bomb_bmp(60_000, 60_000), "image_too_large"),
    "a line": (encoded(Image.new("RGB", (3000, 1)), "PNG"), "image_shape"),
    "fractions": (encoded(Image.new("F", (40, 30), 0.5), "TIFF"), "unreadable_image"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_pictures(name):
    content, fault = UNUSABLE[name]
    with pytest.raises(SampleFault, match="file: 'key'") as caught:
        prepare_picture(content, "file: 'key'", decode=False)
    assert caught.value.fault == fault


def test_only_decoding_finds_a_garbled_picture():
    content = bytearray(encoded(noise((200, 200)), "PNG"))
    content[5000:6000] = bytes(1000)
    assert prepare_picture(bytes(content), "x", decode=False).content == content
    with pytest.raises(SampleFault):
        prepare_picture(bytes(content), "x", decode=True)


def test_a_jpeg_that_lacks_nothing_but_its_end_mark_is_settled_by_decoding():
    content = jpeg((64, 64)) + b"\0\0trailing"
    assert prepare_picture(content, "x", decode=False).content == content
