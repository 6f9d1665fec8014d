"""Pictures of the task families, and in words what was drawn: short captions that are true of a picture, for the
contrastive training of an encoder (`red circle`, `circle top left`, `sign 2 K`), and one description of all of it, from
which a language model learns to look.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from random import Random

from laver_megatron.data.read.conversations import IMAGE_PLACEHOLDER
from laver_megatron.demo.contrastive import Captioned
from laver_megatron.demo.questions import Example
from laver_megatron.tasks.drawing import COLOURS, OUTLINES, SHAPES, Mark, draw
from laver_megatron.tasks.grid import cells, in_cell
from laver_megatron.tasks.question import LEVELS, TRAIN
from laver_megatron.tasks.sample import Task, TaskSettings, make_task

PLACES = tuple(f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right"))
_SEED = 99_991  # no set that is made for training has it by accident
_MOST_COUNTED = 9


def make_scenes(count: int, size: int) -> list[Captioned]:
    """Pictures of `size` pixels from the training splits of all families and levels."""
    return [_captioned(task.question.marks, size, task.ground) for task in _tasks(_SEED, count, size)]


def make_descriptions(count: int, size: int) -> list[Example]:
    """Pictures as those of `make_scenes`, with a conversation of one turn that describes them."""
    return [
        Example(
            (draw(task.question.marks, size, task.ground),),
            [
                {"from": "human", "value": f"{IMAGE_PLACEHOLDER}\nDescribe."},
                {"from": "gpt", "value": description_of(task.question.marks, size)},
            ],
        )
        for task in _tasks(_SEED + 1, count, size)
    ]


def _tasks(seed: int, count: int, size: int) -> Iterator[Task]:
    settings = TaskSettings(seed, count, 1, levels=LEVELS, image_size=size)
    return (make_task(settings, TRAIN, number) for number in range(count))


def make_single_shapes(count: int, size: int) -> list[tuple[Captioned, tuple[int, str, str]]]:
    """Pictures of one shape in one of nine cells, with (cell, colour, shape): what a probe can be asked about."""
    found = []
    for number in range(count):
        rng = Random(f"single {number}")
        cell, colour, shape = rng.randrange(9), rng.choice(list(COLOURS)), rng.choice(SHAPES)
        mark = in_cell(rng, shape, colour, cells(3)[cell], 3, size)
        found.append((_captioned([mark], size, rng.randint(10, 50)), (cell, colour, shape)))
    return found


def _captioned(marks: Sequence[Mark], size: int, ground: int) -> Captioned:
    return Captioned(draw(marks, size, ground), tuple(sorted(captions_of(marks, size))))


def description_of(marks: Sequence[Mark], size: int) -> str:
    """All marks of a picture: texts, bars from left to right with their heights, shapes by their place."""
    texts = [f"text {mark.text}" for mark in marks if mark.kind == "text"]
    unit = (size - 4) // 6  # pixels of a chart's step
    bars = [f"{mark.colour} {round(mark.height / unit)}" for mark in marks if mark.kind == "bar"]
    shapes = sorted((_place_of(mark, size), f"{mark.colour} {mark.kind}") for mark in marks if mark.kind in OUTLINES)
    return ", ".join([*texts, *bars, *(f"{PLACES[place]} {thing}" for place, thing in shapes)])


def _place_of(mark: Mark, size: int) -> int:
    """Which of PLACES a mark's middle is in."""
    column, row = (3 * (corner + mark.width // 2) // size for corner in (mark.x, mark.y))
    return 3 * row + column


def captions_of(marks: Sequence[Mark], size: int) -> set[str]:
    """All captions of a picture of these marks."""
    bars = [mark for mark in marks if mark.kind == "bar"]
    shapes = [mark for mark in marks if mark.kind in OUTLINES]
    texts = [mark for mark in marks if mark.kind == "text"]
    return {*_of_bars(bars), *_of_shapes(shapes, size), *(caption for mark in texts for caption in _of_text(mark))}


def _of_shapes(marks: Sequence[Mark], size: int) -> Iterator[str]:
    things: Counter[str] = Counter()
    for mark in marks:
        place, thing = PLACES[_place_of(mark, size)], f"{mark.colour} {mark.kind}"
        yield from (thing, f"{thing} {place}", f"{mark.colour} {place}", f"{mark.kind} {place}")
        things.update({thing: 1, mark.kind: 1, mark.colour: 1, "shapes": 1})
    yield from (f"count {min(number, _MOST_COUNTED)} {thing}" for thing, number in things.items())


def _of_text(mark: Mark) -> Iterator[str]:
    yield from (f"text {mark.text}", f"{mark.colour} text")
    for place, sign in enumerate(mark.text, start=1):
        yield from (f"sign {sign}", f"sign {place} {sign}", f"last {len(mark.text) - place} {sign}")
    yield from (f"{a} before {b}" for a, b in zip(mark.text, mark.text[1:], strict=False))


def _of_bars(marks: Sequence[Mark]) -> Iterator[str]:
    heights = [mark.height for mark in marks]
    for place, mark in enumerate(marks, start=1):
        yield from (f"{mark.colour} bar", f"bar {place} {mark.colour}", f"{mark.colour} height {mark.height}")
        if heights.count(mark.height) == 1 and mark.height in (max(heights), min(heights)):
            yield f"{'tallest' if mark.height == max(heights) else 'shortest'} bar {mark.colour}"
