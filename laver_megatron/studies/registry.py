"""The runs of a study as one table, read from the `run_summary.json` that each of them left.

A column is the path to a value in that file, with dots (`validation.last.lm_loss`), or its end where that is
unambiguous (`laver` for `config.laver`). Runs that cannot be part of a fit are refused by name and reason, unless they
are to be left out:

    unfinished   state is not finished, or there is a run directory without a summary
    nan          a number is NaN, infinite, or null, which is how a run writes these
    duplicate    another run has the same configuration hash and seed; the one written last is kept
    damaged      no JSON, another version, missing or impossible numbers, or sums over a part of the iterations
"""

import csv
import difflib
import io
import json
import math
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from laver_megatron.run_log.run_summary import FILE_NAME, FINISHED, FORMAT, UNFINISHED, VERSION
from laver_megatron.studies.observations import Array, Observations, first_few

FAULTS = ("unfinished", "nan", "duplicate", "damaged")
SIZE_PARTS = ("decoder", "embedding", "lm_head")  # the language model, as the name of a checkpoint counts it
TOKEN_KINDS = ("total", "text", "visual", "label")
# Files that only a run directory has; without a summary beside them the run never saved.
_RUN_FILES = ("config.yaml", "metrics.jsonl")
_INTEGERS = ("iteration", "counted_iterations", "seed")
_NUMBERS = (
    *_INTEGERS, *(f"parameters.{part}" for part in SIZE_PARTS), *(f"tokens.{kind}" for kind in TOKEN_KINDS),
    "flops.model",
)  # fmt: skip
_TEXTS = ("state", "config_hash", "time.written_at")
# Null is a value of a setting, and of what a run without validation lacks.
_MAY_BE_NULL = ("config.", "hardware.")
_ABSENT_WITHOUT_VALIDATION = ("validation", "training")


@dataclass(frozen=True)
class RunRecord:
    """One run: its directory and its summary as columns."""

    path: Path
    columns: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.path)

    def value(self, column: str) -> Any:
        """The value of a full column name; None where the run has none."""
        return self.columns.get(column)

    def size(self, parts: Sequence[str] = SIZE_PARTS) -> float:
        return sum(self.columns[f"parameters.{part}"] for part in parts)


@dataclass(frozen=True)
class Fault:
    """Why a run cannot be part of a fit: one of FAULTS, and a sentence."""

    path: Path
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.kind}: {self.reason}"


@dataclass(frozen=True)
class Registry:
    """The runs that can be used, in the order of their paths, and those that were left out."""

    runs: tuple[RunRecord, ...]
    left_out: tuple[Fault, ...] = ()

    @property
    def column_names(self) -> list[str]:
        """All columns of any run, in the order of their first appearance."""
        return list(dict.fromkeys(name for run in self.runs for name in run.columns))

    def full_name(self, column: str) -> str:
        """The column that this name, or end of a name, means.

        Raises:
            ValueError: none or several, with those that come nearest.
        """
        names = self.column_names
        if column in names:
            return column
        found = [name for name in names if name.endswith(f".{column}")]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"the column {column!r} could be any of {first_few(found, 8)}; give more of its name")
        asked, ends = column.split(".")[-1], [name.split(".")[-1] for name in names]
        alike = difflib.get_close_matches(asked, ends, n=3)
        near = [name for name, end in zip(names, ends, strict=True) if asked in name or end in alike] or names
        raise ValueError(f"no run has a column {column!r}; there are {first_few(near, 8)}: see run_summary.json")

    def to_csv(self) -> str:
        """One line a run, all columns."""
        text = io.StringIO()
        writer, names = csv.writer(text, lineterminator="\n"), self.column_names
        writer.writerow(["path", *names])
        writer.writerows([run.name, *map(run.value, names)] for run in self.runs)
        return text.getvalue()

    def arms(self, by: str) -> dict[str, "Registry"]:
        """The runs by their value of a column; true and false are the column's last name and `baseline`.

        Raises:
            ValueError: no such column, or runs that have no value there.
        """
        column = self.full_name(by)
        self._refuse([run.name for run in self.runs if run.value(column) is None], f"value in {column}")
        names = {True: column.split(".")[-1], False: "baseline"}
        arms: dict[str, list[RunRecord]] = {}
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
            raise ValueError(f"no run has {value!r} in {name}; there are {first_few(list(there), 8)}")
        return Registry(runs, self.left_out)

    def observations(
        self, column: str, size_parts: Sequence[str] = SIZE_PARTS, tokens: str = "total", ceiling: float | None = None
    ) -> Observations:
        """This column against the parameters of these parts and the tokens of this kind.

        Raises:
            ValueError: no such column, part or kind, or runs that have no number there.
        """
        column, token_column = self.full_name(column), f"tokens.{tokens}"
        needed = [*(f"parameters.{part}" for part in size_parts), token_column]
        for name in needed:
            if name not in self.column_names:
                like = [other for other in self.column_names if other.startswith(f"{name.split('.')[0]}.")]
                raise ValueError(f"no run has a column {name!r}; there are {', '.join(like)}")
        for name in (column, *needed):
            self._refuse([run.name for run in self.runs if not is_number(run.value(name))], f"number in {name}")
        sizes = np.array([run.size(size_parts) for run in self.runs], dtype=float)
        names = tuple(run.name for run in self.runs)
        return Observations(names, sizes, self._numbers(token_column), self._numbers(column), column, ceiling)

    def flops(self) -> Array:
        """Model FLOPs of every run, LaVer's overhead included."""
        return self._numbers("flops.model")

    def _numbers(self, column: str) -> Array:
        return np.array([run.value(column) for run in self.runs], dtype=float)

    def _refuse(self, without: Sequence[str], what: str) -> None:
        if without:
            raise ValueError(
                f"{len(without)} of {len(self.runs)} runs have no {what}: {first_few(without)}; mend these, or "
                "choose others by a column (--where COLUMN=VALUE, such as --where laver=true)"
            )


def is_number(value: Any) -> bool:
    """Whether it is a finite number within the range of a float."""
    is_numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return is_numeric and abs(value) <= sys.float_info.max  # of NaN false


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


def read_registry(paths: Sequence[str | Path], leave_out: Collection[str] = ()) -> Registry:
    """All runs in these places: run directories, folders of them at any depth, or run_summary.json files.

    leave_out: kinds of FAULTS; runs that have these are left out, any other fault is an error.

    Raises:
        ValueError: no run at all, or runs with faults that are not to be left out, each by name with its reason.
    """
    unknown = set(leave_out) - set(FAULTS)
    if unknown:
        raise ValueError(f"unknown faults to leave out: {sorted(unknown)}; known are {', '.join(FAULTS)}")
    read = [_read_run(directory) for directory in _run_directories(paths)]
    faults = [found for found in read if isinstance(found, Fault)]
    runs = [found for found in read if isinstance(found, RunRecord)]
    for judge in (_unusable, _duplicates):
        new = [*judge(runs)]
        runs = [run for run in runs if run.path not in {fault.path for fault in new}]
        faults += new
    refused = [fault for fault in faults if fault.kind not in leave_out]
    if refused:
        kinds = [kind for kind in FAULTS if any(fault.kind == kind for fault in refused)]
        lines = "".join(f"\n  - {fault}" for fault in refused)
        raise ValueError(
            f"{len(refused)} runs cannot be used (to leave them out: --leave-out {' '.join(kinds)}):{lines}"
        )
    return Registry(tuple(runs), tuple(faults))


def _run_directories(paths: Sequence[str | Path]) -> list[Path]:
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"{path} does not exist")
        if path.is_file():
            if path.name != FILE_NAME:
                raise ValueError(f"{path} is not a {FILE_NAME}")
            found.append(path.parent)
            continue
        found += [file.parent for file in path.rglob(FILE_NAME)]
        found += [file.parent for file in path.rglob(_RUN_FILES[0]) if (file.parent / _RUN_FILES[1]).exists()]
    if not found:
        raise ValueError(f"no {FILE_NAME} in {', '.join(map(str, paths))}; every run writes one when it saves")
    # A directory that is reached by two names is one run.
    return sorted({path.resolve(): path for path in reversed(found)}.values())


def _read_run(directory: Path) -> RunRecord | Fault:
    path = directory / FILE_NAME
    if not path.exists():
        return Fault(directory, "unfinished", f"has {' and '.join(_RUN_FILES)} and no {FILE_NAME}: it never saved")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        columns = dict(_flattened(content)) if isinstance(content, dict) else {}
    except (OSError, ValueError, RecursionError) as error:
        return Fault(directory, "damaged", f"{FILE_NAME} cannot be read: {error}")
    kind = (content.get("format"), content.get("version")) if isinstance(content, dict) else type(content).__name__
    if kind != (FORMAT, VERSION):
        return Fault(directory, "damaged", f"{FILE_NAME} is {kind}, not {(FORMAT, VERSION)}")
    problems = "; ".join(_damage(columns))
    return Fault(directory, "damaged", f"{FILE_NAME} {problems}") if problems else RunRecord(directory, columns)


def _flattened(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(value) if isinstance(value, list) else value


def _damage(columns: Mapping[str, Any]) -> Iterator[str]:
    """What every summary has and this one lacks."""
    if missing := [name for name in (*_NUMBERS, *_TEXTS) if name not in columns]:
        yield f"lacks {', '.join(missing)}"
    for name, value in columns.items():
        if name in _NUMBERS and not (is_number(value) and value >= 0):
            yield f"has {name} {_short(value)}, which must be a number of at least 0"
        elif name in _INTEGERS and value != int(value):
            yield f"has {name} {_short(value)}, which must be an integer"
        elif name in _TEXTS and not isinstance(value, str):
            yield f"has {name} {_short(value)}, which must be a string"
    if isinstance(state := columns.get("state"), str) and state not in (FINISHED, UNFINISHED):
        yield f"has state {state!r}, which must be {FINISHED} or {UNFINISHED}"
    if not any(name.startswith("config.") for name in columns):
        yield "lacks config"


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**20 else f"of {value.bit_length()} bits"
    return text if len(text) <= 40 else f"{text[:40]}..."


def _unusable(runs: Sequence[RunRecord]) -> Iterator[Fault]:
    """At most one fault a run: the first is reason enough."""
    for run in runs:
        iteration, counted = run.value("iteration"), run.value("counted_iterations")
        if run.value("state") != FINISHED:
            yield Fault(run.path, "unfinished", f"is at iteration {iteration} of {run.value('train_iters')}")
        elif bad := [name for name, value in run.columns.items() if _is_nan(name, value)]:
            yield Fault(run.path, "nan", f"{', '.join(bad)} was NaN or infinite")
        elif counted != iteration:
            reason = f"its tokens, FLOPs and time are sums over {counted} of {iteration} iterations"
            yield Fault(run.path, "damaged", reason)


def _is_nan(name: str, value: Any) -> bool:
    if value is None:
        return not name.startswith(_MAY_BE_NULL) and name not in _ABSENT_WITHOUT_VALIDATION
    return isinstance(value, float) and not math.isfinite(value)


def _duplicates(runs: Sequence[RunRecord]) -> Iterator[Fault]:
    same: dict[tuple[Any, Any], list[RunRecord]] = {}
    for run in runs:
        same.setdefault((run.value("config_hash"), run.value("seed")), []).append(run)
    for (digest, seed), copies in same.items():
        *older, newest = sorted(copies, key=lambda run: (run.value("time.written_at"), run.path))
        for run in older:
            reason = f"has configuration {digest} and seed {seed}, as the newer {newest.path}"
            yield Fault(run.path, "duplicate", reason)
