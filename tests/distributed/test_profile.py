"""`--profile` over a pipeline: a table and a trace of each stage, whose parts are that stage's."""

import gzip
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
