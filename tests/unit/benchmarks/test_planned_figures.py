"""What is written of the planner's figures is what the planner says today, and the ladder has its best layouts."""

from pathlib import Path

import pytest

from laver_megatron.config.command_line import load_config
from laver_megatron.planning.search import FIRST, LAST
from tools.benchmarks.planned_figures import (
    BIGGER,
    LADDER,
    PAPER_FLAGS,
    bigger_models_table,
    ladder_head,
    ladder_plan,
    paper_tables,
)

ROOT = Path(__file__).parents[3]
DOCUMENT = (ROOT / "docs/planning.md").read_text()
AT_ONCE = ("0.5b", "7b")
OTHER_SIZE = pytest.mark.slow(reason="other sizes of the ladder, seconds each")
SIZES = [pytest.param(size, marks=[] if size in AT_ONCE else OTHER_SIZE) for size in LADDER]
LAYOUT = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "num_layers_per_virtual_pipeline_stage",
    "sequence_parallel", "micro_batch_size", "recompute_granularity", FIRST, LAST,
    # And what the layout is the best for.
    "seq_length", "visual_seq_length", "global_batch_size", "bf16",
)  # fmt: skip


def test_every_file_has_a_plan():
    assert set(LADDER) == {path.stem for path in (ROOT / "examples/scaling").glob("*.yaml")}


@pytest.mark.parametrize("size", SIZES)
def test_heads_of_the_ladder(size):
    file = ROOT / "examples/scaling" / f"{size}.yaml"
    assert "\n".join([*ladder_head(size), "# Expect:"]) in file.read_text()
    config, planned = load_config(["--config", str(file)]), ladder_plan(size).config
    assert set(LAYOUT) <= config.flat().keys()
    assert {name: config.flat()[name] for name in LAYOUT} == {name: planned.flat()[name] for name in LAYOUT}


def test_the_papers_set_up():
    assert f"laver plan {PAPER_FLAGS}\n" in DOCUMENT
    for line in paper_tables():
        assert line in DOCUMENT.splitlines(), line


@pytest.mark.parametrize("size", SIZES)
def test_bigger_models(size):
    assert set(BIGGER) == set(LADDER)
    lines = bigger_models_table([size])
    assert len(lines) == 3
    for line in lines:
        assert line in DOCUMENT.splitlines(), line
