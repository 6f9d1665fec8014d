"""The arms of an ablation against its baseline: differences of runs with the same seed, and their intervals.

Everything is read from a sweep's manifest.csv (which run is which arm and seed) and the last record of each run's
validation.jsonl. Runs of one seed read the same data in the same order, so their difference has less noise than either.

Letters: A arms, S seeds.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from laver_megatron.run_log.records import read_records
from laver_megatron.run_log.run_summary import FILE_NAME, FINISHED, MANIFEST, VISUAL_SIMILARITY
from laver_megatron.runtime.files import read_object
from laver_megatron.studies.observations import first_few
from laver_megatron.studies.pairs import mean_and_interval

LOSS, ACCURACY = "lm_loss", "answer_accuracy"
# How alike the visual tokens of an image are: behind the vision head, and after the decoder's last layer.
SIMILARITIES = ("student_visual_similarity", "teacher_visual_similarity", "visual_similarity.last")
_NOT_RESULTS = ("iteration", "elapsed_seconds")


@dataclass(frozen=True)
class ArmResult:
    """One arm and its finished runs by seed.

    Attributes:
        seeds: the last validation, each number under its name.
        runs: the names of the runs.
    """

    name: str
    seeds: Mapping[int, Mapping[str, Any]]
    runs: Mapping[int, str]

    def values(self, column: str) -> list[float]:
        """Of the seeds that have the column, in the order of the seeds."""
        return [record[column] for _, record in sorted(self.seeds.items()) if record.get(column) is not None]


@dataclass(frozen=True)
class Difference:
    """An arm minus the baseline in one column: the mean over the seeds that both have, and its interval, which a
    single seed does not have."""

    num_seeds: int
    mean: float
    low: float | None
    high: float | None

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def read_results(sweep: Path) -> tuple[list[ArmResult], list[str]]:
    """The arms in the order of the manifest's first mention, and the runs that are left out: their names, each with the
    reason. A run that ended with a loss that is no number is one of these: it has no place in a mean.

    Raises:
        ValueError: no manifest, one that cannot be read or has no arms, a finished run without validation, or runs of
            models of different depth.
    """
    path = sweep / MANIFEST
    if not path.is_file():
        raise ValueError(f"{sweep} has no {MANIFEST}; name the directory that `laver sweep --output` made")
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read ({error}); make the sweep again") from error
    if not rows or {"name", "arm", "seed"} - rows[0].keys():
        raise ValueError(f"{path} has no runs with name, arm and seed")
    for number, row in enumerate(rows, start=1):
        if not (row["name"] and row["arm"]):
            raise ValueError(f"{path}: run {number} has no name or no arm; make the sweep again")
        if not str(row["seed"]).isdecimal():
            raise ValueError(f"{path}: the seed {row['seed']!r} is no integer; make the sweep again")
    arms: dict[str, dict[int, dict[str, Any]]] = {}
    names: dict[str, dict[int, str]] = {}
    left = []
    for row in rows:
        directory = sweep / "runs" / row["name"]
        seeds = arms.setdefault(row["arm"], {})
        if not _is_finished(directory):
            left.append(f"{row['name']} (not finished)")
        elif LOSS not in (record := _last_validation(directory)):
            left.append(f"{row['name']} ({LOSS} is no number)")
        elif (seed := int(row["seed"])) in seeds:
            raise ValueError(f"{path}: two runs of arm {row['arm']} have the seed {seed}; keep one amount and size")
        else:
            seeds[seed] = record
            names.setdefault(row["arm"], {})[seed] = row["name"]
    results = [ArmResult(name, seeds, names.get(name, {})) for name, seeds in arms.items()]
    _check_depths(results)
    return results, left


def _check_depths(arms: Sequence[ArmResult]) -> None:
    """Raises ValueError, with two runs and their numbers, if the curves over the layers differ in length."""
    lengths: dict[int, str] = {}
    for arm in arms:
        for seed, record in arm.seeds.items():
            if VISUAL_SIMILARITY in record:
                lengths.setdefault(len(record[VISUAL_SIMILARITY]), arm.runs[seed])
    if len(lengths) > 1:
        (length, run), (other, other_run), *_ = lengths.items()
        raise ValueError(
            f"{VISUAL_SIMILARITY} has {length} layers in {run} and {other} in {other_run}: runs of models of different "
            "depth cannot be compared; keep one size"
        )


def _is_finished(directory: Path) -> bool:
    path = directory / FILE_NAME
    return path.is_file() and read_object(path).get("state") == FINISHED


def _last_validation(directory: Path) -> dict[str, Any]:
    path = directory / "validation.jsonl"
    records = read_records(path) if path.is_file() else []
    if not records:
        raise ValueError(f"{directory} is finished but has no validation; train with valid_data_path and eval_interval")
    return dict(_flat(records[-1]))


def _flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Finite numbers of a record, those of an object within it under `its name.theirs`; the curve over the layers, and
    the last of it."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif name in _NOT_RESULTS:
            continue
        elif name == VISUAL_SIMILARITY and isinstance(value, list) and all(isinstance(it, float) for it in value):
            yield prefix + name, value
            yield from _flat({f"{name}.last": value[-1]} if value else {}, prefix)
        elif isinstance(value, (int, float)) and math.isfinite(value):
            yield prefix + name, value


def result_columns(arms: Sequence[ArmResult]) -> list[str]:
    """What the table shows: the language loss, the accuracies, and the similarities that are there."""
    names = dict.fromkeys(name for arm in arms for record in arm.seeds.values() for name in record)
    accuracies = sorted(name for name in names if name.startswith(ACCURACY))
    return [name for name in (LOSS, *accuracies, *SIMILARITIES) if name in names]


def difference(arm: ArmResult, baseline: ArmResult, column: str, level: float = 0.95) -> Difference | None:
    """None where no seed has the column in both."""
    pairs = [
        (arm.seeds[seed].get(column), baseline.seeds[seed].get(column))
        for seed in sorted(arm.seeds.keys() & baseline.seeds.keys())
    ]
    differences = np.array([ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None])
    if not len(differences):
        return None
    return Difference(len(differences), *mean_and_interval(differences, level))


def find_baseline(arms: Sequence[ArmResult], name: str) -> ArmResult:
    """The arm of this name.

    Raises:
        ValueError: there is none, or it has no finished run.
    """
    found = {arm.name: arm for arm in arms}
    if name not in found:
        raise ValueError(f"there is no arm {name!r}; --baseline is one of {first_few(list(found), 12)}")
    if not found[name].seeds:
        raise ValueError(f"no run of the baseline {name!r} is finished with a loss; run the sweep first")
    return found[name]


def markdown(arms: Sequence[ArmResult], baseline: ArmResult, left: Sequence[str] = ()) -> str:
    """Two tables: every arm's mean over its seeds, and its differences to the baseline with their intervals. Runs that
    were left out are named below."""
    columns = result_columns(arms)
    heads = [_head(column) for column in columns]
    means = [["arm", "seeds", *heads]]
    differences = [["arm minus " + baseline.name, "pairs", *heads]]
    for arm in arms:
        cells = [_mean(arm.values(column)) for column in columns]
        means.append([arm.name, str(len(arm.seeds)), *cells])
        if arm is not baseline:
            found = [difference(arm, baseline, column) for column in columns]
            pairs = str(max((item.num_seeds for item in found if item), default=0))
            differences.append([arm.name, pairs, *map(_interval, found)])
    note = "95% intervals by Student's t over pairs of runs with the same seed; bold: the interval leaves out 0."
    notes = [note, f"Left out: {', '.join(left)}."] if left else [note]
    return "\n\n".join([_table(means), _table(differences), *notes]) + "\n"


def _head(column: str) -> str:
    return column.removeprefix(ACCURACY).strip("/._ ") or "accuracy"


def _mean(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f}" if values else "-"


def _interval(item: Difference | None) -> str:
    if item is None:
        return "-"
    if item.low is None:
        return f"{item.mean:+.3f}"
    text = f"{item.mean:+.3f} [{item.low:+.3f}, {item.high:+.3f}]"
    return f"**{text}**" if item.is_clear else text


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
