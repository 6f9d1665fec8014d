"""The image processor's settings, in either of the files that transformers writes."""

import json

import pytest
import torch
from transformers import AutoImageProcessor, LlavaProcessor

from laver_megatron.demo.encoders import KINDS
from laver_megatron.encoders import encoder_facts, open_preprocessor
from laver_megatron.hf.files import copy_model_files, read_image_processor
from laver_megatron.hf.shape import VISION_PART
from laver_megatron.hf.tokenizer import load_tokenizer
from tests.encoders import altered, pictures

OLD, NEW = "preprocessor_config.json", "processor_config.json"


@pytest.fixture
def saved(encoders, demo_dir, tmp_path):
    """saved(kind) -> an encoder's directory as transformers 5 writes a processor: processor_config.json alone."""

    def saved_(kind):
        directory = altered(encoders[kind], tmp_path / kind, OLD)
        image_processor = AutoImageProcessor.from_pretrained(directory, backend="pil", local_files_only=True)
        (directory / OLD).unlink()
        LlavaProcessor(image_processor, load_tokenizer(demo_dir / "model"), patch_size=8).save_pretrained(directory)
        assert (directory / NEW).is_file() and not (directory / OLD).exists()
        return directory

    return saved_


def assert_same_pixels(directory, other):
    ours, theirs = open_preprocessor(directory), open_preprocessor(other)
    assert ours.settings == theirs.settings
    assert all(torch.equal(ours(picture), theirs(picture)) for picture in pictures())


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_the_same_from_either_file(encoders, saved, tmp_path, kind):
    directory = saved(kind)
    assert read_image_processor(directory)[0] == directory / NEW
    assert_same_pixels(directory, encoders[kind])
    assert encoder_facts(directory) == encoder_facts(encoders[kind])
    copy_model_files(directory, tmp_path / "checkpoint", VISION_PART)
    assert (tmp_path / "checkpoint" / OLD).is_file() and not (tmp_path / "checkpoint" / NEW).exists()
    assert_same_pixels(tmp_path / "checkpoint", encoders[kind])


def test_the_file_that_transformers_prefers(encoders, saved):
    directory = saved("clip")
    other = json.loads((encoders["clip"] / OLD).read_text()) | {"image_mean": [0.1, 0.2, 0.3]}
    (directory / OLD).write_text(json.dumps(other))
    mean = list(AutoImageProcessor.from_pretrained(directory, backend="pil").image_mean)
    assert list(open_preprocessor(directory).processor.image_mean) == mean != other["image_mean"]
    # A processor's own settings without an image processor's in them.
    content = json.loads((directory / NEW).read_text())
    del content["image_processor"]
    (directory / NEW).write_text(json.dumps(content))
    assert list(open_preprocessor(directory).processor.image_mean) == other["image_mean"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"patch_size": 8}', f"no {OLD} in it, and no {NEW} with an image_processor"),
        ('{"image_processor": null}', f"{NEW}: image_processor is None, but must be the settings"),
        ("{", f"{NEW} cannot be read"),
        ("[]", f"{NEW} is not a JSON object"),
    ],
)
def test_a_file_without_settings(saved, content, expected):
    directory = saved("clip")
    (directory / NEW).write_text(content)
    with pytest.raises(ValueError, match=expected):
        open_preprocessor(directory)


def test_faults_name_the_file_that_was_read(saved):
    directory = saved("siglip")
    content = json.loads((directory / NEW).read_text())
    content["image_processor"]["image_std"] = [0.5, 0.0, 0.5]
    (directory / NEW).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{NEW}: image_std is"):
        open_preprocessor(directory)
