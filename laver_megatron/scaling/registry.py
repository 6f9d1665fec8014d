"""The runs of a study as one table, read from the `run_summary.json` that each of them left.

A column is the path to a number in that file, with dots (`validation.last.lm_loss`), or its end where that is
unambiguous (`laver` for `config.laver`). What cannot be part of a fit is named with its reason, and refused unless it
is asked to be left out:

    unfinished   state is not finished, or there is a run directory without a summary
    nan          a validation or training number is null, which is how NaN and infinite ones are written
    duplicate    another run has the same configuration hash and seed; the one written last is kept
    damaged      no JSON, another version, or sums over a part of the iterations
"""

import csv
import io
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from laver_megatron.scaling.points import Points
from laver_megatron.scaling.run_summary import FILE_NAME, FINISHED, FORMAT, VERSION, hashed_settings

FAULTS = ("unfinished", "nan", "duplicate", "damaged")
SIZE_PARTS = ("decoder", "embedding", "lm_head")  # the language model, as the name of a checkpoint counts it
TOKEN_KINDS = ("total", "text", "visual", "label")
_LADDER_SETTINGS = {"load", "model", "encoder", "train_iters"}
# Files that only a run directory has; without a summary beside them the run never saved.
_RUN_FILES = ("config.yaml", "metrics.jsonl")


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
        """The runs by their value of a column; true and false are the column's last name and `baseline`."""
        column = self.full_name(by)
        names = {True: column.split(".")[-1], False: "baseline"}
        arms: dict[str, list[Run]] = {}
        for run in self.runs:
            value = run.value(column)
            arms.setdefault(names[value] if isinstance(value, bool) else str(value), []).append(run)
        return {name: Registry(tuple(runs)) for name, runs in arms.items()}

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
        without = [run.name for run in self.runs if not _is_number(run.value(column))]
        if without:
            shown = ", ".join(without[:3]) + (f" and {len(without) - 3} more" if len(without) > 3 else "")
            raise ValueError(f"{len(without)} of {len(self.runs)} runs have no number in {column}: {shown}")
        sizes, amounts = (
            np.array([sum(run.value(name) or 0 for name in names[kind]) for run in self.runs], dtype=float)
            for kind in ("size", "tokens")
        )
        values = np.array([run.value(column) for run in self.runs], dtype=float)
        return Points(tuple(run.name for run in self.runs), sizes, amounts, values, column, ceiling)

    def flops(self) -> np.ndarray:
        """Model FLOPs of every run, LaVer's overhead included."""
        return np.array([run.value("flops.model") for run in self.runs], dtype=float)

    def varying_settings(self) -> list[str]:
        """Settings that decide a run's numbers and differ between these, other than those a ladder is made of."""
        has_laver = all(run.value("config.laver") for run in self.runs)
        names = (f"config.{name}" for name in sorted(hashed_settings(has_laver) - _LADDER_SETTINGS))
        return [name for name in names if len({repr(run.value(name)) for run in self.runs}) > 1]

    def _of(self, group: str) -> list[str]:
        return [name for name in self.column_names if name.startswith(f"{group}.")]


def read_registry(paths: Sequence[str | Path], leave_out: Collection[str] = ()) -> Registry:
    """All runs in these places: run directories, folders of them at any depth, or run_summary.json files.

    leave_out: kinds of FAULTS; runs that have these are left out, any other fault is an error.

    Raises:
        ValueError: no run at all, or runs with faults that are not to be left out, each by name with its reason.
    """
    unknown = set(leave_out) - set(FAULTS)
    if unknown:
        raise ValueError(f"unknown faults to leave out: {sorted(unknown)}; known are {', '.join(FAULTS)}")
    runs: list[Run] = []
    faults: list[Fault] = []
    for directory in _run_directories(paths):
        found = _read_run(directory)
        if isinstance(found, Run):
            runs.append(found)
        else:
            faults.append(found)
    faults += [fault for run in runs for fault in _faults_of(run)]
    bad = {fault.path for fault in faults}
    runs = [run for run in runs if run.path not in bad]
    faults += _duplicates(runs)
    bad = {fault.path for fault in faults}
    refused = [fault for fault in faults if fault.kind not in leave_out]
    if refused:
        kinds = [kind for kind in FAULTS if any(fault.kind == kind for fault in refused)]
        lines = "".join(f"\n  - {fault.path}: {fault.kind}: {fault.reason}" for fault in refused)
        raise ValueError(
            f"{len(refused)} runs cannot be used (to leave them out: --leave-out {' '.join(kinds)}):{lines}"
        )
    return Registry(tuple(run for run in runs if run.path not in bad), tuple(faults))


def _run_directories(paths: Sequence[str | Path]) -> list[Path]:
    found = set()
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"{path} does not exist")
        if path.is_file():
            if path.name != FILE_NAME:
                raise ValueError(f"{path} is no {FILE_NAME}")
            found.add(path.parent)
            continue
        found |= {file.parent for file in path.rglob(FILE_NAME)}
        found |= {file.parent for file in path.rglob(_RUN_FILES[0]) if (file.parent / _RUN_FILES[1]).exists()}
    if not found:
        raise ValueError(f"no {FILE_NAME} in {', '.join(map(str, paths))}; every run writes one when it saves")
    return sorted(found)


def _read_run(directory: Path) -> Run | Fault:
    path = directory / FILE_NAME
    if not path.exists():
        return Fault(directory, "unfinished", f"has {' and '.join(_RUN_FILES)} and no {FILE_NAME}: it never saved")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return Fault(directory, "damaged", f"{FILE_NAME} cannot be read: {error}")
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("version") != VERSION:
        kind = (content.get("format"), content.get("version")) if isinstance(content, dict) else type(content).__name__
        return Fault(directory, "damaged", f"{FILE_NAME} is {kind}, not {(FORMAT, VERSION)}")
    missing = [
        name for name in ("state", "seed", "config_hash", "parameters", "tokens", "flops") if name not in content
    ]
    if missing:
        return Fault(directory, "damaged", f"{FILE_NAME} lacks {', '.join(missing)}")
    return Run(directory, dict(_flattened(content)))


def _flattened(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(value) if isinstance(value, list) else value


def _faults_of(run: Run) -> Iterator[Fault]:
    """At most one fault: the first is reason enough."""
    state, iteration, counted = (run.value(name) for name in ("state", "iteration", "counted_iterations"))
    null = [
        name for name, value in run.columns.items() if name.startswith(("validation.", "training.")) and value is None
    ]
    if state != FINISHED:
        yield Fault(run.path, "unfinished", f"is at iteration {iteration} of {run.value('train_iters')}")
    elif null:
        yield Fault(run.path, "nan", f"{', '.join(null)} was NaN or infinite")
    elif counted != iteration:
        yield Fault(
            run.path, "damaged", f"its tokens, FLOPs and time are sums over {counted} of {iteration} iterations"
        )


def _duplicates(runs: Sequence[Run]) -> Iterator[Fault]:
    same: dict[tuple[Any, Any], list[Run]] = {}
    for run in runs:
        same.setdefault((run.value("config_hash"), run.value("seed")), []).append(run)
    for (digest, seed), group in same.items():
        *older, newest = sorted(group, key=lambda run: (run.value("time.written_at") or "", run.path))
        for run in older:
            yield Fault(
                run.path, "duplicate", f"has configuration {digest} and seed {seed}, as the newer {newest.path}"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
