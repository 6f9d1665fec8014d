"""What a run directory says of its run, for people: `status.json` held against the process, the clock, the markers and
the checkpoints that are there."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from laver_megatron.checkpoint.choice import next_choice
from laver_megatron.resilience.goodput import is_number
from laver_megatron.resilience.status import ENDED, FILE_NAME, FINISHED, MOST_BYTES, STOPPED, read_status
from laver_megatron.run_log.run_summary import RESTARTS_FILE
from laver_megatron.runtime.files import read_small
from laver_megatron.runtime.terminal import printable

NOT_STARTED, GONE, UNREADABLE = "not started", "gone", "unreadable"
PREEMPTED = "preempted"
_MARKERS = {"DONE": FINISHED, "PREEMPTED": PREEMPTED}
# What a run or those who prepare one put into its directory.
_TRACES = ("config.yaml", "run_summary.json", "metrics.jsonl", "checkpoints", "faults", RESTARTS_FILE, *_MARKERS)
_MISSED = 12  # intervals; shared file systems show a file late
_LEAST_SECONDS = 30.0


def run_report(run_dir: Path) -> dict[str, Any]:
    """The run's status with what can be seen from here: `state` is also `gone` (no sign of life for too long),
    `not started` or `unreadable`, and there are `last_checkpoint` (from which the next start would go on, by the quick
    check), `damaged_checkpoints` (what is wrong with newer ones), `restarts`, `last_restart` and `age_seconds`.

    Raises:
        ValueError: the directory is not there, or is not that of a run.
    """
    if not run_dir.is_dir():
        problem = " is not a directory; give the run's --run-dir" if run_dir.exists() else ": no such directory"
        raise ValueError(f"{run_dir}{problem}")
    status = read_status(run_dir)
    is_there = os.path.lexists(run_dir / FILE_NAME)
    if not is_there and not any((run_dir / name).exists() for name in _TRACES):
        named = ", ".join((FILE_NAME, *_TRACES[:3]))
        raise ValueError(f"{run_dir} is not the directory of a run: it has no {named} or {_TRACES[3]}; give --run-dir")
    restarts, choice = _restarts(run_dir), next_choice(run_dir)
    seen: dict[str, Any] = {
        "last_checkpoint": str(choice.checkpoint) if choice.checkpoint else None,
        "damaged_checkpoints": list(choice.passed_over),
        "restarts": len(restarts),
        "last_restart": restarts[-1] if restarts else None,
    }
    if status is None:
        return {"state": UNREADABLE if is_there else NOT_STARTED, **seen}
    age = time.time() - status["updated"]
    return {**status, "state": _state(run_dir, status, age), "age_seconds": age, **seen}


def _state(run_dir: Path, status: Mapping[str, Any], age: float) -> str:
    """What the status says, unless a marker or the process says otherwise."""
    for marker, state in _MARKERS.items():
        path = run_dir / marker
        if path.exists() and path.stat().st_mtime >= status["started"]:
            return state
    if status["state"] in ENDED:
        return status["state"]
    is_here = status["host"] == socket.gethostname()
    is_late = age > max(_LEAST_SECONDS, _MISSED * status["interval_seconds"])
    return GONE if is_late or (is_here and not _is_alive(status["pid"])) else status["state"]


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _restarts(run_dir: Path) -> list[dict[str, Any]]:
    """The supervisor's lines, without what is none; a torn last one is left out."""
    try:
        lines = read_small(run_dir / RESTARTS_FILE, MOST_BYTES).splitlines()
    except (OSError, ValueError):
        return []
    restarts = []
    for line in lines:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            restarts.append({name: it for name, it in found.items() if is_number(it) or isinstance(it, str)})
    return restarts


# --- in words ------------------------------------------------------------------------------------------


def report_text(run_dir: Path, report: Mapping[str, Any]) -> str:
    """The report in a few lines."""
    return "\n".join(_lines(run_dir, report)) + "\n"


def _lines(run_dir: Path, report: Mapping[str, Any]) -> Iterator[str]:
    yield f"{run_dir}: {_headline(report)}"
    if report.get("message"):
        yield f"  why         {printable(report['message'])}"
    if "iteration" in report:
        loss = f", loss {report['loss']:.4f}" if "loss" in report else ""
        yield f"  iteration   {report['iteration']} of {report['train_iters']}{loss}"
    if report.get("seconds_per_iteration"):
        goes_on = report["state"] not in (*ENDED, PREEMPTED, GONE) and "eta_seconds" in report
        left = f", {duration(report['eta_seconds'])} to go" if goes_on else ""
        yield f"  speed       {report['seconds_per_iteration']:.3g} s an iteration{left}"
    if "ledger" in report:
        seconds = report["ledger"]["seconds"]
        rest = sorted(((value, name) for name, value in seconds.items()), reverse=True)
        parts = ", ".join(f"{name} {duration(value)}" for value, name in rest if value >= 0.5)
        yield f"  goodput     {report['goodput']:.1%} of {duration(report['updated'] - report['born'])}: {parts}"
    damaged = report["damaged_checkpoints"]
    yield f"  checkpoint  {report['last_checkpoint'] or ('none that is whole' if damaged else 'none yet')}"
    for problem in damaged:
        yield f"  damaged     {printable(problem)}"
    if report["restarts"]:
        cause = printable(str(report["last_restart"].get("cause", "cause unknown")))
        yield f"  restarts    {report['restarts']}, the last: {cause}"
    if "host" in report:
        job = f", job {report['job_id']}" if report.get("job_id") else ""
        where = f"{report['world_size']} ranks; rank 0 is process {report['pid']} on {report['host']}{job}"
        yield f"  where       {printable(where)}"


def _headline(report: Mapping[str, Any]) -> str:
    state = report["state"]
    if state == NOT_STARTED:
        return f"has not started, or was trained by a version without {FILE_NAME}"
    if state == UNREADABLE:
        return f"its state is unknown: {FILE_NAME} cannot be read, or was not written by a run"
    phase = printable(report.get("phase", ""))
    age = duration(report["age_seconds"])
    ago = f"{age} ago"
    if state == GONE:
        return f"not updated for {age} (phase {phase}): rank 0 was killed, is stopped or cut off"
    if state == "hung":
        return f"hung, ended by the watchdog {ago}"
    if state in (*ENDED, PREEMPTED):
        return f"{state} {ago}" + (", in order before its last iteration" if state in (STOPPED, PREEMPTED) else "")
    in_phase = report["updated"] - report["phase_since"]
    return f"{printable(state)} (phase {phase} for {duration(in_phase)}; updated {ago})"


def duration(seconds: float) -> str:
    """Seconds in the two units that matter."""
    whole = round(max(seconds, 0.0))
    for size, unit, small, lower in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // small} {lower}"
    return f"{whole} s"
