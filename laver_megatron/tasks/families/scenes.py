"""Shapes on a grid: how many there are, where they are, and which colour goes with which shape."""

from __future__ import annotations

from random import Random

from laver_megatron.tasks.drawing import COLOURS, SHAPES
from laver_megatron.tasks.grid import Cell, cells, in_cell, scatter
from laver_megatron.tasks.question import Question, Request, answer_one_of

_MOST = 6  # shapes to count
_PLACES = {
    (column, row): f"{vertical} {horizontal}".strip() or "middle"
    for row, vertical in enumerate(("top", "", "bottom"))
    for column, horizontal in enumerate(("left", "", "right"))
}
Look = tuple[str, str]  # (shape, colour)


def counting(request: Request) -> Question:
    """How many shapes: alike (level 1), of several colours (2) and kinds (3); of one kind among others (4); of one
    kind and colour among those that share one of the two (5)."""
    choose, place, level = request.choose, request.place, request.level
    answer, chance = answer_one_of(choose, [str(number) for number in range(1, _MOST + 1)])
    number = int(answer)
    shape, colour = choose.choice(SHAPES), choose.choice(list(COLOURS))
    if level <= 3:
        looks = [
            (shape if level < 3 else place.choice(SHAPES), colour if level < 2 else place.choice(list(COLOURS)))
            for _ in range(number)
        ]
        asked = "shapes"
    elif level == 4:
        others = [(_other(place, SHAPES, shape), place.choice(list(COLOURS))) for _ in range(place.randint(2, 6))]
        looks = [(shape, place.choice(list(COLOURS))) for _ in range(number)] + others
        asked = _plural(shape)
    else:
        looks = [(shape, colour)] * number + _sharing(place, shape, colour, place.randint(3, 8))
        asked = f"{colour} {_plural(shape)}"
    return Question(f"How many {asked} are there?", answer, scatter(place, looks, 4, request.size), chance)


def position(request: Request) -> Question:
    """In which corner the shape is (level 1), in which of nine places (2), among other shapes (3); on which side of
    another (4); which of three in a row is between the others (5)."""
    choose, place, size = request.choose, request.place, request.size
    shape, colour = choose.choice(SHAPES), choose.choice(list(COLOURS))
    if request.level <= 3:
        corners_only = request.level == 1
        where = {cell: name for cell, name in _PLACES.items() if not corners_only or 1 not in cell}
        answer, chance = answer_one_of(choose, list(where.values()))
        cell = next(cell for cell, name in where.items() if name == answer)
        marks = [in_cell(place, shape, colour, cell, 3, size)]
        others = place.sample([it for it in cells(3) if it != cell], 0 if request.level < 3 else place.randint(2, 5))
        for other in others:
            look = _other(place, SHAPES, shape), place.choice(list(COLOURS))
            marks.append(in_cell(place, *look, other, 3, size))
        return Question(
            f"In which {'corner' if corners_only else 'place'} is the {shape}?", answer, tuple(marks), chance
        )
    return _side(request, shape, colour) if request.level == 4 else _between(request)


def _side(request: Request, shape: str, colour: str) -> Question:
    """Two shapes, apart in both directions."""
    choose, place, size = request.choose, request.place, request.size
    axis = choose.randrange(2)
    words = (("left", "right"), ("above", "below"))[axis]
    answer, chance = answer_one_of(choose, words)
    other = _other(choose, SHAPES, shape)
    low, high = sorted(place.sample(range(4), 2))
    across = place.sample(range(4), 2)
    along = (low, high) if answer == words[0] else (high, low)
    both: list[Cell] = list(zip(along, across, strict=True) if axis == 0 else zip(across, along, strict=True))
    marks = [
        in_cell(place, shape, colour, both[0], 4, size),
        in_cell(place, other, place.choice(list(COLOURS)), both[1], 4, size),
    ]
    rest = [it for it in SHAPES if it not in (shape, other)]
    for cell in place.sample([it for it in cells(4) if it not in both], 3):
        marks.append(in_cell(place, place.choice(rest), place.choice(list(COLOURS)), cell, 4, size))
    side = "to the left or to the right of" if axis == 0 else "above or below"
    return Question(f"Is the {shape} {side} the {other}?", answer, tuple(marks), chance)


def _between(request: Request) -> Question:
    """Three shapes of the same kind in one row or column, of different colours, and others elsewhere."""
    choose, place = request.choose, request.place
    first, last = choose.sample(list(COLOURS), 2)
    answer, chance = answer_one_of(choose, [it for it in COLOURS if it not in (first, last)])
    line, along = place.randrange(4), sorted(place.sample(range(4), 3))
    ends = [first, last]
    place.shuffle(ends)
    is_row = place.random() < 0.5
    looks = zip(along, (ends[0], answer, ends[1]), strict=True)
    shape = place.choice(SHAPES)
    marks = [
        in_cell(place, shape, colour, (step, line) if is_row else (line, step), 4, request.size)
        for step, colour in looks
    ]
    free = [cell for cell in cells(4) if cell[1 if is_row else 0] != line]
    spare = [it for it in COLOURS if it not in (first, last)]
    for cell in place.sample(free, 3):
        marks.append(in_cell(place, place.choice(SHAPES), place.choice(spare), cell, 4, request.size))
    return Question(f"Which colour is between {first} and {last}?", answer, tuple(marks), chance)


def conjunction(request: Request) -> Question:
    """The colour of a shape, or the shape of a colour, among others (2 at level 1, 5 at 2); whether a shape of this
    colour is there, among those that share one of the two (4, 7 and 11 at levels 3, 4 and 5)."""
    choose, place = request.choose, request.place
    shape, colour = choose.choice(SHAPES), choose.choice(list(COLOURS))
    num_others = (2, 5, 4, 7, 11)[request.level - 1]
    if request.level <= 2:
        if choose.random() < 0.5:
            question, answers, answer = f"What colour is the {shape}?", list(COLOURS), colour
        else:
            question, answers, answer = f"What shape is {colour}?", list(SHAPES), shape
        others = [(_other(place, SHAPES, shape), _other(place, list(COLOURS), colour)) for _ in range(num_others)]
        chance = 1 / len(answers)
        return Question(question, answer, scatter(place, [(shape, colour), *others], 4, request.size), chance)
    answer, chance = answer_one_of(choose, ("yes", "no"))
    looks = _sharing(place, shape, colour, num_others)
    looks += [(shape, colour)] if answer == "yes" else _sharing(place, shape, colour, 1)
    return Question(f"Is there a {colour} {shape}?", answer, scatter(place, looks, 4, request.size), chance)


def _other(random: Random, values: tuple[str, ...] | list[str], than: str) -> str:
    return random.choice([value for value in values if value != than])


def _plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _sharing(place: Random, shape: str, colour: str, number: int) -> list[Look]:
    """Looks that have the shape or the colour, in turn, and never both."""
    first = place.randrange(2)
    return [
        (shape, _other(place, list(COLOURS), colour)) if step % 2 == first else (_other(place, SHAPES, shape), colour)
        for step in range(number)
    ]
