"""One sample of a set, made from the settings, its split and its number."""

from __future__ import annotations

import io
from dataclasses import dataclass
from random import Random
from typing import Any

from laver_megatron.data.read.conversations import IMAGE_PLACEHOLDER
from laver_megatron.tasks.drawing import LARGEST_SIZE, SMALLEST_SIZE, draw
from laver_megatron.tasks.families import FAMILIES
from laver_megatron.tasks.question import LEVELS, Question, Request

_MOST_ATTEMPTS = 10_000  # one layout in five is of the validation set
_DARKEST, _LIGHTEST = 10, 50  # grey levels of the ground


@dataclass(frozen=True)
class TaskSettings:
    """What a set is made of.

    Attributes:
        num_train, num_valid: samples.
        levels: difficulties, equally frequent.
        image_size: side of a picture in pixels.

    Raises:
        ValueError: a value out of its range.
    """

    seed: int
    num_train: int
    num_valid: int
    families: tuple[str, ...] = tuple(FAMILIES)
    levels: tuple[int, ...] = (1, 2, 3)
    image_size: int = 64

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed} must not be negative")
        for flag, number in (("--train", self.num_train), ("--valid", self.num_valid)):
            if number < 1:
                raise ValueError(f"{flag} {number} must be a positive number of samples")
        if unknown := [name for name in self.families if name not in FAMILIES]:
            raise ValueError(f"--families {' '.join(unknown)}: unknown; choose from {', '.join(FAMILIES)}")
        if unknown_levels := [level for level in self.levels if level not in LEVELS]:
            raise ValueError(f"--difficulty {' '.join(map(str, unknown_levels))} must be 1 to {LEVELS[-1]}")
        for flag, values in (("--families", self.families), ("--difficulty", self.levels)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{flag} must name at least one, and each once, not {values}")
        if not SMALLEST_SIZE <= self.image_size <= LARGEST_SIZE:
            raise ValueError(f"--image-size {self.image_size} must be {SMALLEST_SIZE} to {LARGEST_SIZE} pixels")


@dataclass(frozen=True)
class Task:
    """One sample. ground: grey level behind the marks; size: of the picture in pixels."""

    key: str
    family: str
    level: int
    question: Question
    ground: int
    size: int

    def record(self, *, has_picture: bool) -> dict[str, Any]:
        """The content of KEY.json."""
        asked = f"{IMAGE_PLACEHOLDER}\n{self.question.question}" if has_picture else self.question.question
        return {
            "id": self.key,
            "family": self.family,
            "difficulty": self.level,
            "chance": round(self.question.chance, 6),
            "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": self.question.answer}],
        }

    def png(self) -> bytes:
        """The picture as a file."""
        buffer = io.BytesIO()
        draw(self.question.marks, self.size, self.ground).save(buffer, "PNG")
        return buffer.getvalue()


def make_task(settings: TaskSettings, split: str, number: int) -> Task:
    """Sample `number` of a split; it depends on the seed, the split and its number alone."""
    family = settings.families[number % len(settings.families)]
    begin = f"{settings.seed} {split} {number}"
    place = Random(f"{begin} place")
    level = place.choice(settings.levels)
    for _ in range(_MOST_ATTEMPTS):
        request = Request(Random(f"{begin} choose"), place, level, split, settings.image_size)
        question = FAMILIES[family](request)
        if question.split == split:
            return Task(
                f"{split}-{number:07d}", family, level, question, place.randint(_DARKEST, _LIGHTEST), request.size
            )
    raise AssertionError(f"{family}, level {level}: no layout of the split {split} for {question.question!r}")
