"""A short form of `chaos.py`: after faults of several kinds a run ends with the same bits."""

import json
import random

import pytest

from tests.faults.chaos import Disturbed, differences
from tests.runs import LAUNCHER, RealRun, flags_of

pytestmark = pytest.mark.processes
NUM_STEPS = 16
SETTINGS = {"train_iters": NUM_STEPS, "save_interval": 2, "keep_last": 3}


def test_after_random_faults_a_run_ends_with_the_same_bits(demo_dir, tmp_path, monkeypatch):
    """A stop in order, a flipped bit in the newest checkpoint, and a killed rank, which goes on from an older one."""
    calm = RealRun.launch(demo_dir, tmp_path / "calm", **SETTINGS)
    assert calm.wait() == 0, calm.log
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    words = flags_of(demo_dir, tmp_path / "chaos", restarts=100, **SETTINGS)
    faults = ("terminate", "flip_byte", "kill_rank")
    run = Disturbed(tmp_path / "chaos", ["bash", str(LAUNCHER), *words], [], random.Random(0), faults, (3, 7, 8))
    run.finish(every_seconds=0, max_faults=3, deadline_seconds=600)
    assert differences(tmp_path / "calm", tmp_path / "chaos") == [], run.events
    assert [name for _, name, _ in run.events] == list(faults)
    restarts = json.loads((tmp_path / "chaos" / "run_summary.json").read_text())["restarts"]
    assert [restart["cause"][6:] for restart in restarts] == [" was killed by SIGKILL (out of memory?)"], restarts
