"""What a law is to be fitted to, arm by arm, from the summaries of runs. `csv_points.py` reads plain points."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from laver_megatron.studies.points import Array, Points
from laver_megatron.studies.registry import SIZE_PARTS, Registry, is_number
from laver_megatron.studies.registry_files import read_registry
from laver_megatron.studies.study_settings import check_equal_settings, setting_notes

ALL_RUNS = "all runs"
CONTINUED_TRAINING = (
    "Qwen2.5 checkpoints are pretrained: a law of runs that start from them is one of continued training. D counts the "
    "tokens of these runs alone, and E, A and B hold for this start only."
)


@dataclass(frozen=True)
class StudyArm:
    """The runs of one arm. flops_R: None where nobody counted them. seeds: of the runs, as text; those of two arms that
    share size, seed and data are a pair. notes: what a reader should know of the runs."""

    points: Points
    flops_R: Array | None
    seeds: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def without_highest(self, number: int) -> "StudyArm":
        """Leaves out the runs with the highest values."""
        if number <= 0:
            return self
        kept = np.sort(np.argsort(self.points.column_R, kind="stable")[: max(len(self.points) - number, 0)])
        notes = (*self.notes, f"the {number} runs with the highest {self.points.column} are left out")
        flops_R = None if self.flops_R is None else self.flops_R[kept]
        return StudyArm(self.points.take(kept), flops_R, tuple(self.seeds[i] for i in kept), notes)


@dataclass(frozen=True)
class Study:
    """The arms by name. notes: of all of them together. registry: the table of the runs; None of plain points."""

    arms: dict[str, StudyArm]
    notes: tuple[str, ...] = ()
    registry: Registry | None = None


def study_of_registry(
    paths: Sequence[str | Path],
    column: str,
    *,
    arm_by: str | None = None,
    where: Sequence[tuple[str, str]] = (),
    size_parts: Sequence[str] = SIZE_PARTS,
    tokens: str = "total",
    ceiling: float | None = None,
    leave_out: Collection[str] = (),
    allow_differences: Collection[str] = (),
) -> Study:
    """The arms of these runs.

    where: columns and the values that runs must have there. allow_differences: settings of data and validation that
    may differ between two arms.

    Raises:
        ValueError: as `read_registry`, the methods of `Registry` and `check_equal_settings`.
    """
    registry = read_registry(paths, leave_out)
    for name, value in where:
        registry = registry.where(name, value)
    column = registry.full_name(column)
    parts = {ALL_RUNS: registry}
    notes: list[str] = []
    if arm_by:
        parts = registry.arms(arm_by)
        _check_column(parts, column)
        if len(parts) == 2:
            notes += check_equal_settings(parts, registry.full_name(arm_by), allow_differences)
    arms = {}
    for name, part in parts.items():
        seeds = tuple(str(run.value("seed")) for run in part.runs)
        arms[name] = StudyArm(
            part.points(column, size_parts, tokens, ceiling), part.flops(), seeds, tuple(setting_notes(part))
        )
    return Study(arms, tuple(notes), registry)


def _check_column(parts: dict[str, Registry], column: str) -> None:
    """An arm of which no run has the column is no accident, such as LaVer's monitors in the baseline."""
    without = [name for name, part in parts.items() if not any(is_number(run.value(column)) for run in part.runs)]
    if len(without) == len(parts):
        raise ValueError(f"no run has a number in {column}; choose another column")
    if without:
        raise ValueError(
            f"no run of {' or '.join(without)} has a number in {column}; fit the other runs alone, chosen with --where "
            "COLUMN=VALUE (such as --where laver=true) in place of --arm-by"
        )
