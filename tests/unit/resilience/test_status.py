"""`status.json` and what `laver status` makes of it."""

import json
import math
import os
import socket
import subprocess
import sys
import time

import pytest

from laver_megatron.__main__ import main
from laver_megatron.checkpoint.progress import Progress
from laver_megatron.resilience import status
from laver_megatron.resilience.goodput import CARRIED, KEPT, is_ledger
from laver_megatron.resilience.status_report import duration, report_text, run_report
from tests.attacks import cut, write_checkpoint

SECONDS = dict.fromkeys((*KEPT, *CARRIED), 0.0)
LEDGER = {
    "born": 1.7e9, "at": 1.7e9, "seconds": {**SECONDS, "step": 75.0, "start": 20.0, "save": 5.0},
    **dict.fromkeys(("base", "progress"), dict.fromkeys(("training_seconds", "data_seconds", "skipped_seconds"), 0.0)),
}  # fmt: skip
STATUS = {
    "state": "running", "phase": "step", "iteration": 12, "train_iters": 60, "loss": 1.25, "seconds_per_iteration": 2.0,
    "eta_seconds": 96.0, "goodput": 0.75, "world_size": 4, "job_id": None, "interval_seconds": 5.0, "message": None,
    "ledger": LEDGER,
}  # fmt: skip


def write(run_dir, **changes):
    now = time.time()
    times = {"updated": now, "started": now - 100, "born": now - 100, "phase_since": now - 1}
    content = {**STATUS, **times, "host": socket.gethostname(), "pid": os.getpid(), **changes}
    run_dir.mkdir(exist_ok=True)
    status.write_status(run_dir, content)


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "run"


def shown(run_dir, capsys, *flags):
    main(["status", str(run_dir), *flags])
    return capsys.readouterr().out


def test_a_run_that_runs(run_dir, capsys):
    write(run_dir)
    text = shown(run_dir, capsys)
    assert text.startswith(f"{run_dir}: running (phase step for 1 s; updated 0 s ago)\n")
    assert "iteration   12 of 60, loss 1.2500" in text and "2 s an iteration, 1 min 36 s to go" in text
    assert "goodput     75.0% of 1 min 40 s: step 1 min 15 s, start 20 s, save 5 s\n" in text
    assert "checkpoint  none yet" in text and f"process {os.getpid()} on" in text


def test_json(run_dir, capsys):
    write(run_dir)
    report = json.loads(shown(run_dir, capsys, "--json"))
    assert report["state"] == "running" and report["restarts"] == 0 and report["age_seconds"] < 10


@pytest.mark.processes
def test_a_process_that_is_gone(run_dir, capsys):
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    write(run_dir, pid=done.pid)
    assert run_report(run_dir)["state"] == "gone"
    assert "not updated for" in shown(run_dir, capsys)
    # On another host its number says nothing; the time does.
    write(run_dir, pid=done.pid, host="elsewhere")
    assert run_report(run_dir)["state"] == "running"
    write(run_dir, pid=done.pid, host="elsewhere", updated=time.time() - 300)
    assert run_report(run_dir)["state"] == "gone"


@pytest.mark.parametrize("state", status.ENDED)
def test_a_run_that_has_ended(run_dir, capsys, state):
    write(run_dir, state=state, updated=time.time() - 7200, message="rank 3: disk full" if state == "failed" else None)
    text = shown(run_dir, capsys)
    assert text.startswith(f"{run_dir}: {state}") and "2 h 0 min ago" in text and "to go" not in text
    assert ("why         rank 3: disk full" in text) == (state == "failed")


def test_markers_of_this_attempt_count(run_dir):
    write(run_dir)
    for name, state in (("PREEMPTED", "preempted"), ("DONE", "finished")):
        (run_dir / name).touch()
        assert run_report(run_dir)["state"] == state
        assert "to go" not in report_text(run_dir, run_report(run_dir))
    for name in ("PREEMPTED", "DONE"):
        os.utime(run_dir / name, (1, 1))  # left by an earlier attempt
    assert run_report(run_dir)["state"] == "running"


def test_restarts_and_the_last_checkpoint(run_dir, capsys):
    write(run_dir)
    lines = [json.dumps({"attempt": number, "cause": f"cause {number}"}) for number in (1, 2)]
    (run_dir / "restarts.jsonl").write_text("\n".join(lines) + '\n{"attempt": 3, "ca')
    older, newest = (write_checkpoint(run_dir / "checkpoints", iteration) for iteration in (10, 20))
    text = shown(run_dir, capsys)
    assert "restarts    2, the last: cause 2" in text and f"checkpoint  {newest}\n" in text
    cut(newest / "__0_0.distcp")
    text = shown(run_dir, capsys)
    assert f"checkpoint  {older}\n  damaged     {newest}/__0_0.distcp has " in text
    (older / "manifest.json").unlink()
    assert "checkpoint  none that is whole\n" in shown(run_dir, capsys)


def test_a_run_that_never_started(run_dir, capsys):
    run_dir.mkdir()
    (run_dir / "config.yaml").touch()
    assert "has not started" in shown(run_dir, capsys)


MISSING = "status.json, config.yaml, run_summary.json, metrics.jsonl or checkpoints"


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda path: None, ": no such directory"),
        (lambda path: path.touch(), " is not a directory; give the run's --run-dir"),
        (
            lambda path: (path / "notes").mkdir(parents=True),
            f" is not the directory of a run: it has no {MISSING}; give --run-dir",
        ),
    ],
)
def test_a_directory_that_is_none(run_dir, capsys, make, said):
    make(run_dir)
    with pytest.raises(SystemExit) as ended:
        main(["status", str(run_dir)])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {run_dir}{said}\n"


def test_a_loss_that_is_not_a_number_is_null(run_dir):
    for loss in (math.nan, math.inf):
        write(run_dir, loss=loss)
        assert json.loads((run_dir / "status.json").read_text())["loss"] is None


def test_damaged_files_are_no_status(run_dir):
    run_dir.mkdir()
    foreign = json.dumps({**STATUS, "pid": "1; rm"})
    for text in ("", "{", "[]", foreign, "{}"):
        (run_dir / "status.json").write_text(text)
        assert status.read_status(run_dir) is None
    status.change_status(run_dir, state="failed")
    assert (run_dir / "status.json").read_text() == "{}"


WRONG = [[], {}, "x", "\x1b[2J", True, -1e400, 10**400, 1e30]
DEEP = "[" * 100_000


@pytest.mark.parametrize("name", [*STATUS, "updated", "started", "born", "phase_since", "host", "pid"])
def test_a_part_of_a_wrong_type_is_absent(run_dir, capsys, name):
    """Nothing that a status may say ends the program by an error, or reaches the terminal as it is."""
    write(run_dir)
    content = json.loads((run_dir / "status.json").read_text())
    texts = [json.dumps({it: value for it, value in content.items() if it != name})]
    texts += [json.dumps({**content, name: value}) for value in [*WRONG, None]]
    for text in texts:
        (run_dir / "status.json").write_text(text)
        seen = shown(run_dir, capsys)
        assert all(it.isprintable() for it in seen.splitlines())
        json.loads(shown(run_dir, capsys, "--json"), parse_constant=pytest.fail)
    is_needed = name not in ("loss", "seconds_per_iteration", "eta_seconds", "job_id", "message", "ledger")
    assert run_report(run_dir)["state"] == ("unreadable" if is_needed else "running")
    assert name not in run_report(run_dir) or name == "state"


@pytest.mark.parametrize("name", ["status.json", "restarts.jsonl"])
@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "huge", "binary", "deep"])
def test_what_is_no_small_file_is_not_read(run_dir, capsys, name, kind):
    write(run_dir)
    path = run_dir / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "directory":
        path.mkdir()
    else:
        path.write_bytes({"binary": b"\xff\x00\n", "deep": DEEP.encode()}.get(kind, b""))
    if kind == "huge":
        os.truncate(path, 3 << 40)
    report = run_report(run_dir)
    assert report["state"] == ("unreadable" if name == "status.json" else "running") and report["restarts"] == 0
    assert ("its state is unknown: status.json cannot be read" in shown(run_dir, capsys)) == (name == "status.json")


def test_lines_of_restarts_that_are_none(run_dir, capsys):
    write(run_dir)
    lines = ["[1]", "null", "5", '"x"', DEEP, '{"attempt": NaN, "cause": "\\u001b[2Jgone", "rank": [[]]}']
    (run_dir / "restarts.jsonl").write_text("\n".join(lines))
    assert r"restarts    1, the last: \x1b[2Jgone" in shown(run_dir, capsys)
    assert run_report(run_dir)["last_restart"] == {"cause": "\x1b[2Jgone"}


def changed(path, value):
    """The ledger with another value at a place; `...` takes it away."""
    ledger = json.loads(json.dumps(LEDGER))
    part = ledger
    for name in path[:-1]:
        part = part[name]
    if value is ...:
        del part[path[-1]]
    else:
        part[path[-1]] = value
    return ledger


PLACES = [
    ("born",),
    ("at",),
    ("base",),
    ("progress",),
    ("seconds",),
    ("progress", "training_seconds"),
    ("seconds", "lost"),
]


@pytest.mark.parametrize("path", PLACES)
def test_accounts_that_are_not_whole_begin_anew(run_dir, path):
    assert is_ledger(LEDGER)
    for value in (..., None, "x", {}, [], True, 10**400):
        write(run_dir, ledger=changed(path, value))
        status.open_accounts(run_dir)
        status.follow(Progress())
        summary = status.goodput()
        status.close_accounts()
        assert summary is not None and summary["wall_seconds"] < 3600 and summary["seconds"]["restart"] == 0


def test_accounts_go_on(run_dir):
    write(run_dir)
    status.open_accounts(run_dir)
    status.follow(Progress())
    summary = status.goodput()
    status.close_accounts()
    assert summary is not None and summary["wall_seconds"] == pytest.approx(time.time() - 1.7e9, abs=60)
    assert summary["seconds"]["save"] >= 5


def test_durations():
    assert [duration(it) for it in (0.4, 61, 3661, 90000)] == ["0 s", "1 min 1 s", "1 h 1 min", "1 d 1 h"]
