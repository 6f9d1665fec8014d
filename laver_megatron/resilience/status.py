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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from laver_megatron.checkpoint.progress import Progress
from laver_megatron.config.fields import Config
from laver_megatron.resilience.goodput import Ledger
from laver_megatron.resilience.phases import DATA, SAVE, START, STEP, VALIDATE, now
from laver_megatron.runtime.files import write_text

FILE_NAME = "status.json"
FINISHED, STOPPED, FAILED, INTERRUPTED, HUNG = ENDED = ("finished", "stopped", "failed", "interrupted", "hung")
_STATES = {START: "starting", DATA: "running", STEP: "running", VALIDATE: "validating", SAVE: "saving"}
_RECENT = 20

_recent: deque[Mapping[str, Any]] = deque(maxlen=_RECENT)
_ledger: Ledger | None = None


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
    global _ledger
    _recent.clear()
    known = read_status(run_dir) or {}
    goes_on = "ledger" in known and known.get("state") != FINISHED
    try:
        _ledger = Ledger(known["ledger"] if goes_on else None)
    except (KeyError, TypeError, ValueError):  # of another version
        _ledger = Ledger()


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
    except OSError:
        return


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """The content of the file; None if it is not there or is none of ours."""
    try:
        status = json.loads((run_dir / FILE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return status if isinstance(status, dict) and _is_whole(status) else None


def _is_whole(status: Mapping[str, Any]) -> bool:
    numbers = ("iteration", "train_iters", "goodput", "updated", "started", "born", "phase_since", "interval_seconds")
    return (
        all(isinstance(status.get(name), (int, float)) for name in numbers)
        and all(isinstance(status.get(name), int) for name in ("pid", "world_size"))
        and all(isinstance(status.get(name), str) for name in ("state", "phase", "host"))
        and isinstance(status.get("ledger"), dict)
        and isinstance(status["ledger"].get("seconds"), dict)
    )
