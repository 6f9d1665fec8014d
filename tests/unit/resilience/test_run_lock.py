"""Two runs in one directory: the second refuses, and what a dead run has left is taken over."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from laver_megatron.resilience.run_lock import LOCK_FILE, STALE_SECONDS, RunLock, hold, refuse_second

ROOT = Path(__file__).resolve().parents[3]
HOLDER = (
    "import os, sys, time\nfrom pathlib import Path\nfrom laver_megatron.resilience.run_lock import RunLock\n"
    "lock = RunLock(Path(sys.argv[1])); lock.acquire()\n"
    "reader = os.fork()\nif reader == 0: time.sleep(60); os._exit(0)\nprint(reader, flush=True)\ntime.sleep(60)\n"
)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock, and has forked another, as a run does its readers."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "SLURM_JOB_ID": "77"}
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    reader = int(process.stdout.readline())
    yield process
    process.kill()
    process.wait()
    os.kill(reader, signal.SIGKILL)


def content(**changes) -> str:
    """What another run has left."""
    return json.dumps({"host": "elsewhere", "pid": 1, "job_id": None, "began": 0.0, "heartbeat": 0.0, **changes})


@pytest.mark.processes
def test_the_second_refuses_and_names_the_first(tmp_path, holder):
    before = (tmp_path / LOCK_FILE).read_text()
    with pytest.raises(ValueError, match=f"process {holder.pid} on {socket.gethostname()}, job 77"):
        RunLock(tmp_path).acquire()
    with pytest.raises(SystemExit) as left:
        refuse_second(tmp_path)
    assert left.value.code == 2 and (tmp_path / LOCK_FILE).read_text() == before


def test_a_launcher_takes_nothing(tmp_path):
    """Neither where there is no lock, nor one that a run has left."""
    refuse_second(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / LOCK_FILE).write_text(before := content(host=socket.gethostname()))
    refuse_second(tmp_path)
    assert (tmp_path / LOCK_FILE).read_text() == before
    RunLock(tmp_path).acquire()


@pytest.mark.processes
def test_what_a_killed_run_leaves_is_taken_over_at_once(tmp_path, holder, capsys):
    """Although a process that it had forked still lives."""
    holder.kill()
    holder.wait()
    lock = RunLock(tmp_path)
    lock.acquire()
    assert f"gone: process {holder.pid} on" in capsys.readouterr().err
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    lock.release()


def test_released_it_is_free_without_a_word(tmp_path, capsys):
    for _ in range(2):
        lock = RunLock(tmp_path)
        lock.acquire()
        lock.release()
    assert capsys.readouterr().err == ""


def test_a_holder_on_another_machine_counts_while_it_gives_signs(tmp_path, capsys):
    """Where locks do not reach other machines."""
    path = tmp_path / LOCK_FILE
    path.write_text(content())
    with pytest.raises(ValueError, match="process 1 on elsewhere"):
        RunLock(tmp_path).acquire()
    os.utime(path, (time.time(), time.time() - STALE_SECONDS - 5))
    RunLock(tmp_path).acquire()
    assert "gone: process 1 on elsewhere" in capsys.readouterr().err


def test_a_job_that_is_started_again_elsewhere_takes_its_own(tmp_path, monkeypatch):
    (tmp_path / LOCK_FILE).write_text(content(job_id="77"))
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    RunLock(tmp_path).acquire()


def test_another_process_with_the_holders_number_is_not_the_holder(tmp_path):
    (tmp_path / LOCK_FILE).write_text(content(host=socket.gethostname(), pid=os.getpid()))
    RunLock(tmp_path).acquire()


@pytest.mark.parametrize(
    "text",
    [
        "", '{"host": ', "[]", "\x00\x00", "\xff\xfe", "null", "[" * 4000, content(pid=-1), content(pid=10**400),
        content(host=None), content(pid="1"), content(began="x"), content(began=10**400), "x" * (1 << 20),
    ],
)  # fmt: skip
def test_a_file_that_names_no_holder_belongs_to_nobody(tmp_path, text, capsys):
    """Torn, or written by something else; as if it were from another machine just now."""
    (tmp_path / LOCK_FILE).write_text(text, encoding="latin-1")
    RunLock(tmp_path).acquire()
    assert capsys.readouterr().err == ""
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_a_file_of_any_size_is_not_read_whole(tmp_path):
    path = tmp_path / LOCK_FILE
    path.touch()
    os.truncate(path, 3 << 40)  # more than any memory
    RunLock(tmp_path).acquire()
    assert path.stat().st_size < 4096


def test_a_sign_from_the_future_counts_as_one_of_now(tmp_path):
    """It does not hold the directory for years."""
    path = tmp_path / LOCK_FILE
    path.write_text(content())
    os.utime(path, (4e9, 4e9))
    with pytest.raises(ValueError, match="process 1 on elsewhere"):
        RunLock(tmp_path).acquire()
    assert path.stat().st_mtime == pytest.approx(time.time(), abs=60)


def test_what_another_machine_calls_itself_is_escaped(tmp_path):
    (tmp_path / LOCK_FILE).write_text(content(host="\x1b[2J\u202eevil\ud800", job_id="\n7"))
    with pytest.raises(ValueError) as refused:
        RunLock(tmp_path).acquire()
    assert r"process 1 on \x1b[2J\u202eevil\ud800, job \n7;" in str(refused.value) and str(refused.value).isprintable()


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "directory"])
def test_what_is_no_file_is_refused_and_left_alone(tmp_path, kind, capsys):
    path, target = tmp_path / LOCK_FILE, tmp_path / "target"
    if kind == "link":
        target.write_text("precious")
    if "link" in kind:
        path.symlink_to(target)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(SystemExit) as ended:
        hold(tmp_path)
    assert ended.value.code == 2
    assert f"{path} is not a regular file, as the lock of a run must be: remove it" in capsys.readouterr().err
    assert (target.read_text() == "precious") if kind == "link" else not target.exists()
