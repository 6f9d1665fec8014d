"""Faults of a sharding are found, each by its own sentence; a sound one has none."""

from dataclasses import replace

import pytest

from laver_megatron.planning.sharding import Tile, division_problems, tiling_problems

EXPECTED = {"a": (4, 6)}
# Two rows of two pieces, and a copy of the last.
SOUND = [
    Tile("a", (4, 6), (0, 0), (2, 3), True),
    Tile("a", (4, 6), (0, 3), (2, 3), True),
    Tile("a", (4, 6), (2, 0), (2, 3), True),
    Tile("a", (4, 6), (2, 3), (2, 3), True),
    Tile("a", (4, 6), (2, 3), (2, 3), False),
]


def changed(index, **values):
    return [replace(tile, **values) if i == index else tile for i, tile in enumerate(SOUND)]


def test_a_sound_tiling():
    assert list(tiling_problems(SOUND, EXPECTED)) == []


@pytest.mark.parametrize(
    "tiles, expected, sentence",
    [
        (SOUND[:3], EXPECTED, "hold 18 values of 24"),
        (changed(3, start=(1, 3)), EXPECTED, "overlap"),
        (changed(0, start=(2, 0)), EXPECTED, "overlap"),
        (changed(3, is_main=False), EXPECTED, "is a copy of none"),
        (changed(4, is_main=True), EXPECTED, "overlap"),
        (changed(3, start=(3, 3)), EXPECTED, "reaches out of (4, 6)"),
        (changed(1, whole=(4, 7)), EXPECTED, "the ranks take it to be of size [(4, 6), (4, 7)], but it is (4, 6)"),
        (SOUND, {**EXPECTED, "b": (3,)}, "b: no rank holds any of it"),
        (SOUND, {}, "a: a tensor that the model does not have"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_faults(tiles, expected, sentence):
    problems = list(tiling_problems(tiles, expected))
    assert any(sentence in problem for problem in problems), problems


@pytest.mark.parametrize(
    "parts, sentence",
    [
        ([(0, 4), (6, 10)], "leave out values near 6"),
        ([(0, 6), (4, 10)], "share values near 4"),
        ([(0, 4), (4, 9)], "hold 9 of 10"),
        ([(0, 0)], "hold 0 of 10"),
    ],
)
def test_faulty_divisions(parts, sentence):
    assert sentence in " ".join(division_problems("p", 10, parts))


def test_a_sound_division():
    assert list(division_problems("p", 10, [(4, 10), (0, 0), (0, 4)])) == []
