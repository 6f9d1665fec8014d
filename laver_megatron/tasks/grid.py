"""Places for marks on a grid: a cell holds one mark, a little off its middle, and marks never touch."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from laver_megatron.tasks.drawing import Mark

Cell = tuple[int, int]  # (column, row)


def cells(columns: int, rows: int | None = None) -> list[Cell]:
    """All cells, row by row."""
    return [(column, row) for row in range(columns if rows is None else rows) for column in range(columns)]


def in_cell(place: Random, kind: str, colour: str, cell: Cell, num_cells: int, size: int, fill: float = 0.68) -> Mark:
    """A mark in a cell of a square grid.

    Args:
        num_cells: cells on a side of the picture.
        fill: the mark's width as a share of the cell's.
    """
    side = size // num_cells
    width = max(round(side * fill), 3)
    room = side - width - 1  # one pixel stays free beside the next cell
    x, y = (cell[axis] * side + place.randint(0, max(room, 0)) for axis in (0, 1))
    return Mark(kind, colour, x, y, width, width)


def scatter(
    place: Random, looks: Sequence[tuple[str, str]], num_cells: int, size: int, fill: float = 0.68
) -> tuple[Mark, ...]:
    """Marks in different cells; looks: (kind, colour) of each."""
    chosen = place.sample(cells(num_cells), len(looks))
    return tuple(
        in_cell(place, kind, colour, cell, num_cells, size, fill)
        for (kind, colour), cell in zip(looks, chosen, strict=True)
    )
