"""A short form of `chaos.py`: after faults of several kinds a run ends with the same bits."""

import json
import random

import pytest

from laver_megatron.resilience.status import read_status
from laver_megatron.resilience.status_report import run_report
from tests.faults.chaos import Disturbed, differences
from tests.runs import LAUNCHER, RealRun, flags_of

pytestmark = pytest.mark.processes
NUM_STEPS = 16
SETTINGS = {"train_iters": NUM_STEPS, "save_interval": 2, "keep_last": 3}


def test_after_random_faults_a_run_ends_with_the_same_bits(demo_dir, tmp_path, monkeypatch):
    """A stop in order, a flipped bit in the newest checkpoint, and a killed rank, which goes on from an older one."""
    calm = RealRun.launch(demo_dir, tmp_path / "calm", **SETTINGS)
    assert calm.wait() == 0, calm.log
    assert_in_order(calm.run_dir)
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    words = flags_of(demo_dir, tmp_path / "chaos", restarts=100, **SETTINGS)
    faults = ("terminate", "flip_byte", "kill_rank")
    run = Disturbed(tmp_path / "chaos", ["bash", str(LAUNCHER), *words], [], random.Random(0), faults, (3, 7, 8))
    run.finish(every_seconds=0, max_faults=3, deadline_seconds=600)
    assert differences(tmp_path / "calm", tmp_path / "chaos") == [], run.events
    assert [name for _, name, _ in run.events] == list(faults)
    assert run.endings == {0: 2}  # stopped, with a checkpoint, and done
    restarts = json.loads((tmp_path / "chaos" / "run_summary.json").read_text())["restarts"]
    assert [restart["cause"][6:] for restart in restarts] == [" was killed by SIGKILL (out of memory?)"], restarts


def assert_in_order(run_dir):
    """A run that nothing disturbs says that it is finished, accuses nobody, and its times add up."""
    status = read_status(run_dir)
    assert (status["state"], status["iteration"], status["world_size"]) == ("finished", NUM_STEPS, 2)
    assert status["loss"] > 0 and run_report(run_dir)["state"] == "finished"
    assert sum(status["ledger"]["seconds"].values()) == pytest.approx(status["updated"] - status["born"], abs=0.5)
    assert json.loads((run_dir / "run_summary.json").read_text())["goodput"]["share"] > 0
    assert (run_dir / "DONE").exists() and not (run_dir / "faults").exists()
