"""The runs of a study as one table, read from the `run_summary.json` that each of them left.

A column is the path to a number in that file, with dots (`validation.last.lm_loss`), or its end where that is
unambiguous (`laver` for `config.laver`). `registry_files.py` finds and judges the files.
"""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from laver_megatron.studies.points import Points, listed

FAULTS = ("unfinished", "nan", "duplicate", "damaged")
SIZE_PARTS = ("decoder", "embedding", "lm_head")  # the language model, as the name of a checkpoint counts it
TOKEN_KINDS = ("total", "text", "visual", "label")


@dataclass(frozen=True)
class Run:
    """One run: its directory and its summary as columns."""

    path: Path
    columns: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.path)

    def value(self, column: str) -> Any:
        """The value of a full column name; None where the run has none."""
        return self.columns.get(column)


@dataclass(frozen=True)
class Fault:
    """Why a run cannot be part of a fit: one of FAULTS, and a sentence."""

    path: Path
    kind: str
    reason: str


@dataclass(frozen=True)
class Registry:
    """The runs that can be used, in the order of their paths, and those that were left out."""

    runs: tuple[Run, ...]
    left_out: tuple[Fault, ...] = ()

    @property
    def column_names(self) -> list[str]:
        """All columns of any run, in the order they first appear in."""
        return list(dict.fromkeys(name for run in self.runs for name in run.columns))

    def full_name(self, column: str) -> str:
        """The column that this name, or end of a name, means.

        Raises:
            ValueError: none or several, with those that come near.
        """
        names = self.column_names
        if column in names:
            return column
        found = [name for name in names if name.endswith(f".{column}")]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"the column {column!r} could be any of {', '.join(found)}; give more of its name")
        near = [name for name in names if column.split(".")[-1] in name] or names
        raise ValueError(f"no run has a column {column!r}; there are {', '.join(near)}")

    def to_csv(self) -> str:
        """One line a run, all columns."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        names = self.column_names
        writer.writerow(["path", *names])
        writer.writerows([[run.name, *(run.value(name) for name in names)] for run in self.runs])
        return text.getvalue()

    def arms(self, by: str) -> dict[str, "Registry"]:
        """The runs by their value of a column; true and false are the column's last name and `baseline`.

        Raises:
            ValueError: no such column, or runs that have no value there.
        """
        column = self.full_name(by)
        self._refuse([run.name for run in self.runs if run.value(column) is None], f"value in {column}")
        names = {True: column.split(".")[-1], False: "baseline"}
        arms: dict[str, list[Run]] = {}
        for run in self.runs:
            value = run.value(column)
            arms.setdefault(names[value] if isinstance(value, bool) else str(value), []).append(run)
        return {name: Registry(tuple(runs)) for name, runs in arms.items()}

    def where(self, column: str, value: str) -> "Registry":
        """The runs that have this value in this column: `true`, `false`, `null`, a number or a text.

        Raises:
            ValueError: no such column, or no such run, with the values that there are.
        """
        name = self.full_name(column)
        runs = tuple(run for run in self.runs if is_value(run.value(name), value))
        if not runs:
            there = dict.fromkeys(text_of(run.value(name)) for run in self.runs)
            raise ValueError(f"no run has {value!r} in {name}; there are {listed(list(there), 8)}")
        return Registry(runs, self.left_out)

    def points(
        self,
        column: str,
        size_parts: Sequence[str] = SIZE_PARTS,
        tokens: str = "total",
        ceiling: float | None = None,
    ) -> Points:
        """What a law is fitted to: this column against the parameters of these parts and the tokens of this kind.

        Raises:
            ValueError: no such column, part or kind, or runs that have no number there.
        """
        column = self.full_name(column)
        names = {"size": [f"parameters.{part}" for part in size_parts], "tokens": [f"tokens.{tokens}"]}
        for name in (*names["size"], *names["tokens"]):
            if name not in self.column_names:
                raise ValueError(f"no run has a column {name!r}; there are {', '.join(self._of(name.split('.')[0]))}")
        for name in (column, *names["size"], *names["tokens"]):
            self._refuse([run.name for run in self.runs if not is_number(run.value(name))], f"number in {name}")
        sizes, amounts = (
            np.array([sum(run.value(name) for name in names[kind]) for run in self.runs], dtype=float)
            for kind in ("size", "tokens")
        )
        values = np.array([run.value(column) for run in self.runs], dtype=float)
        return Points(tuple(run.name for run in self.runs), sizes, amounts, values, column, ceiling)

    def flops(self) -> np.ndarray:
        """Model FLOPs of every run, LaVer's overhead included."""
        return np.array([run.value("flops.model") for run in self.runs], dtype=float)

    def _of(self, group: str) -> list[str]:
        return [name for name in self.column_names if name.startswith(f"{group}.")]

    def _refuse(self, without: Sequence[str], what: str) -> None:
        if without:
            raise ValueError(
                f"{len(without)} of {len(self.runs)} runs have no {what}: {listed(without)}; mend these, or "
                "choose others by a column (--where COLUMN=VALUE, such as --where laver=true)"
            )


def is_number(value: Any) -> bool:
    """Whether it is a finite number, and none that is too large for one of 64 bits."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def text_of(value: Any) -> str:
    """A value as one writes it: `true`, `false`, `null`, a number or a text."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def is_value(value: Any, text: str) -> bool:
    """Whether this is how one writes the value; numbers in any form."""
    if is_number(value):
        try:
            return float(text) == value
        except ValueError:
            return False
    return text_of(value) == text
