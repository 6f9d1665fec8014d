"""Bar charts, and a small mark in a crowded picture."""

from __future__ import annotations

from laver_megatron.tasks.drawing import COLOURS, SHAPES, Mark
from laver_megatron.tasks.grid import cells, in_cell
from laver_megatron.tasks.question import Question, Request, answer_one_of

_HIGHEST = 6  # value of a bar
_QUARTERS = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}


def chart(request: Request) -> Question:
    """Bars over lines at 1, 2, ... 6: which is the tallest or the shortest, or a bar's value. Three bars at level 1,
    seven at 5."""
    choose, place, level = request.choose, request.place, request.level
    kind = choose.choice(("tallest", "shortest", "value"))
    colour, chance = answer_one_of(choose, list(COLOURS))
    others = place.sample([it for it in COLOURS if it != colour], level + 1)
    if kind == "value":
        answer, chance = answer_one_of(choose, [str(value) for value in range(1, _HIGHEST + 1)])
        own, values = int(answer), [place.randint(1, _HIGHEST) for _ in others]
        question = f"What is the value of the {colour} bar?"
    else:
        own = place.randint(2, _HIGHEST) if kind == "tallest" else place.randint(1, _HIGHEST - 1)
        below, above = (1, own - 1), (own + 1, _HIGHEST)
        values = [place.randint(*(below if kind == "tallest" else above)) for _ in others]
        question, answer = f"Which bar is the {kind}?", colour
    bars = [(colour, own), *zip(others, values, strict=True)]
    place.shuffle(bars)
    return Question(question, answer, _bars(bars, request.size), chance)


def _bars(bars: list[tuple[str, int]], size: int) -> tuple[Mark, ...]:
    unit, column = (size - 4) // _HIGHEST, size // len(bars)
    base = size - 2
    lines = [Mark("line", "line", 0, base - unit * value, size, 1) for value in range(_HIGHEST + 1)]
    width = max(column * 3 // 5, 3)
    left = (column - width) // 2
    return *lines, *(
        Mark("bar", colour, number * column + left, base - unit * value, width, unit * value)
        for number, (colour, value) in enumerate(bars)
    )


def detail(request: Request) -> Question:
    """A small dot among large grey shapes: its colour, or the quarter it is in. From a twelfth of the picture's side
    (level 1) to a twenty-first (5), among 4 to 12 shapes."""
    choose, place, level, size = request.choose, request.place, request.level, request.size
    quarter, quarter_chance = answer_one_of(choose, list(_QUARTERS))
    colour, colour_chance = answer_one_of(choose, list(COLOURS))
    column, row = (2 * half + place.randrange(2) for half in _QUARTERS[quarter])
    others = place.sample([cell for cell in cells(4) if cell != (column, row)], 2 + 2 * level)
    marks = [in_cell(place, place.choice(SHAPES), "grey", cell, 4, size, fill=0.8) for cell in others]
    fill = (0.33, 0.3, 0.26, 0.22, 0.19)[level - 1]
    marks.append(in_cell(place, "square", colour, (column, row), 4, size, fill=fill))
    if choose.random() < 0.5:
        return Question("What colour is the small dot?", colour, tuple(marks), colour_chance)
    return Question("In which quarter is the small dot?", quarter, tuple(marks), quarter_chance)
