"""By which settings the runs of a study differ, where they should differ by size, amount of data and arm alone."""

import csv
import json
from collections.abc import Callable, Collection, Hashable, Mapping

import numpy as np

from laver_megatron.config.fields import fields_of
from laver_megatron.run_log.run_summary import MANIFEST, hashed_settings
from laver_megatron.studies.observations import cluster
from laver_megatron.studies.registry import Registry, RunRecord, text_of

# What a ladder is made of: the size's model, and the amount of data.
_LADDER_SETTINGS = {"load", "model", "encoder", "train_iters"}
# Data and validation: with others, a difference of two losses is none of the arms'.
OF_THE_LOSS = {item.name for item in fields_of("data")} | {"eval_iters"}
_DATA_PATH = "config.data_path"


def varying_settings(runs: Registry) -> list[str]:
    """Settings that decide a run's numbers and differ between the runs of one arm, other than those a ladder is made
    of. Subsets of the data are a ladder's amounts where the sweep that made the runs says so, which checked that they
    are nested."""
    has_laver = all(run.value("config.laver") for run in runs.runs)
    names = [f"config.{name}" for name in sorted(hashed_settings(has_laver) - _LADDER_SETTINGS)]
    varying = [name for name in names if len({repr(run.value(name)) for run in runs.runs}) > 1]
    if _DATA_PATH in varying and all(map(_sees_its_amount, runs.runs)):
        varying.remove(_DATA_PATH)
    return varying


def setting_notes(runs: Registry) -> list[str]:
    """What a reader should know of the settings by which the runs of one arm differ."""
    varying, notes = varying_settings(runs), []
    if _DATA_PATH in varying and _follows_tokens(runs):
        varying.remove(_DATA_PATH)
        notes.append(
            f"{_DATA_PATH} changes with the number of tokens: right where these are nested subsets "
            "(tools/subset_shards.py); what else differs between the data, the law takes for an effect of D"
        )
    if varying:
        notes.append(f"the runs also differ in {', '.join(varying)}, which the law takes for noise")
    return notes


def _follows_tokens(runs: Registry) -> bool:
    """Whether each amount of data is of one path, and each path of one amount."""
    tokens_R = np.array([run.value("tokens.total") for run in runs.runs], dtype=float)
    both = {(run.value(_DATA_PATH), number) for run, number in zip(runs.runs, cluster(tokens_R).tolist(), strict=True)}
    return len(both) == len({path for path, _ in both}) == len({number for _, number in both})


def _sees_its_amount(run: RunRecord) -> bool:
    """Whether the manifest of the run's sweep names its data as the amount."""
    path = run.path.resolve().parent.parent / MANIFEST
    if not path.is_file():
        return False
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            if line.get("config_hash") == run.value("config_hash") and line.get("seed") == str(run.value("seed")):
                return json.dumps([line.get("amount")]) == run.value(_DATA_PATH)
    return False


def check_equal_settings(arms: Mapping[str, Registry], arm_by: str, allowed: Collection[str] = ()) -> list[str]:
    """Notes on the settings that differ between two arms beside the one that makes them.

    arm_by: the column that makes the arms; of `laver`, LaVer's own settings belong to it, too. allowed: settings that
    may differ although the arms' losses are then of other data.

    Raises:
        ValueError: the arms differ in their data or validation, with both values and the remedy.
    """
    has_laver = all(run.value("config.laver") for runs in arms.values() for run in runs.runs)
    names = hashed_settings(has_laver) - {"laver", "train_iters", arm_by.removeprefix("config.")}
    found = {name: shown for name in sorted(names) if (shown := _difference(arms, f"config.{name}"))}
    refused = {name: shown for name, shown in found.items() if name in OF_THE_LOSS and name not in allowed}
    if refused:
        lines = "".join(f"\n  - {name}: {shown}" for name, shown in refused.items())
        raise ValueError(
            f"{' and '.join(arms)} cannot be compared: their runs differ in data or validation:{lines}\n  make them "
            f"alike, or compare them all the same with --allow-differences {' '.join(refused)}"
        )
    return [
        f"{' and '.join(arms)} also differ in {name} ({shown}): what differs between them may come from that"
        for name, shown in found.items()
    ]


def _difference(arms: Mapping[str, Registry], column: str) -> str | None:
    """Both arms' values at the first place of the ladder where they differ; None where they don't. Places are size and
    tokens; size alone, or nothing, where the arms share none."""
    for place in (lambda run: (run.size(), run.value("tokens.total")), lambda run: run.size(), lambda run: None):
        ours, theirs = (_values(runs, column, place) for runs in arms.values())
        shared = [key for key in ours if key in theirs]
        if shared:
            break
        if column == "config.lr_warmup_iters":
            return None  # follows the iterations, of which other amounts of data have others
    for key in shared:
        if ours[key] != theirs[key]:
            both = zip((ours[key], theirs[key]), arms, strict=True)
            return ", ".join(f"{' and '.join(sorted(values))} in {name}" for values, name in both)
    return None


def _values(runs: Registry, column: str, place: Callable[[RunRecord], Hashable]) -> dict[Hashable, set[str]]:
    values: dict[Hashable, set[str]] = {}
    for run in runs.runs:
        values.setdefault(place(run), set()).add(text_of(run.value(column)))
    return values
