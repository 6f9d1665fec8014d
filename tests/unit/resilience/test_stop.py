"""When the ranks agree to stop and to save, in a process group of one."""

import json
import time

import pytest

from laver_megatron.config.fields import Config
from laver_megatron.resilience import signals, stop
from laver_megatron.runtime.backend import shut_down_parallelism
from tests.distributed.harness import Layout, join


@pytest.fixture
def step_end(tmp_path, monkeypatch):
    """Of a run with some settings, at its start."""
    for name in ("SLURM_JOB_END_TIME", signals.STARTED, "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    join(Layout(), seed=3)

    def make(**settings):
        needed = {"data_path": ("none",), "seq_length": 8, "visual_seq_length": 8, "train_iters": 9}
        return stop.StepEnd(Config.of(**{**needed, "run_dir": str(tmp_path), **settings}))

    yield make
    shut_down_parallelism()


def test_nobody_asks(step_end):
    assert step_end().agree(1) == stop.Agreement(None, False)


def test_a_signal(step_end, monkeypatch):
    monkeypatch.setattr(signals, "_asked", 10)
    assert step_end().agree(1).stop == "as SIGUSR1 asks"


def test_the_exit_interval(step_end):
    end = step_end(exit_interval=3)
    assert [end.agree(iteration).stop for iteration in (2, 3)] == [None, "a multiple of --exit-interval 3"]


def test_the_duration_counts_from_the_launchers_start(step_end, monkeypatch):
    end = step_end(exit_duration_minutes=60)
    assert end.agree(1).stop is None
    monkeypatch.setenv(signals.STARTED, str(time.time() - 3601))
    assert end.agree(1).stop == "after --exit-duration-minutes 60"


def test_slurms_limit_leaves_time_for_two_saves(step_end, monkeypatch):
    end = step_end()
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 1000))
    assert end.agree(1).stop is None
    end._last_end -= 500  # a save that took as long
    end.saved()
    assert end.agree(1).stop == "before SLURM's time limit"


def test_saving_by_the_clock_counts_from_the_last_save(step_end):
    end = step_end(save_interval_minutes=10)
    end._last_save -= 599
    assert not end.agree(1).save
    end._last_save -= 2
    assert end.agree(1).save
    end.saved()
    assert not end.agree(2).save
    never = step_end(save_interval_minutes=None)
    never._last_save -= 1e9
    assert not never.agree(1).save


def test_markers_say_how_it_ended_and_go_with_the_next_start(step_end, tmp_path):
    end = step_end(exit_interval=5)
    end.agree(5)
    end.mark(5)
    content = json.loads((tmp_path / stop.PREEMPTED).read_text())
    assert (content["iteration"], content["reason"]) == (5, "a multiple of --exit-interval 5")
    step_end().mark(9)
    assert not (tmp_path / stop.PREEMPTED).exists()
    assert json.loads((tmp_path / stop.DONE).read_text())["reason"] == "finished"
