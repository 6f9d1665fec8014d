"""Plain points of a study: a CSV with a header, a line for each run."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from laver_megatron.studies.compute import SIX_N_D
from laver_megatron.studies.points import Points
from laver_megatron.studies.registry import is_value
from laver_megatron.studies.study import ALL_RUNS, Study, StudyArm

SEED_COLUMN = "seed"


def study_of_points(
    path: Path,
    column: str = "loss",
    *,
    arm_by: str | None = None,
    where: Sequence[tuple[str, str]] = (),
    size_column: str = "N",
    tokens_column: str = "D",
    flops_column: str = "FLOPs",
    ceiling: float | None = None,
) -> Study:
    """The arms of these points. Tokens that are not there follow from FLOPs at 6 N a token.

    where: columns and the values that points must have there.

    Raises:
        ValueError: a column is missing or there twice, a line has more cells than the header, is there twice, or has a
            cell that is no number, with the lines.
    """
    header, rows = _read(path)
    has_flops = flops_column in header
    needed = [size_column, column, *([arm_by] if arm_by else []), *(name for name, _ in where)]
    missing = [name for name in needed if name not in header]
    if tokens_column not in header and not has_flops:
        missing.append(f"{tokens_column} or {flops_column}")
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}; its columns are {', '.join(header)}")
    if not rows:
        raise ValueError(f"{path} has a header and no points")
    for name, value in where:
        rows = {line: row for line, row in rows.items() if is_value(_number_or_text(row[name]), value)}
        if not rows:
            raise ValueError(f"{path} has no point with {value!r} in {name}")
    lines: dict[str, list[int]] = {}
    for line, row in rows.items():
        lines.setdefault(row[arm_by] if arm_by else ALL_RUNS, []).append(line)
    arms = {}
    for name, chosen in lines.items():
        values = {
            name: np.array([_number(path, line, name, rows[line][name]) for line in chosen])
            for name in (size_column, tokens_column, flops_column, column)
            if name in header
        }
        sizes, flops = values[size_column], values.get(flops_column)
        amounts = values.get(tokens_column)
        if amounts is None:
            assert flops is not None, "checked with the header"
            with np.errstate(divide="ignore", invalid="ignore"):  # check_points names the lines
                amounts = SIX_N_D.tokens(sizes, flops)
        names = tuple(f"line {line}" for line in chosen)
        seeds = tuple(rows[line].get(SEED_COLUMN, "") for line in chosen)
        arms[name] = StudyArm(Points(names, sizes, amounts, values[column], column, ceiling), flops, seeds)
    return Study(arms)


def _read(path: Path) -> tuple[list[str], dict[int, dict[str, str]]]:
    """The header, and the cells by column of each line that is not empty, by its number."""
    with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets begin a file with a byte order mark
        reader = csv.reader(file)
        header = [name.strip() for name in next(reader, [])]
        rows: dict[int, list[str]] = {}
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows[reader.line_num] = [cell.strip() for cell in cells]
    if twice := sorted({name for name in header if name and header.count(name) > 1}):
        raise ValueError(f"{path} has the column {', '.join(twice)} twice")
    first: dict[tuple[float | str, ...], int] = {}
    for line, row in rows.items():
        if len(row) != len(header):
            raise ValueError(f"{path}, line {line}: {len(row)} cells where the header has {len(header)}")
        if (earlier := first.setdefault(tuple(map(_number_or_text, row)), line)) != line:
            raise ValueError(
                f"{path}, line {line}: the same as line {earlier}, and one run counts once; remove it, or add a column "
                f"that tells them apart, such as {SEED_COLUMN}"
            )
    return header, {line: dict(zip(header, row, strict=True)) for line, row in rows.items()}


def _number(path: Path, line: int, column: str, text: str) -> float:
    number = _number_or_text(text)
    if isinstance(number, str):
        raise ValueError(f"{path}, line {line}: {column} is {text!r}, no number")
    return number


def _number_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
