"""Questions whose likely answer, known from training, is wrong in the validation set.

In training the likely answer is right in four samples of five, and the other answers share the rest. In validation it
is never right, and the others are equally likely: who follows what training texts say gets nothing.
"""

from __future__ import annotations

from laver_megatron.tasks.drawing import COLOURS, SHAPES
from laver_megatron.tasks.grid import in_cell, scatter
from laver_megatron.tasks.question import TRAIN, Question, Request

_NONE = "none"  # what is asked for is not in the picture
LIKELY_SHARE = 0.8
LIKELY_COLOURS = {
    "banana": "yellow", "carrot": "orange", "leaf": "green", "sun": "yellow", "cloud": "white", "heart": "red",
}  # fmt: skip
LIKELY_COUNTS = {"circle": "1", "cross": "2", "triangle": "3", "square": "4"}
_COUNTS = (_NONE, "1", "2", "3", "4", "5")


def prior(request: Request) -> Question:
    """The colour of a thing that has a usual one, or how many shapes there are of a kind that has a usual number; or
    neither is there. Among 0 (level 1) to 4 (5) others."""
    choose, place, level, size = request.choose, request.place, request.level, request.size
    if choose.random() < 0.5:
        thing, likely = choose.choice(list(LIKELY_COLOURS.items()))
        answer, chance = _skewed(request, likely, (*COLOURS, _NONE))
        rest = [it for it in LIKELY_COLOURS if it != thing]
        shown = place.choice(rest) if answer == _NONE else thing
        colour = place.choice(list(COLOURS)) if answer == _NONE else answer
        looks = [(shown, colour)] + [(place.choice(rest), place.choice(list(COLOURS))) for _ in range((level - 1) // 2)]
        cells = place.sample([(0, 0), (1, 0), (0, 1), (1, 1)], len(looks))
        marks = tuple(in_cell(place, *look, cell, 2, size, 0.8) for look, cell in zip(looks, cells, strict=True))
        return Question(f"What colour is the {thing}?", answer, marks, chance)
    shape, likely = choose.choice(list(LIKELY_COUNTS.items()))
    answer, chance = _skewed(request, likely, _COUNTS)
    number = 0 if answer == _NONE else int(answer)
    others = [it for it in SHAPES if it != shape]
    looks = [(shape, place.choice(list(COLOURS))) for _ in range(number)]
    looks += [(place.choice(others), place.choice(list(COLOURS))) for _ in range(max(level - 1, 1 - number))]
    question = f"What number of {'crosses' if shape == 'cross' else shape + 's'} do you see?"
    return Question(question, answer, scatter(place, looks, 4, size), chance)


def _skewed(request: Request, likely: str, answers: tuple[str, ...]) -> tuple[str, float]:
    others = [answer for answer in answers if answer != likely]
    is_likely = request.split == TRAIN and request.choose.random() < LIKELY_SHARE
    return likely if is_likely else request.choose.choice(others), 1 / len(answers)
