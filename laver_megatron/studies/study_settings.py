"""The settings by which the runs of a study differ, where only size, amount of data and arm should."""

import csv
import json
from collections.abc import Callable, Collection, Hashable, Mapping

import numpy as np

from laver_megatron.config.fields import fields_of
from laver_megatron.run_log.run_summary import MANIFEST, hashed_settings
from laver_megatron.studies.observations import cluster
from laver_megatron.studies.registry import Registry, RunRecord, text_of

# What makes a size, and an amount of data.
_LADDER_SETTINGS = {"load", "model", "encoder", "train_iters"}
# With other data or validation, a difference of two losses says nothing of the arms.
OF_THE_LOSS = {item.name for item in fields_of("data")} | {"eval_iters"}
_DATA_PATH = "config.data_path"


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
            "(tools/subset_shards.py); what else differs between the data, the law takes for an effect of D"
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
        arm_by: the column that makes the arms; to `laver` belong LaVer's own settings, too.
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
            f"alike, or compare them all the same with --allow-differences {' '.join(refused)}"
        )
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
        if column == "config.lr_warmup_iters":
            return None  # follows the iterations, of which other amounts of data have others
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
