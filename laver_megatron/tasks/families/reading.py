"""Reading rendered words, letters and numbers, which are longer at higher levels."""

from __future__ import annotations

import string
from random import Random

from laver_megatron.tasks.drawing import COLOURS, Mark, text_width
from laver_megatron.tasks.question import Question, Request, answer_one_of, split_of_text

_LETTERS, _DIGITS = string.ascii_uppercase, string.digits
_WORDS = """
    ANT BAG BED BOX BUS CAP CAR CUP DOG EAR EGG FAN FOX HAT HEN ICE JAR KEY LEG MAP NUT OWL PEN PIG RUG SUN TOY VAN WEB
    BALL BIRD BOAT BOOK CAKE COAT CORN DESK DOOR DUCK FISH FROG GATE HAND HILL KITE LAMP LION MILK MOON NEST PARK RAIN
    APPLE BEACH BREAD CHAIR CLOCK CLOUD DANCE EARTH FLOOR FRUIT GLASS GRASS HORSE HOUSE KNIFE LEMON MOUSE NIGHT OCEAN
    ANIMAL BASKET BOTTLE BRIDGE BUTTER CASTLE CIRCLE DINNER DOCTOR FLOWER FOREST GARDEN GUITAR HAMMER ISLAND JACKET
"""


def text(request: Request) -> Question:
    """A word or a string of letters: what it says, or its first or last letter. Two letters at level 1, six at 5."""
    length = request.level + 1
    kind = request.choose.choice(("whole", "first", "last"))
    if kind == "whole":
        words = [word for word in _WORDS.split() if len(word) == length and split_of_text(word) == request.split]
        is_word = bool(words) and request.choose.random() < 0.5
        shown = request.place.choice(words) if is_word else _characters(request.place, _LETTERS, length)
        chance = 1 / len(_WORDS.split()) if is_word else len(_LETTERS) ** -length
        return Question("What does the text say?", shown, _centred(request, shown), chance)
    letter, chance = answer_one_of(request.choose, _LETTERS)
    shown = _with(letter, kind, _characters(request.place, _LETTERS, length - 1))
    return Question(f"Which letter is {kind}?", letter, _centred(request, shown), chance)


def digits(request: Request) -> Question:
    """A number: which it is, or its first or last digit. Two digits at level 1, six at 5."""
    length = request.level + 1
    kind = request.choose.choice(("whole", "first", "last"))
    if kind == "whole":
        shown = request.place.choice(_DIGITS[1:]) + _characters(request.place, _DIGITS, length - 1)
        chance = 1 / (9 * 10 ** (length - 1))
        return Question("What number is shown?", shown, _centred(request, shown), chance)
    answers = _DIGITS[1:] if kind == "first" else _DIGITS
    digit, chance = answer_one_of(request.choose, answers)
    rest = _characters(request.place, _DIGITS, length - 1)
    if kind == "last":
        rest = request.place.choice(_DIGITS[1:]) + rest[1:]
    return Question(f"Which digit is {kind}?", digit, _centred(request, _with(digit, kind, rest)), chance)


def _characters(place: Random, alphabet: str, length: int) -> str:
    return "".join(place.choice(alphabet) for _ in range(length))


def _with(character: str, where: str, rest: str) -> str:
    return character + rest if where == "first" else rest + character


def _centred(request: Request, shown: str) -> tuple[Mark, ...]:
    """The text near the middle, as large as fits."""
    size, place = request.size, request.place
    height = next(height for height in range(size // 2, 0, -1) if text_width(shown, height) <= 0.86 * size)
    x, y = (size // 2 + place.randint(-size // 32, size // 32), size // 2 + place.randint(-size // 6, size // 6))
    return (Mark("text", place.choice(list(COLOURS)), x, y, 0, height, shown),)
