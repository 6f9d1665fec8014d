"""A sheet of examples: a row a family, a column a difficulty, the question and its answer under each picture."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from textwrap import wrap

from PIL import Image, ImageDraw, ImageFont

from laver_megatron.runtime.files import replacing
from laver_megatron.tasks.question import VALID
from laver_megatron.tasks.sample import TaskSettings, make_task

_SIDE, _GAP, _LINE, _FONT = 160, 24, 13, 10.5  # pixels: of a picture, between two, of a line of text, its height
_COLUMNS = 32  # letters in a line


def write_sheet(settings: TaskSettings, path: Path) -> None:
    """Draws validation samples of every family and level of a set as a PNG."""
    columns, rows = len(settings.levels), len(settings.families)
    width, height = _SIDE + _GAP, _SIDE + 3 * _LINE + _GAP
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), "white")
    canvas = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=_FONT)
    for row, family in enumerate(settings.families):
        for column, level in enumerate(settings.levels):
            task = make_task(replace(settings, families=(family,), levels=(level,)), VALID, 10 * row + column)
            picture = Image.open(io.BytesIO(task.png())).resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
            left, top = _GAP + column * width, _GAP // 2 + row * height
            sheet.paste(picture, (left, top))
            lines = [*wrap(task.question.question, _COLUMNS), f"{task.question.answer}   ({family}, {level})"]
            for number, line in enumerate(lines):
                below = top + _SIDE + 2 + number * _LINE
                canvas.text((left, below), line, fill="black", font=font)
    with replacing(path) as temporary:
        sheet.save(temporary, "PNG", optimize=True)
