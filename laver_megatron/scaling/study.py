"""What a law is to be fitted to, arm by arm: from the summaries of runs, or from a CSV of plain points."""

import csv
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from laver_megatron.scaling.compute import SIX_N_D
from laver_megatron.scaling.points import Array, Points
from laver_megatron.scaling.registry import Registry, read_registry

ALL_RUNS = "all runs"
CONTINUED_TRAINING = (
    "Qwen2.5 checkpoints are pretrained: a law of runs that start from them is one of continued training. D counts the "
    "tokens of these runs alone, and E, A and B hold for this start only."
)


@dataclass(frozen=True)
class StudyArm:
    """The runs of one arm. flops_R: None where nobody counted them. notes: what a reader should know of the runs."""

    points: Points
    flops_R: Array | None
    notes: tuple[str, ...] = ()

    def without_highest(self, number: int) -> "StudyArm":
        """Leaves out the runs with the highest values."""
        if number <= 0:
            return self
        kept = np.sort(np.argsort(self.points.column_R, kind="stable")[: max(len(self.points) - number, 0)])
        notes = (*self.notes, f"the {number} runs with the highest {self.points.column} are left out")
        return StudyArm(self.points.take(kept), None if self.flops_R is None else self.flops_R[kept], notes)


def study_of_registry(
    paths: Sequence[str | Path],
    column: str,
    *,
    arm_by: str | None = None,
    size_parts: Sequence[str],
    tokens: str,
    ceiling: float | None = None,
    leave_out: Collection[str] = (),
) -> tuple[dict[str, StudyArm], Registry]:
    """The arms of these runs by name, and their table. Raises ValueError as `read_registry` and `Registry.points`."""
    registry = read_registry(paths, leave_out)
    arms = {}
    for name, part in (registry.arms(arm_by) if arm_by else {ALL_RUNS: registry}).items():
        varying = part.varying_settings()
        notes = (f"the runs also differ in {', '.join(varying)}, which the law takes for noise",) if varying else ()
        arms[name] = StudyArm(part.points(column, size_parts, tokens, ceiling), part.flops(), notes)
    return arms, registry


def study_of_points(
    path: Path,
    column: str = "loss",
    *,
    arm_by: str | None = None,
    size_column: str = "N",
    tokens_column: str = "D",
    flops_column: str = "FLOPs",
    ceiling: float | None = None,
) -> dict[str, StudyArm]:
    """The arms of a CSV with a header. Tokens that are not there follow from FLOPs at 6 N a token.

    Raises:
        ValueError: a column is missing, or a cell is no number, with its line.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows, header = list(reader), list(reader.fieldnames or ())
    has_flops = flops_column in header
    needed = [size_column, column, *([arm_by] if arm_by else [])]
    missing = [name for name in needed if name not in header]
    if tokens_column not in header and not has_flops:
        missing.append(f"{tokens_column} or {flops_column}")
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}; its columns are {', '.join(header)}")
    names: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        names.setdefault(row[arm_by] if arm_by else ALL_RUNS, []).append(i)
    if not rows:
        raise ValueError(f"{path} has a header and no points")
    values = {
        name: np.array([_number(path, i, name, row[name]) for i, row in enumerate(rows)])
        for name in (size_column, tokens_column, flops_column, column)
        if name in header
    }
    sizes = values[size_column]
    flops = values.get(flops_column)
    amounts = values[tokens_column] if tokens_column in header else SIX_N_D.tokens(sizes, flops)  # type: ignore[arg-type]
    arms = {}
    for name, indexes in names.items():
        lines = tuple(f"line {i + 2}" for i in indexes)
        points = Points(lines, sizes[indexes], amounts[indexes], values[column][indexes], column, ceiling)
        arms[name] = StudyArm(points, None if flops is None else flops[indexes])
    return arms


def _number(path: Path, index: int, column: str, text: str | None) -> float:
    try:
        return float(text or "")
    except ValueError:
        raise ValueError(f"{path}, line {index + 2}: {column} is {text!r}, no number") from None
