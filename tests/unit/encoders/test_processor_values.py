"""Image processors that do not match their encoder, and values of which no pixels can be made."""

import shutil

import pytest

from laver_megatron.encoders import open_preprocessor
from tests.encoders import altered

PROCESSOR = "preprocessor_config.json"
NATIVE_REMEDY = ".* native resolution; set do_center_crop to false, remove size, and say max_pixels instead"


@pytest.mark.parametrize(
    ("encoder", "processor", "expected"),
    [
        ("siglip", "clip", "is CLIPImageProcessor, .* siglip_vision_model comes with SiglipImageProcessor"),
        ("clip", "siglip", "is SiglipImageProcessor, .* clip_vision_model comes with CLIPImageProcessor"),
        ("clip", "dinov2", "is BitImageProcessor, .* comes with CLIPImageProcessor"),
        ("dinov2", "clip", "is CLIPImageProcessor, .* dinov2 comes with BitImageProcessor"),
        ("dinov2_with_registers", "siglip", "is SiglipImageProcessor, .* comes with BitImageProcessor"),
        ("aimv2", "siglip", "is SiglipImageProcessor, .* comes with CLIPImageProcessor or Aimv2ImageProcessor"),
        ("aimv2", "dinov2", "is BitImageProcessor"),
        ("patches", "siglip", "is SiglipImageProcessor, .* laver_patches comes with CLIPImageProcessor"),
        ("qwen2_5_vl", "clip", "is CLIPImageProcessor, .* comes with Qwen2VLImageProcessor"),
        ("aimv2", "clip", "images are cropped" + NATIVE_REMEDY),
        ("patches", "clip", "images are cropped" + NATIVE_REMEDY),
    ],
)
def test_processors_of_other_encoders(encoders, tmp_path, encoder, processor, expected):
    directory = shutil.copytree(encoders[encoder], tmp_path / "mixed")
    shutil.copy(encoders[processor] / PROCESSOR, directory / PROCESSOR)
    with pytest.raises(ValueError, match=f"mixed/{PROCESSOR}: .*{expected}"):
        open_preprocessor(directory)


@pytest.mark.parametrize("kind", ["aimv2", "patches"])
def test_native_resolution_has_no_fixed_size(encoders, tmp_path, kind):
    """The processor of a CLIP does for one of native resolution, but not its sizes."""
    size = {"height": 64, "width": 64}
    fixed = altered(encoders[kind], tmp_path / "fixed", PROCESSOR, size=size)
    with pytest.raises(ValueError, match=f"{PROCESSOR}: size makes every image 64 x 64 pixels{NATIVE_REMEDY}"):
        open_preprocessor(fixed)
    silent = altered(encoders[kind], tmp_path / "silent", PROCESSOR, do_center_crop=None)
    with pytest.raises(ValueError, match="images are cropped .*which is on unless the file says false"):
        open_preprocessor(silent)
    shorter = altered(encoders[kind], tmp_path / "shorter", PROCESSOR, size={"shortest_edge": 32}, crop_size=size)
    assert open_preprocessor(shorter).settings == open_preprocessor(encoders[kind]).settings


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("aimv2", {"max_pixels": "many"}, "max_pixels is 'many', but must be a positive integer"),
        ("patches", {"max_pixels": [1]}, r"max_pixels is \[1\], but must be a positive integer"),
        ("aimv2", {"max_pixels": 0}, "max_pixels is 0, but must be a positive integer"),
        ("qwen2_5_vl", {"min_pixels": "few"}, "min_pixels is 'few', but must be a positive integer"),
        ("qwen2_5_vl", {"max_pixels": [1]}, r"max_pixels is \[1\], but must be a positive integer"),
        ("siglip", {"image_std": [0.5, 0, 0.5]}, r"image_std is \[0.5, 0, 0.5\], but must be three .* above 0"),
        ("clip", {"image_std": [0.5, float("nan"), 0.5]}, "image_std is .*nan"),
        ("aimv2", {"image_std": [0.5, 0.5]}, r"image_std is \[0.5, 0.5\], but must be three numbers"),
        ("dinov2", {"image_mean": [0.5] * 4}, "image_mean is .*, but must be three numbers, .* all finite"),
        ("dinov2", {"image_mean": "grey"}, "image_mean is 'grey'"),
        ("clip", {"rescale_factor": 0}, "rescale_factor is 0, but must be a number above 0"),
        ("clip", {"resample": 9}, r"resample is 9, but Pillow's are 0 \(nearest\), .*3 \(bicubic\)"),
        ("qwen2_5_vl", {"resample": -1}, "resample is -1"),
        ("dinov2", {"crop_size": {"height": "64", "width": 64}}, "height '64' and width 64 must be positive integers"),
    ],
)
def test_values_that_cannot_be(encoders, tmp_path, kind, changes, expected):
    directory = altered(encoders[kind], tmp_path / "odd", PROCESSOR, **changes)
    with pytest.raises(ValueError, match=f"odd/{PROCESSOR}: {expected}"):
        open_preprocessor(directory)


def test_one_deviation_for_all_colours(encoders, tmp_path):
    directory = altered(encoders["clip"], tmp_path / "one", PROCESSOR, image_std=0.5, image_mean=0.5)
    assert open_preprocessor(directory).most_tokens == 64
