import io
import json
import shutil
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import SiglipVisionModel

from laver_megatron.data.index.faults import Fault, SampleFault
from laver_megatron.data.read.images import decode_image, image_size
from laver_megatron.encoders import open_preprocessor
from tests.content import picture_bytes
from tests.picture_files import picture_files


def test_tokens_are_as_many_as_the_encoders_features(demo_dir, preprocessor):
    pixels_3HW = preprocessor(decode_image(picture_bytes((90, 50))))
    features_1NE = SiglipVisionModel.from_pretrained(demo_dir / "encoder")(pixels_3HW[None]).last_hidden_state
    assert features_1NE.shape[1] == preprocessor.num_tokens(90, 50) == preprocessor.num_features(pixels_3HW) == 64
    assert preprocessor.grid(90, 50) == (8, 8)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "I;16"])
@pytest.mark.parametrize("size", [(1, 50), (50, 1), (3, 3)])
def test_every_kind_of_picture_becomes_pixels(preprocessor, mode, size):
    picture = Image.new(mode, size, 1)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG" if mode == "CMYK" else "PNG")
    pixels_3HW = preprocessor(decode_image(buffer.getvalue()))
    assert pixels_3HW.shape == (3, 64, 64) and pixels_3HW.dtype == torch.float32
    assert pixels_3HW.abs().max() <= 1


def test_colours_and_normalisation(preprocessor):
    pixels_3HW = preprocessor(Image.new("RGB", (20, 30), (255, 0, 51)))
    # Mean and standard deviation 0.5 map 0..255 to -1..1; float32 rounding only.
    torch.testing.assert_close(pixels_3HW, torch.tensor([1.0, -1.0, -0.6])[:, None, None].expand(3, 64, 64))


KINDS = {
    "an HTML page": b"\n <!DOCTYPE html><html>404</html>",
    "an XML file": b"<?xml version='1.0'?><svg/>",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\n",
    "HEIC": b"\0\0\0\x18ftypheic" + bytes(40),
    "a file that begins b'garbage!'": b"garbage! and more",
    "empty": b"",
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_named_like_a_picture_and_is_none(kind):
    for look in (image_size, decode_image):
        with pytest.raises(
            SampleFault, match=f"a picture of {len(KINDS[kind])} bytes: it is {kind}; read are JPEG, PNG"
        ) as caught:
            look(KINDS[kind])
        assert "BytesIO" not in str(caught.value)


def test_a_sixteen_bit_colour_that_is_transparent_is_white():
    grey = Image.fromarray(np.array([[1000, 2000, 65535]], np.uint16))
    assert pixels_of(grey, transparency=1000) == [(v, v, v) for v in (255, 7, 255)]


def test_sizes_are_those_of_the_turned_picture():
    """Where the header alone does not say it, the size is that of the picture as it is decoded."""
    for name, content in picture_files().items():
        turned = "turned" in name
        assert image_size(content) == decode_image(content).size == ((23, 37) if turned else (37, 23)), name


def test_orientation_is_applied():
    picture = Image.new("RGB", (20, 10), "black")
    picture.paste("white", (0, 0, 10, 10))  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise: left becomes top
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", exif=exif)
    upright = decode_image(buffer.getvalue())
    assert upright.size == (10, 20)
    assert upright.getpixel((5, 2)) == (255, 255, 255) and upright.getpixel((5, 17)) == (0, 0, 0)


@pytest.mark.parametrize("content", [b"", b"no picture", picture_bytes()[:400], picture_bytes(extension="png")[:-60]])
def test_broken_pictures(content):
    with pytest.raises(SampleFault, match="cannot decode a picture") as caught:
        decode_image(content)
    assert caught.value.fault is Fault.unreadable_image


@pytest.mark.parametrize("extension", ["jpeg", "png", "webp", "gif", "bmp", "tiff"])
def test_sizes_come_from_headers_alone(extension):
    content = picture_bytes((40, 30), extension)
    assert image_size(content) == decode_image(content).size == (40, 30)
    assert decode_image(content).mode == "RGB"
    if extension not in ("tiff", "webp"):  # whose headers Pillow reads with all the rest
        assert image_size(content[: len(content) * 2 // 3]) == (40, 30)
        with pytest.raises(SampleFault):
            decode_image(content[: len(content) * 2 // 3])


@pytest.mark.parametrize("extension", ["jpeg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 10))
def test_every_orientation_is_that_of_pillow(extension, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = picture_bytes((40, 30), extension, exif=exif)
    with Image.open(io.BytesIO(content)) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    upright = decode_image(content)
    assert upright.size == image_size(content) == expected.size
    assert upright.tobytes() == expected.tobytes()


def test_what_is_transparent_is_white():
    layer = Image.new("RGBA", (3, 1), (255, 0, 0, 255))
    layer.putpixel((1, 0), (255, 0, 0, 0))
    layer.putpixel((2, 0), (255, 0, 0, 127))
    assert pixels_of(layer) == [(255, 0, 0), (255, 255, 255), (255, 128, 128)]
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 255, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    assert pixels_of(palette, transparency=1) == [(0, 0, 255), (255, 255, 255)]
    assert pixels_of(Image.new("LA", (1, 1), (7, 0))) == [(255, 255, 255)]
    assert pixels_of(Image.new("RGB", (1, 1), (1, 2, 3)), transparency=(1, 2, 3)) == [(255, 255, 255)]


def test_sixteen_bits_are_scaled_and_not_cut():
    grey = Image.fromarray(np.array([[0, 255, 256, 32768, 65535]], np.uint16))
    assert pixels_of(grey) == [(v, v, v) for v in (0, 0, 1, 128, 255)]


def test_cmyk_is_what_pillow_makes_of_it():
    buffer = io.BytesIO()
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(buffer, "JPEG")
    red, green, blue = decode_image(buffer.getvalue()).getpixel((4, 4))
    assert red > 250 and green < 5 and blue < 5  # a lossy format


def pixels_of(image, extension="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, extension, **options)
    decoded = decode_image(buffer.getvalue())
    return [decoded.getpixel((x, 0)) for x in range(decoded.width)]


def test_caps_hold_before_anything_is_decoded(monkeypatch):
    content = picture_bytes((40, 30), "png")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    assert image_size(content, max_pixels=1200) == (40, 30)
    for look in (image_size, decode_image):
        with pytest.raises(SampleFault, match="40 x 30 pixels are more than 1199") as caught:
            look(content, max_pixels=1199)
        assert caught.value.fault is Fault.image_too_large


@pytest.mark.parametrize("size, fault", [((30_000, 30_000), "image_too_large"), ((12_000, 9_000), "image_too_large")])
def test_bombs_are_told_by_their_headers(size, fault, recwarn):
    content = bytearray(picture_bytes((40, 30), "png"))
    content[16:24] = struct.pack(">II", *size)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    with pytest.raises(SampleFault) as caught:
        decode_image(bytes(content))
    assert caught.value.fault == fault
    assert not recwarn.list


@pytest.mark.parametrize("size", [(201, 1), (1, 201), (402, 2)])
def test_long_strips(size):
    with pytest.raises(SampleFault, match="longer than 200:1") as caught:
        image_size(picture_bytes(size, "png"))
    assert caught.value.fault is Fault.image_shape
    assert image_size(picture_bytes((200, 1), "png")) == (200, 1)


def test_other_formats_are_never_tried():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PPM")
    with pytest.raises(SampleFault, match="cannot decode"):
        decode_image(buffer.getvalue())


@pytest.mark.processes
def test_indexing_imports_neither_torch_nor_transformers():
    program = (
        "import sys, laver_megatron.data.index.build; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def altered(demo_dir, tmp_path, name, **changes):
    directory = tmp_path / "encoder"
    shutil.copytree(demo_dir / "encoder", directory)
    settings = json.loads((directory / name).read_text())
    (directory / name).write_text(json.dumps({**settings, **changes}))
    return directory


def test_encoders_that_do_not_fit(demo_dir, tmp_path):
    with pytest.raises(ValueError, match="no config.json in it"):
        open_preprocessor(tmp_path)
    size = {"shortest_edge": 64}
    directory = altered(demo_dir, tmp_path / "a", "preprocessor_config.json", size=size)
    with pytest.raises(ValueError, match="no fixed height and width"):
        open_preprocessor(directory)
    directory = altered(demo_dir, tmp_path / "b", "config.json", image_size=96)
    with pytest.raises(ValueError, match="64 x 64 pixels, but the encoder of config.json takes 96 x 96"):
        open_preprocessor(directory)


def test_a_border_narrower_than_a_patch_has_no_token(demo_dir, tmp_path):
    preprocessor = open_preprocessor(altered(demo_dir, tmp_path, "config.json", patch_size=14))
    assert preprocessor.grid(640, 480) == (4, 4)  # 64 = 4 * 14 + 8
