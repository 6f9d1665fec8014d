"""What the watch of one rank writes into the run directory, and what it leaves alone."""

import json
import os
import socket
import sys
import time

import pytest

from laver_megatron.config.fields import Config
from laver_megatron.resilience import status
from laver_megatron.resilience.endings import without_advice
from laver_megatron.resilience.watchdog import Watch, watched
from tests.unit.resilience.test_status import STATUS

GLOO = (
    "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer "
    "[127.0.0.1]:31657. This is typically caused by a remote worker crashing. Check the logs of the remote worker "
    "before reporting an error. GLHF! \N{BEACH WITH UMBRELLA}"
)


class Heard:
    """The connection of a rank that has heard of rank 0."""

    def has_begun(self, rank):
        return rank == 0


@pytest.fixture
def config(tmp_path):
    return Config.of(data_path=("none",), seq_length=64, train_iters=60, run_dir=str(tmp_path / "run"))


@pytest.fixture
def run_dir(tmp_path):
    """Of a run that goes on: its status, and the empty stack file of its rank 1."""
    run_dir = tmp_path / "run"
    (run_dir / "faults").mkdir(parents=True)
    (run_dir / "faults" / "rank_0001_20260101_000000_1.txt").touch()
    write(run_dir)
    return run_dir


def write(run_dir, **changes):
    times = dict.fromkeys(("updated", "started", "born", "phase_since"), time.time())
    status.write_status(run_dir, {**STATUS, **times, "host": socket.gethostname(), "pid": os.getpid(), **changes})


def read(run_dir):
    return json.loads((run_dir / "status.json").read_text())


def content(run_dir):
    return {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


@pytest.fixture
def as_rank_1(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")


@pytest.mark.usefixtures("as_rank_1")
def test_before_rank_0_holds_the_directory_the_others_leave_it_alone(config, run_dir):
    """It may be another run's, which then refuses this one."""
    before = content(run_dir)
    with pytest.raises(ValueError, match="no data"), watched(config):
        raise ValueError("no data")
    assert content(run_dir) == before


@pytest.mark.usefixtures("as_rank_1")
def test_then_they_open_their_files_and_say_why_they_failed(config, run_dir):
    watch = Watch(config)
    watch._link = Heard()
    watch._open_stacks()
    (opened,) = (run_dir / "faults").iterdir()  # the one that a killed rank had left is gone
    assert opened.name.endswith(f"_{os.getpid()}.txt")
    watch._link = None
    watch.close(status.FAILED, "rank 1: disk full")
    assert (read(run_dir)["state"], read(run_dir)["message"]) == ("failed", "rank 1: disk full")
    assert not (run_dir / "faults").exists()


@pytest.mark.usefixtures("as_rank_1")
@pytest.mark.parametrize("state", [status.FAILED, status.HUNG])
def test_the_first_cause_stays(config, run_dir, state):
    watch = Watch(config)
    watch._link = Heard()
    watch._open_stacks()
    watch._link = None
    write(run_dir, state=state, message="rank 2: disk full")
    watch.close(status.FAILED, f"rank 1: {GLOO}")
    assert (read(run_dir)["state"], read(run_dir)["message"]) == (state, "rank 2: disk full")


@pytest.mark.parametrize("seconds_after, verdict, stays", [(1, None, False), (-1, None, True), (1, "rank 0", True)])
def test_stacks_stay_until_it_is_known_that_there_is_no_verdict(config, run_dir, seconds_after, verdict, stays):
    """A rank that held the GIL is ended by a signal, which lets its threads run once more. seconds_after: between its
    awakening and its last question to the store."""
    watch = Watch(config)
    (file,) = (run_dir / "faults").glob("rank_0000_*.txt")
    os.write(watch._stacks._file.fileno(), b"Thread 0x1")  # as the timer does
    watch._asked, watch._verdict = time.monotonic(), verdict
    watch._arm(woke=watch._asked - seconds_after)
    watch.close(status.FAILED)
    assert file.exists() == stays


class Gone:
    """A terminal, or a file of stacks, that answers no more."""

    def write(self, text):
        raise OSError(5, "Input/output error")

    def clear(self):
        raise OSError(5, "Input/output error")

    def arm(self, seconds):
        pass


def test_the_watch_outlives_a_file_system_and_a_terminal_that_are_gone(config, monkeypatch):
    """An error would end its thread, and leave the run unwatched."""
    watch = Watch(config)
    with monkeypatch.context() as context:
        context.setattr(sys, "stderr", Gone())
        context.setattr(watch, "_stacks", Gone())
        context.setattr(watch._stragglers, "line", lambda heard: "straggler: rank 1")
        watch._arm(woke=0.0)
        watch._heard = {0: watch._beat()}
        watch._look_for_fault(time.monotonic())
    watch.close(status.FAILED)


def test_gloo_gives_no_advice(config, run_dir):
    with pytest.raises(RuntimeError), watched(config):
        raise RuntimeError(GLOO)
    assert read(run_dir)["message"] == (
        f"rank 0 on {socket.gethostname()}: RuntimeError: [/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/"
        "pair.cc:553] Connection closed by peer [127.0.0.1]:31657"
    )
    assert without_advice("no space left. Free some.") == "no space left. Free some."


@pytest.mark.parametrize("train_iters, stays", [(60, True), (61, False)])
def test_a_finished_run_started_again_keeps_its_status(config, run_dir, train_iters, stays):
    write(run_dir, state=status.FINISHED, iteration=60)
    before = read(run_dir)
    with watched(config.replace(train_iters=train_iters)):
        pass
    assert (read(run_dir) == before) == stays


def test_a_finished_run_that_trains_again_says_so(config, run_dir):
    write(run_dir, state=status.FINISHED, iteration=60)
    with watched(config):
        status.note({"iteration": 1, "loss": 2.0, "elapsed_seconds": 1.0})
    assert (read(run_dir)["state"], read(run_dir)["iteration"]) == ("stopped", 1)


def test_what_goes_wrong_with_the_status_hides_no_error(config, run_dir, monkeypatch):
    def fails(*arguments):
        raise TypeError

    monkeypatch.setattr(status, "status_of", fails)
    with watched(config):
        pass
    with pytest.raises(ValueError, match="the cause"), watched(config):
        raise ValueError("the cause")
