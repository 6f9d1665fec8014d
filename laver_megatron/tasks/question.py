"""What a family is asked for and what it answers with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import xxhash

from laver_megatron.tasks.drawing import Mark

TRAIN, VALID = "train", "valid"
LEVELS = (1, 2, 3, 4, 5)
_ONE_IN = 5  # of all layouts belong to the validation set


@dataclass(frozen=True)
class Request:
    """One sample to make.

    Attributes:
        choose: draws the question and its answer; begins anew at each attempt, so that both stay what they are.
        place: draws the layout; goes on from one attempt to the next.
        level: difficulty, 1 to 5.
        size: of the picture, in pixels.
    """

    choose: Random
    place: Random
    level: int
    split: str
    size: int


@dataclass(frozen=True)
class Question:
    """A question about marks. chance: the share of right answers of guessing among all that the question can have."""

    question: str
    answer: str
    marks: tuple[Mark, ...]
    chance: float

    @property
    def split(self) -> str:
        """The split that the picture belongs to, whatever the seed: by its text if it has one, else by kinds, places
        and sizes of its marks, without their colours."""
        texts = [mark.text for mark in self.marks if mark.text]
        if texts:
            return split_of_text(texts[0])
        shapes = sorted(f"{it.kind} {it.x} {it.y} {it.width} {it.height}" for it in self.marks if it.kind != "line")
        return _split(xxhash.xxh3_64_intdigest("|".join(shapes).encode()))


def split_of_text(text: str) -> str:
    """The split of a rendered text. Each has texts with any first and any last character, down to two digits."""
    return _split(sum(text.encode()))


def _split(number: int) -> str:
    return VALID if number % _ONE_IN == 0 else TRAIN


def answer_one_of(choose: Random, answers: Sequence[str]) -> tuple[str, float]:
    """An answer, all equally likely, and the share that guessing gets right."""
    return choose.choice(answers), 1 / len(answers)
