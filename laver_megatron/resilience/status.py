"""`run_dir/status.json`: what a run is doing, for people and schedulers who look from outside.

    state           starting, running, validating, saving; at the end finished, stopped (in order, before the last
                    iteration), failed, interrupted or hung
    phase, iteration, train_iters, loss, seconds_per_iteration, eta_seconds
    goodput         useful share of the time since the run was born; where the rest went: ledger (`goodput.py`)
    updated, started, phase_since   Unix times
    world_size, host, pid, job_id
    interval_seconds    how often the file is written
    message         of a failure or a hang
    ledger          seconds by cause, and what the accounts go on from

Rank 0 writes it every few seconds from a thread of its own: a file system that does not answer stops only that thread.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from laver_megatron.checkpoint.progress import Progress
from laver_megatron.config.fields import Config
from laver_megatron.resilience.goodput import Ledger, is_ledger, is_number
from laver_megatron.resilience.phases import DATA, SAVE, START, STEP, VALIDATE, now
from laver_megatron.runtime.files import read_small, write_text

FILE_NAME = "status.json"
FINISHED, STOPPED, FAILED, INTERRUPTED, HUNG = ENDED = ("finished", "stopped", "failed", "interrupted", "hung")
_STATES = {START: "starting", DATA: "running", STEP: "running", VALIDATE: "validating", SAVE: "saving"}
_RECENT = 20
_CLOCK_SECONDS = 2.0  # the time when a process began is known to the second
MOST_BYTES = 1 << 20  # of a file that is read; this one has some two thousand


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


# What each part of the file must be; those of the first are in every status.
_NEEDED: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("iteration", "train_iters", "pid", "world_size"), _is_count),
    **dict.fromkeys(("goodput", "updated", "started", "born", "phase_since", "interval_seconds"), is_number),
    **dict.fromkeys(("state", "phase", "host"), _is_text),
}
_OTHERS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("loss", "seconds_per_iteration", "eta_seconds", "hung_since"), is_number),
    **dict.fromkeys(("message", "job_id"), _is_text),
    "ledger": is_ledger,
}
_recent: deque[Mapping[str, Any]] = deque(maxlen=_RECENT)
_ledger: Ledger | None = None
_finished: int | None = None  # the last iteration of a run that had finished before


def note(record: Mapping[str, Any]) -> None:
    """The loop has finished an iteration; its record."""
    _recent.append(record)


def follow(progress: Progress) -> None:
    """The loop begins from here."""
    if _ledger is not None:
        _ledger.follow(progress)


def goodput() -> dict[str, Any] | None:
    """`Ledger.summary` of this run; None on ranks and in programs that keep no accounts."""
    return None if _ledger is None else _ledger.summary()


def open_accounts(run_dir: Path) -> None:
    """Goes on with the accounts of the run's last attempt, or begins new ones."""
    global _ledger, _finished
    _recent.clear()
    known = read_status(run_dir) or {}
    _finished = known["iteration"] if known.get("state") == FINISHED else None
    _ledger = Ledger(known.get("ledger") if _finished is None else None)


def is_as_before(train_iters: int) -> bool:
    """Whether the run had finished before this start, which has trained nothing: its status still holds."""
    return _finished is not None and _finished >= train_iters and not _recent


def close_accounts() -> None:
    """Nothing of this run is accounted for any more."""
    global _ledger
    _ledger = None


def status_of(config: Config, interval: float, ending: str | None = None, message: str | None = None) -> dict[str, Any]:
    """The content of the file, on the rank that keeps the accounts."""
    assert _ledger is not None
    moment, summary, time_now = now(), _ledger.summary(), time.time()
    # A copy: the loop may append meanwhile.
    records = list(_recent.copy())
    speed = sum(record["elapsed_seconds"] for record in records) / len(records) if records else None
    iteration = records[-1]["iteration"] if records else moment.iteration
    left = config.training.train_iters - iteration
    return {
        "state": ending or _STATES[moment.phase],
        "phase": moment.phase,
        "phase_since": time_now - (time.monotonic() - moment.since),
        "iteration": iteration,
        "train_iters": config.training.train_iters,
        "loss": records[-1]["loss"] if records else None,
        "seconds_per_iteration": speed,
        "eta_seconds": None if speed is None else left * speed,
        "goodput": summary["share"],
        "updated": time_now,
        "started": _ledger.started,
        "born": _ledger.born,
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job_id": os.environ.get("SLURM_JOB_ID"),
        "interval_seconds": interval,
        "message": message,
        "ledger": _ledger.plain(),
    }


def write_status(run_dir: Path, status: Mapping[str, Any]) -> None:
    """Puts the file into the run directory, whole or not at all. A number that is not finite becomes null."""
    loss = status.get("loss")
    finite = loss if loss is None or loss - loss == 0 else None
    write_text(run_dir / FILE_NAME, json.dumps({**status, "loss": finite}, indent=1, allow_nan=False) + "\n")


def change_status(run_dir: Path, **changes: Any) -> None:
    """Changes parts of the file that is there, on a rank that does not keep the accounts. Fails silently: it only
    tells what the process says in its log as well."""
    known = read_status(run_dir)
    if known is None:
        return
    try:
        write_status(run_dir, {**known, **changes})
    except (OSError, ValueError):
        return


def fail(run_dir: Path, message: str | None) -> None:
    """Says that the run failed, and why, on a rank that does not keep the accounts; where another has said so this
    rank's error only follows from that one's."""
    if (read_status(run_dir) or {}).get("state") not in (FAILED, HUNG):
        change_status(run_dir, state=FAILED, message=message, updated=time.time())


def set_cause(run_dir: Path, cause: str, *, is_hang: bool, since: float) -> None:
    """Says in the launcher's words why the run failed: the rank that wrote first may only have lost its peer, and a
    killed one wrote nothing.

    since: when the ranks were started. The status of an earlier start, or of another run, is left alone.
    """
    known = read_status(run_dir)
    if known is not None and known["started"] >= since - _CLOCK_SECONDS:
        change_status(run_dir, state=HUNG if is_hang else FAILED, message=cause, updated=time.time())


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """The content of the file; None if it is not there or is none of ours. Parts that are not what they should be, and
    those that this version does not know, are absent."""
    try:
        found = json.loads(read_small(run_dir / FILE_NAME, MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    status = {name: found[name] for name, fits in (_NEEDED | _OTHERS).items() if fits(found.get(name))}
    return status if status.keys() >= _NEEDED.keys() else None
