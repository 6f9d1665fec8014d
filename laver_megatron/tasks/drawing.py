"""Pictures made of marks: filled shapes, bars, lines and text on a dark ground, without smoothing, so that what was
drawn can be counted in the pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

COLOURS = {
    "red": (225, 30, 30),
    "green": (30, 180, 60),
    "blue": (60, 90, 255),
    "yellow": (245, 225, 40),
    "purple": (170, 50, 200),
    "orange": (250, 140, 20),
    "white": (250, 250, 250),
}
_GREYS = {"grey": (110, 110, 110), "line": (90, 90, 90)}  # of clutter and of a chart's lines; never asked for
SHAPES = ("circle", "square", "triangle", "cross")
SMALLEST_SIZE, LARGEST_SIZE = 48, 1024  # of a picture, in pixels: six letters need 48

Outline = Sequence[tuple[float, float]]


class Mark(NamedTuple):
    """Something drawn.

    Attributes:
        kind: a name in OUTLINES, or `bar`, `line` or `text`.
        x, y: of its left upper corner, in pixels; of its middle for a text.
        width, height: in pixels; of a text, height is that of the font.
        text: what a text reads.
    """

    kind: str
    colour: str
    x: int
    y: int
    width: int
    height: int
    text: str = ""


def draw(marks: Sequence[Mark], size: int, ground: int) -> Image.Image:
    """A square RGB picture of `size` pixels; ground: the grey level behind the marks, 0 to 255."""
    picture = Image.new("RGB", (size, size), (ground,) * 3)
    canvas = ImageDraw.Draw(picture)
    for mark in marks:
        ink = {**COLOURS, **_GREYS}[mark.colour]
        if mark.kind == "text":
            canvas.text((mark.x, mark.y), mark.text, fill=ink, font=_font(mark.height), anchor="mm")
            continue
        if mark.kind in ("bar", "line"):
            canvas.rectangle((mark.x, mark.y, mark.x + mark.width - 1, mark.y + mark.height - 1), fill=ink)
            continue
        for outline in OUTLINES[mark.kind]:
            points = [(mark.x + x * (mark.width - 1), mark.y + y * (mark.height - 1)) for x, y in outline]
            canvas.polygon(points, fill=ink)
    return picture


def text_width(text: str, height: int) -> float:
    """Pixels that a text in a font of this height takes from left to right."""
    return _font(height).getlength(text)


@cache
def _font(height: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=height)


def _disc(x: float, y: float, radius: float, start: float = 0.0, end: float = 2.0) -> Outline:
    """Points on a circle between two angles, in half turns."""
    angles = [math.pi * (start + (end - start) * step / 32) for step in range(33)]
    return [(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in angles]


def _star(num_points: int, inner: float) -> Outline:
    rays = [(0.5 if step % 2 == 0 else inner, math.pi * step / num_points) for step in range(2 * num_points)]
    return [(0.5 + radius * math.sin(angle), 0.5 - radius * math.cos(angle)) for radius, angle in rays]


# Polygons in the unit square, whose first coordinate points right and second down.
OUTLINES: dict[str, tuple[Outline, ...]] = {
    "circle": (_disc(0.5, 0.5, 0.5),),
    "square": (((0.04, 0.04), (0.96, 0.04), (0.96, 0.96), (0.04, 0.96)),),
    "triangle": (((0.5, 0.0), (1.0, 0.95), (0.0, 0.95)),),
    "cross": (
        ((0.33, 0.0), (0.67, 0.0), (0.67, 1.0), (0.33, 1.0)),
        ((0.0, 0.33), (1.0, 0.33), (1.0, 0.67), (0.0, 0.67)),
    ),
    "banana": ([*_disc(0.5, 0.2, 0.5, 0.0, 1.0), *_disc(0.5, 0.0, 0.5, 0.9, 0.1)],),
    "carrot": (((0.25, 0.25), (0.75, 0.25), (0.5, 1.0)), ((0.3, 0.0), (0.5, 0.3), (0.7, 0.0), (0.5, 0.1))),
    "leaf": ([*_disc(0.5, 0.875, 0.625, 1.205, 1.795), *_disc(0.5, 0.125, 0.625, 0.205, 0.795)],),
    "sun": (_star(12, 0.28),),
    "cloud": (
        *(_disc(0.25, 0.6, 0.25), _disc(0.5, 0.42, 0.3), _disc(0.75, 0.6, 0.25)),
        ((0.25, 0.6), (0.75, 0.6), (0.75, 0.85), (0.25, 0.85)),
    ),
    "heart": (_disc(0.27, 0.27, 0.26), _disc(0.73, 0.27, 0.26), ((0.05, 0.4), (0.95, 0.4), (0.5, 1.0))),
}
