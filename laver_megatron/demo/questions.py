"""Questions whose answers are determined by the picture: what it shows, its colour and light, where a square
is, what a sign reads, how two pictures compare. Few templates, so that a tiny model learns them quickly.
"""

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont, ImageStat

from laver_megatron.demo.photographs import photographs

_WORDS = (
    "APPLE", "BRIDGE", "CLOUD", "DRAGON", "EIGHT", "FOREST", "GARDEN", "HARBOR", "ISLAND", "JUNGLE", "KNIGHT", "LEMON",
    "MARKET", "NORTH",
)  # fmt: skip
_SQUARES = {"red": (220, 30, 30), "green": (30, 170, 50), "blue": (40, 60, 220), "yellow": (240, 220, 40)}
_CORNERS = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}
_FACTS = {
    "How many days does a week have?": "A week has seven days.",
    "How many legs does a cat have?": "A cat has four legs.",
    "What colour is grass?": "Grass is green.",
    "What is two plus three?": "Two plus three is five.",
    "What comes after Monday?": "Tuesday comes after Monday.",
}


@dataclass(frozen=True)
class Example:
    """One sample: its pictures, and turns as {"from": human|gpt|system, "value": text}."""

    images: tuple[Image.Image, ...]
    conversation: list[dict[str, str]]


def make_examples(first: int, count: int) -> list[Example]:
    """Examples number `first` to `first + count`; each depends on its number alone."""
    return [_example(number) for number in range(first, first + count)]


def _example(number: int) -> Example:
    rng = random.Random(number)
    makers = (_about_photograph, _about_photograph, _about_square, _about_sign, _about_pair, _about_nothing)
    example = makers[number % len(makers)](rng)
    if rng.random() < 0.1:
        example.conversation.insert(0, {"from": "system", "value": "Answer in one short sentence."})
    return example


def _turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": text} for pair in pairs for role, text in zip(("human", "gpt"), pair, strict=True)]


def _about_photograph(rng: random.Random) -> Example:
    shows, picture = _crop(rng)
    pairs = [
        ("What is in the picture?", f"The picture shows {shows}."),
        ("What is the main colour?", f"The main colour is {main_colour(picture)}."),
        ("Is it bright or dark?", f"The picture is {brightness(picture)}."),
    ]
    pairs = rng.sample(pairs, rng.choice((1, 1, 2, 3)))
    question, answer = pairs[0]
    pairs[0] = (f"<image>\n{question}" if rng.random() < 0.8 else f"{question}\n<image>", answer)
    return Example((picture,), _turns(*pairs))


def _about_square(rng: random.Random) -> Example:
    _, picture = _crop(rng)
    (colour, rgb), (corner, (x, y)) = rng.choice(list(_SQUARES.items())), rng.choice(list(_CORNERS.items()))
    side = min(picture.size) // 3
    left, top = x * (picture.width - side), y * (picture.height - side)
    picture.paste(rgb, (left, top, left + side, top + side))
    question = "<image>\nWhere is the square, and what colour is it?"
    return Example((picture,), _turns((question, f"The {colour} square is at the {corner}.")))


def _about_sign(rng: random.Random) -> Example:
    word = rng.choice(_WORDS)
    ink, paper = rng.choice((("black", "white"), ("white", "navy"), ("darkred", "ivory")))
    picture = Image.new("RGB", (rng.randrange(120, 180), rng.randrange(60, 120)), paper)
    font = ImageFont.load_default(size=24)
    middle = (picture.width / 2, picture.height / 2)
    ImageDraw.Draw(picture).text(middle, word, fill=ink, font=font, anchor="mm")
    return Example((picture,), _turns(("<image>\nWhat does the sign say?", f'The sign says "{word}".')))


def _about_pair(rng: random.Random) -> Example:
    (first_shows, first), (second_shows, second) = _crop(rng), _crop(rng)
    if rng.random() < 0.5:
        brighter = "first" if _luminance(first) > _luminance(second) else "second"
        pair = ("<image>\n<image>\nWhich picture is brighter?", f"The {brighter} picture is brighter.")
    else:
        pair = (
            "The first picture: <image>\nThe second picture: <image>\nWhat do they show?",
            f"The first picture shows {first_shows}, the second one {second_shows}.",
        )
    return Example((first, second), _turns(pair))


def _about_nothing(rng: random.Random) -> Example:
    return Example((), _turns(*rng.sample(list(_FACTS.items()), rng.choice((1, 2)))))


def _crop(rng: random.Random) -> tuple[str, Image.Image]:
    """A large part of a photograph, sometimes mirrored, 80 to 160 pixels on its sides."""
    shows, photograph = rng.choice(photographs())
    width, height = (int(side * rng.uniform(0.6, 1.0)) for side in photograph.size)
    left, top = rng.randint(0, photograph.width - width), rng.randint(0, photograph.height - height)
    size = (rng.randrange(80, 161), rng.randrange(80, 161))
    picture = photograph.resize(size, Image.Resampling.BICUBIC, (left, top, left + width, top + height))
    return shows, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else picture


def brightness(picture: Image.Image) -> str:
    """`dark`, `bright`, or `neither bright nor dark`, by the mean luminance."""
    luminance = _luminance(picture)
    return "dark" if luminance < 85 else "bright" if luminance > 150 else "neither bright nor dark"


def main_colour(picture: Image.Image) -> str:
    """The mean colour's name: grey where it is nearly without colour, else by its hue."""
    mean = tuple(round(value) for value in ImageStat.Stat(picture).mean)
    pixel = Image.new("RGB", (1, 1), mean).convert("HSV").getpixel((0, 0))
    assert isinstance(pixel, tuple)
    hue, saturation, value = pixel
    if value < 40:
        return "black"
    if saturation < 40:
        return "white" if value > 200 else "grey"
    red = "red" if saturation > 150 else "brown"
    names = ((21, red), (43, "yellow"), (120, "green"), (180, "blue"), (235, "purple"))
    return next((name for limit, name in names if hue < limit), "red")


def _luminance(picture: Image.Image) -> float:
    return ImageStat.Stat(picture.convert("L")).mean[0]
