import io
import json
import shutil

import pytest
import torch
from PIL import Image
from transformers import SiglipVisionModel

from laver_megatron.data.images import ImagePreprocessor, decode_image
from tests.unit.data.content import picture_bytes


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
    with pytest.raises(OSError, match="cannot decode a picture"):
        decode_image(content)


def altered(demo_dir, tmp_path, name, **changes):
    directory = tmp_path / "encoder"
    shutil.copytree(demo_dir / "encoder", directory)
    settings = json.loads((directory / name).read_text())
    (directory / name).write_text(json.dumps({**settings, **changes}))
    return directory


def test_encoders_that_do_not_fit(demo_dir, tmp_path):
    with pytest.raises(ValueError, match="has no config.json"):
        ImagePreprocessor.from_pretrained(tmp_path)
    size = {"shortest_edge": 64}
    directory = altered(demo_dir, tmp_path / "a", "preprocessor_config.json", size=size)
    with pytest.raises(ValueError, match="no fixed height and width"):
        ImagePreprocessor.from_pretrained(directory)
    directory = altered(demo_dir, tmp_path / "b", "config.json", image_size=96)
    with pytest.raises(ValueError, match="64 pixels, but the encoder of config.json takes 96"):
        ImagePreprocessor.from_pretrained(directory)


def test_a_border_narrower_than_a_patch_has_no_token(demo_dir, tmp_path):
    preprocessor = ImagePreprocessor.from_pretrained(altered(demo_dir, tmp_path, "config.json", patch_size=14))
    assert preprocessor.grid(640, 480) == (4, 4)  # 64 = 4 * 14 + 8
