"""Finding the summaries of a study's runs, and judging them.

What cannot be part of a fit is named with its reason, and refused unless it is asked to be left out:

    unfinished   state is not finished, or there is a run directory without a summary
    nan          a number is NaN, infinite, or null, which is how a run writes such a one
    duplicate    another run has the same configuration hash and seed; the one written last is kept
    damaged      no JSON, another version, numbers that are missing or cannot be, or sums over a part of the iterations
"""

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from laver_megatron.run_log.run_summary import FILE_NAME, FINISHED, FORMAT, UNFINISHED, VERSION
from laver_megatron.studies.registry import FAULTS, SIZE_PARTS, TOKEN_KINDS, Fault, Registry, Run, is_number

# Files that only a run directory has; without a summary beside them the run never saved.
_RUN_FILES = ("config.yaml", "metrics.jsonl")
_NUMBERS = (
    "iteration", "counted_iterations", "seed", *(f"parameters.{part}" for part in SIZE_PARTS),
    *(f"tokens.{kind}" for kind in TOKEN_KINDS), "flops.model",
)  # fmt: skip
_WHOLE = ("iteration", "counted_iterations", "seed")
_TEXTS = ("state", "config_hash", "time.written_at")
# Null is a value of a setting, and of what a run without validation has not.
_MAY_BE_NULL = ("config.", "hardware.")
_WITHOUT_VALUES = ("validation", "training")


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
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"{path} does not exist")
        if path.is_file():
            if path.name != FILE_NAME:
                raise ValueError(f"{path} is no {FILE_NAME}")
            found.append(path.parent)
            continue
        found += [file.parent for file in path.rglob(FILE_NAME)]
        found += [file.parent for file in path.rglob(_RUN_FILES[0]) if (file.parent / _RUN_FILES[1]).exists()]
    if not found:
        raise ValueError(f"no {FILE_NAME} in {', '.join(map(str, paths))}; every run writes one when it saves")
    # A directory that is reached by two names is one run.
    return sorted({path.resolve(): path for path in reversed(found)}.values())


def _read_run(directory: Path) -> Run | Fault:
    path = directory / FILE_NAME
    if not path.exists():
        return Fault(directory, "unfinished", f"has {' and '.join(_RUN_FILES)} and no {FILE_NAME}: it never saved")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        columns = dict(_flattened(content)) if isinstance(content, dict) else {}
    except (OSError, ValueError, RecursionError) as error:
        return Fault(directory, "damaged", f"{FILE_NAME} cannot be read: {error}")
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("version") != VERSION:
        kind = (content.get("format"), content.get("version")) if isinstance(content, dict) else type(content).__name__
        return Fault(directory, "damaged", f"{FILE_NAME} is {kind}, not {(FORMAT, VERSION)}")
    run = Run(directory, columns)
    problems = [*_damage(run)]
    return Fault(directory, "damaged", f"{FILE_NAME} {'; '.join(problems)}") if problems else run


def _damage(run: Run) -> Iterator[str]:
    """What every summary has and this one has not."""
    names = (*_NUMBERS, *_TEXTS)
    if missing := [name for name in names if name not in run.columns]:
        yield f"lacks {', '.join(missing)}"
    for name in _NUMBERS:
        value = run.value(name)
        if name in run.columns and not (is_number(value) and value >= 0):
            yield f"says {name} is {_short(value)}, no number from 0 on"
        elif name in run.columns and name in _WHOLE and value != int(value):
            yield f"says {name} is {_short(value)}, no whole number"
    for name in _TEXTS:
        if name in run.columns and not isinstance(run.value(name), str):
            yield f"says {name} is {_short(run.value(name))}, no text"
    if isinstance(state := run.value("state"), str) and state not in (FINISHED, UNFINISHED):
        yield f"says state is {state!r}, neither {FINISHED} nor {UNFINISHED}"
    if not any(name.startswith("config.") for name in run.columns):
        yield "lacks config"


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**20 else f"of {value.bit_length()} bits"
    return text if len(text) <= 40 else f"{text[:40]}..."


def _flattened(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(value) if isinstance(value, list) else value


def _faults_of(run: Run) -> Iterator[Fault]:
    """At most one fault: the first is reason enough."""
    state, iteration, counted = (run.value(name) for name in ("state", "iteration", "counted_iterations"))
    null = [name for name, value in run.columns.items() if _is_nan(name, value)]
    if state != FINISHED:
        yield Fault(run.path, "unfinished", f"is at iteration {iteration} of {run.value('train_iters')}")
    elif null:
        yield Fault(run.path, "nan", f"{', '.join(null)} was NaN or infinite")
    elif counted != iteration:
        yield Fault(
            run.path, "damaged", f"its tokens, FLOPs and time are sums over {counted} of {iteration} iterations"
        )


def _is_nan(name: str, value: Any) -> bool:
    if value is None:
        return not name.startswith(_MAY_BE_NULL) and name not in _WITHOUT_VALUES
    return isinstance(value, float) and not math.isfinite(value)


def _duplicates(runs: Sequence[Run]) -> Iterator[Fault]:
    same: dict[tuple[Any, Any], list[Run]] = {}
    for run in runs:
        same.setdefault((run.value("config_hash"), run.value("seed")), []).append(run)
    for (digest, seed), group in same.items():
        *older, newest = sorted(group, key=lambda run: (run.value("time.written_at"), run.path))
        for run in older:
            yield Fault(
                run.path, "duplicate", f"has configuration {digest} and seed {seed}, as the newer {newest.path}"
            )
