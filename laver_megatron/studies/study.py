"""The arms of a study and their runs, from the summaries of runs or a CSV of plain points; and by which settings runs
differ, where only size, amount of data and arm should.
"""

import csv
import json
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from laver_megatron.config.fields import fields_of
from laver_megatron.run_log.run_summary import MANIFEST, hashed_settings
from laver_megatron.studies.law import SIX_N_D
from laver_megatron.studies.observations import Array, Observations, cluster, first_few
from laver_megatron.studies.registry import SIZE_PARTS, Registry, RunRecord, is_number, is_value, read_registry, text_of

ALL_RUNS = "all runs"
SEED_COLUMN = "seed"
CONTINUED_TRAINING = (
    "Qwen2.5 checkpoints are pretrained: a law of runs that start from them is one of continued training. D counts the "
    "tokens of these runs alone, and E, A and B hold for this start only."
)
# What makes a size, and an amount of data.
_LADDER_SETTINGS = {"load", "model", "encoder", "train_iters"}
# With other data or validation, a difference of two losses says nothing of the arms.
OF_THE_LOSS = {item.name for item in fields_of("data")} | {"eval_iters"}
_DATA_PATH = "config.data_path"
ARM_COLUMN = "config.arm"


@dataclass(frozen=True)
class ArmRuns:
    """The runs of one arm.

    Attributes:
        flops_R: None where they were not counted.
        seeds: of the runs, as text; runs of two arms that share size, seed and data are a pair.
        notes: what a reader should know of the runs.
    """

    observations: Observations
    flops_R: Array | None
    seeds: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def without_highest(self, number: int) -> "ArmRuns":
        """Leaves out the runs with the highest values."""
        if number <= 0:
            return self
        runs = self.observations
        kept = np.sort(np.argsort(runs.column_R, kind="stable")[: max(len(runs) - number, 0)])
        notes = (*self.notes, f"the {number} runs with the highest {runs.column} are left out")
        flops_R = None if self.flops_R is None else self.flops_R[kept]
        return ArmRuns(runs.take(kept), flops_R, tuple(self.seeds[i] for i in kept), notes)


@dataclass(frozen=True)
class Study:
    """The arms by name. notes: of all of them together. registry: the table of the runs; None of plain points."""

    arms: dict[str, ArmRuns]
    notes: tuple[str, ...] = ()
    registry: Registry | None = None


def study_of_registry(
    paths: Sequence[str | Path],
    column: str,
    *,
    arm_by: str | None = None,
    baseline: str = "baseline",
    where: Sequence[tuple[str, str]] = (),
    size_parts: Sequence[str] = SIZE_PARTS,
    tokens: str = "total",
    ceiling: float | None = None,
    leave_out: Collection[str] = (),
    allow_differences: Collection[str] = (),
) -> Study:
    """The arms of the runs in these places. Raises as `read_registry`, `Registry` and `check_equal_settings`.

    Args:
        where: columns and the values that runs must have there.
        baseline: the arm that the others are compared with.
        allow_differences: settings of data and validation that may differ between two arms.
    """
    registry = read_registry(paths, leave_out)
    for name, value in where:
        registry = registry.where(name, value)
    column = registry.full_name(column)
    tables = registry.arms(arm_by) if arm_by else {ALL_RUNS: registry}
    notes: list[str] = []
    if arm_by:
        _check_column(tables, column)
        for pair in _compared(tables, baseline):
            notes += check_equal_settings(pair, registry.full_name(arm_by), allow_differences)
    arms = {
        name: ArmRuns(
            table.observations(column, size_parts, tokens, ceiling),
            table.flops(),
            tuple(str(run.value("seed")) for run in table.runs),
            tuple(setting_notes(table)),
        )
        for name, table in tables.items()
    }
    return Study(arms, tuple(notes), registry)


def _compared(tables: Mapping[str, Registry], baseline: str) -> list[Mapping[str, Registry]]:
    """The pairs of arms that will be compared: each with the baseline."""
    if len(tables) == 2:
        return [tables]
    if baseline not in tables:
        return []
    return [{baseline: tables[baseline], name: table} for name, table in tables.items() if name != baseline]


def _check_column(tables: dict[str, Registry], column: str) -> None:
    """Refuses a column that an arm lacks altogether, such as LaVer's monitors in the baseline."""
    without = [name for name, table in tables.items() if not any(is_number(run.value(column)) for run in table.runs)]
    if len(without) == len(tables):
        raise ValueError(f"no run has a number in {column}; choose another column")
    if without:
        raise ValueError(
            f"no run of {' or '.join(without)} has a number in {column}; fit the other runs alone, chosen with --where "
            "COLUMN=VALUE (such as --where laver=true) in place of --arm-by"
        )


def study_of_csv(
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
    """The arms of plain points: a CSV with a header and a line for each run. A missing column of tokens follows from
    FLOPs at 6 N a token.

    where: columns and the values that points must have there.

    Raises:
        ValueError: missing or duplicate columns; lines, by number, that are duplicates, have more or fewer cells than
            the header, or a cell that is not a number.
    """
    header, rows = _read_csv(path)
    needed = [size_column, column, *([arm_by] if arm_by else []), *(name for name, _ in where)]
    missing = [name for name in needed if name not in header]
    if tokens_column not in header and flops_column not in header:
        missing.append(f"{tokens_column} or {flops_column}")
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}; its columns are {first_few(header, 8)}")
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
    for arm, chosen in lines.items():
        values = {
            name: np.array([_number(path, line, name, rows[line][name]) for line in chosen])
            for name in (size_column, tokens_column, flops_column, column)
            if name in header
        }
        flops = values.get(flops_column)
        if tokens_column not in values:
            with np.errstate(divide="ignore", invalid="ignore"):  # check_fittable names the lines
                values[tokens_column] = SIX_N_D.tokens(values[size_column], values[flops_column])
        names = tuple(f"line {line}" for line in chosen)
        numbers = (values[size_column], values[tokens_column], values[column])
        seeds = tuple(rows[line].get(SEED_COLUMN, "") for line in chosen)
        arms[arm] = ArmRuns(Observations(names, *numbers, column, ceiling), flops, seeds)
    return Study(arms)


def _read_csv(path: Path) -> tuple[list[str], dict[int, dict[str, str]]]:
    """The header, and the cells by column of each line that is not empty, by its number."""
    with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets begin a file with a byte order mark
        reader = csv.reader(file)
        header = [name.strip() for name in next(reader, [])]
        cells = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    rows = {line: row for line, row in cells if any(row)}
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
        raise ValueError(f"{path}, line {line}: {column} is {text!r}, not a number")
    return number


def _number_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def varying_settings(arm: Registry) -> list[str]:
    """Settings that decide a run's numbers and differ between the runs of one arm, other than those of its ladder.
    Subsets of the data are amounts where the sweep that made the runs says so, which checked that they are nested."""
    names = [f"config.{name}" for name in sorted(hashed_settings(_all_laver([arm])) - _LADDER_SETTINGS)]
    varying = [name for name in names if len({repr(run.value(name)) for run in arm.runs}) > 1]
    if _DATA_PATH in varying and all(map(_sees_its_amount, arm.runs)):
        varying.remove(_DATA_PATH)
    return varying


def setting_notes(arm: Registry) -> list[str]:
    """What a reader should know of the settings by which the runs of one arm differ."""
    varying, notes = varying_settings(arm), []
    if _DATA_PATH in varying and _follows_tokens(arm):
        varying.remove(_DATA_PATH)
        notes.append(
            f"{_DATA_PATH} changes with the number of tokens: right where these are nested subsets "
            "(`laver shards subset`); what else differs between the data, the law takes for an effect of D"
        )
    if varying:
        notes.append(f"the runs also differ in {', '.join(varying)}, which the law takes for noise")
    return notes


def _all_laver(arms: Collection[Registry]) -> bool:
    return all(run.value("config.laver") for arm in arms for run in arm.runs)


def _follows_tokens(arm: Registry) -> bool:
    """Whether each amount of data has one path, and each path one amount."""
    amounts = cluster(np.array([run.value("tokens.total") for run in arm.runs], dtype=float)).tolist()
    paths = [run.value(_DATA_PATH) for run in arm.runs]
    return len(set(zip(paths, amounts, strict=True))) == len(set(paths)) == len(set(amounts))


def _sees_its_amount(run: RunRecord) -> bool:
    """Whether the manifest of the run's sweep names its data as the amount."""
    path = run.path.resolve().parent.parent / MANIFEST
    if not path.is_file():
        return False
    own = run.value("config_hash"), str(run.value("seed"))
    with path.open(newline="", encoding="utf-8") as file:
        lines = [line for line in csv.DictReader(file) if (line.get("config_hash"), line.get("seed")) == own]
    return bool(lines) and json.dumps([lines[0].get("amount")]) == run.value(_DATA_PATH)


def check_equal_settings(arms: Mapping[str, Registry], arm_by: str, allowed: Collection[str] = ()) -> list[str]:
    """Notes on the settings that differ between two arms beside the one that makes them.

    Args:
        arm_by: the column that makes the arms; `laver` covers LaVer's own settings. By `arm`, the name of a sweep's
            overrides, all that differs is what the arms are.
        allowed: settings that may differ although the arms' losses are then of other data.

    Raises:
        ValueError: the arms differ in their data or validation, with both values and the remedy.
    """
    names = hashed_settings(_all_laver(arms.values())) - {"laver", "train_iters", arm_by.removeprefix("config.")}
    found = {name: values for name in sorted(names) if (values := _difference(arms, f"config.{name}"))}
    refused = [name for name in found if name in OF_THE_LOSS and name not in allowed]
    if refused:
        lines = "".join(f"\n  - {name}: {found[name]}" for name in refused)
        raise ValueError(
            f"{' and '.join(arms)} cannot be compared: their runs differ in data or validation:{lines}\n  make them "
            f"alike, or compare them anyway with --allow-differences {' '.join(refused)}"
        )
    if arm_by == ARM_COLUMN:
        if difference := _difference(arms, "config.laver"):
            found = {"laver": difference, **found}
        return [f"{' and '.join(arms)} differ in {name} ({values})" for name, values in found.items()]
    return [
        f"{' and '.join(arms)} also differ in {name} ({values}): what differs between them may come from that"
        for name, values in found.items()
    ]


def _difference(arms: Mapping[str, Registry], column: str) -> str | None:
    """Both arms' values at the first place of the ladder where they differ; None where they don't. Places are size and
    tokens; size alone, or nothing, where the arms share none."""
    for place in (lambda run: (run.size(), run.value("tokens.total")), RunRecord.size, lambda run: None):
        ours, theirs = (_values(arm, column, place) for arm in arms.values())
        if shared := [key for key in ours if key in theirs]:
            break
        if column in ("config.lr_warmup_iters", "config.lr_wsd_decay_iters"):
            return None  # follow the iterations, of which other amounts of data have others
    for key in shared:
        if ours[key] != theirs[key]:
            both = zip((ours[key], theirs[key]), arms, strict=True)
            return ", ".join(f"{' and '.join(sorted(values))} in {name}" for values, name in both)
    return None


def _values(arm: Registry, column: str, place: Callable[[RunRecord], Hashable]) -> dict[Hashable, set[str]]:
    values: dict[Hashable, set[str]] = {}
    for run in arm.runs:
        values.setdefault(place(run), set()).add(text_of(run.value(column)))
    return values
