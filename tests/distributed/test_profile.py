"""`--profile` over a pipeline: a table and a trace of each stage, whose parts are that stage's."""

import contextlib
import gzip
import io
import json

import pytest

from laver_megatron import train
from tests.distributed.build import make_config, synthetic_data
from tests.distributed.harness import Layout

LAYOUT = Layout(tp=2, pp=2, sp=True)


def run(layout, config):
    """Job: `train` with a window of two iterations."""
    with synthetic_data():
        train.train(train.setup(config))


@pytest.fixture(scope="module")
def profile_dir(pool, assets, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("profile") / "run"
    window = {"profile": True, "profile_step_start": 1, "profile_step_end": 3}
    pool.run(run, LAYOUT, make_config(assets, run_dir, LAYOUT, train_iters=4, micro_batch_size=1, **window))
    return run_dir / "profile"


def run_and_listen(layout, config):
    """Job: `run`, and what it prints."""
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        run(layout, config)
    return printed.getvalue()


@pytest.fixture(scope="module")
def with_a_checkpoint(pool, assets, tmp_path_factory):
    """The folder of a profile that a checkpoint ends, what the run says, and what one says that goes on from there."""
    run_dir, layout = tmp_path_factory.mktemp("short_profile") / "run", Layout()
    settings = {"profile": True, "profile_step_start": 1, "profile_step_end": 3, "save_interval": 2}
    config = make_config(assets, run_dir, layout, train_iters=5, micro_batch_size=1, **settings)
    printed = [pool.run(run_and_listen, layout, config.replace(exit_interval=interval))[0] for interval in (4, None)]
    return run_dir / "profile", printed


def test_a_checkpoint_ends_the_profile(with_a_checkpoint):
    folder, (printed, _) = with_a_checkpoint
    assert "# Profile: stage-0, iterations 2 to 2\n" in (folder / "stage-0.md").read_text()
    assert printed.count("profiled 1 iteration: ") == 1
    with gzip.open(folder / "stage-0.trace.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"] if event.get("cat") == "user_annotation"]
    assert names.count("step") == 1


def test_a_profile_that_is_over_is_said_so(with_a_checkpoint):
    _, (first, resumed) = with_a_checkpoint
    assert "the profiled iterations (2 to 3) have passed, as the run is at iteration 4: nothing is prof" in resumed
    assert "have passed" not in first and "profiled 1" not in resumed


def shares(path):
    rows = [line.strip("| ").split(" | ") for line in path.read_text().splitlines() if line.startswith("| ")]
    return {part: float(share.rstrip("%")) for part, _, share in rows[1:]}


def test_a_table_of_each_stage(profile_dir):
    names = [f"stage-{stage}.{kind}" for stage in (0, 1) for kind in ("md", "trace.json.gz")]
    assert sorted(path.name for path in profile_dir.iterdir()) == names
    first, last = (shares(profile_dir / f"stage-{stage}.md") for stage in (0, 1))
    for found in (first, last):
        assert found.pop("step") == 100 and sum(found.values()) == pytest.approx(100, abs=1)
        assert all(found[part] > 0 for part in ("data wait", "student", "teacher", "optimizer", "communication"))
        assert found["pipeline, bubbles"] > 0
    assert first["encoder"] > 0 == last["encoder"]
    assert last["heads"] > 0 == first["heads"] and last["losses"] > 0 == first["losses"]
    assert "iterations 2 to 3" in (profile_dir / "stage-0.md").read_text()


def test_the_trace_holds_the_parts(profile_dir):
    with gzip.open(profile_dir / "stage-1.trace.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"] if event.get("cat") == "user_annotation"]
    assert names.count("step") == 2 and {"student", "teacher", "heads", "losses", "optimizer", "EMA"} <= set(names)
