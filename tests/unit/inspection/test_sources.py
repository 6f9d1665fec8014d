"""What the models of a page are called."""

import json

import pytest

from laver_megatron.inspection.sources import find_sources


def names(directory, *places):
    for place in places:
        (directory / place).mkdir(parents=True)
        (directory / place / "config.json").write_text(json.dumps({"model_type": "llava"}))
    return [source.name for source in find_sources([directory / place for place in places])]


@pytest.mark.parametrize(
    "places, expected",
    [
        (("cpu-base-seed1", "cpu-mim-seed1", "cpu-mim-cga-seed1"), ["base", "mim", "mim-cga"]),
        (("mim-seed1", "mim-ga-seed1", "mim-cga-seed1"), ["mim", "mim-ga", "mim-cga"]),
        (("mim-seed1", "mim-seed2"), ["seed1", "seed2"]),
        (("lr-1e-3", "lr-1e-4"), ["1e-3", "1e-4"]),
        (("x--", "x-y"), ["x--", "x-y"]),
        (("mim", "mim-cga"), ["mim", "mim-cga"]),  # one word has to be left
        (("alone-here",), ["alone-here"]),
        (("laver", "llava-clip"), ["laver", "llava-clip"]),
    ],
)
def test_what_all_have_in_common_is_left_out(tmp_path, places, expected):
    assert names(tmp_path, *places) == expected


def test_the_same_folder_in_two_places(tmp_path):
    assert names(tmp_path, "one/export", "two/export") == ["one", "two"]
