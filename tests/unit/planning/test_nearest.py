"""What is offered in place of layouts that cannot be, or that do not fit."""

import pytest

from laver_megatron.config.fields import ConfigError
from laver_megatron.planning.plan import layout_name
from laver_megatron.planning.search import check_possible, nearest_that_fits, search
from tests.unit.planning.plans import job_of

SEVEN = ("--model", "7b", "--gpu", "a100-80gb", "--seq-length", "2048", "--global-batch-size", "128")
TP, PP, CHUNK = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage",
)


def problems_of(job, pinned):
    with pytest.raises(ConfigError) as caught:
        check_possible(job, pinned)
    return caught.value.problems


@pytest.mark.parametrize(
    "pinned, reason, nearest",
    [
        ({TP: 8}, "does not divide the model's 28 attention heads", "TP 4 x "),
        ({TP: 16}, "reaches out of a machine of 8 GPUs", "TP 4 x "),
        ({TP: 3}, "3 does not divide the model's 28 attention heads", "TP 4 x "),
        ({PP: 3}, "16 processes cannot be divided", "x PP 4 x "),
        ({"micro_batch_size": 3}, "global_batch_size 128 is not a multiple of micro_batch_size 3", "micro-batch 4"),
        # One value is wrong: the others stay.
        ({TP: 8, "micro_batch_size": 2, "recompute_granularity": "full"}, "28 attention heads", "batch 2, full"),
        ({PP: 1, CHUNK: 2}, "needs pipeline_model_parallel_size above 1", "x PP 2 x DP 8, chunks of 2 layers"),
        ({CHUNK: 5}, "does not cut the 14 layers of a stage", "chunks of 7 layers"),
    ],
)
def test_impossible_layouts_say_why_and_what_is_near(pinned, reason, nearest):
    problems = problems_of(job_of(*SEVEN, "--gpus", "16"), pinned)
    assert any(reason in problem for problem in problems[:-1]), problems
    assert problems[-1].startswith("the nearest possible layout: ") and nearest in problems[-1], problems


def test_fewest_values_are_changed():
    """TP 8 alone is wrong; a layout that changed more values by less would be no nearer."""
    job = job_of(*SEVEN, "--gpus", "16")
    last = problems_of(job, {TP: 8, PP: 2, CHUNK: 1, "recompute_granularity": "full"})[-1]
    assert "TP 4 x PP 2 x DP 2, chunks of 1 layer, micro-batch" in last and "full recomputed" in last


@pytest.mark.parametrize(
    "gpus, pinned, number, batch",
    [
        (29, {}, 28, 116),
        (29, {TP: 2}, 28, None),
        (100000, {}, 14336, 1000),  # TP 4 x PP 28 x DP 128 are the most GPUs that a batch of 128 employs
    ],
)
def test_where_no_layout_is_possible_other_numbers_are_offered(gpus, pinned, number, batch):
    problems = problems_of(job_of(*SEVEN, "--gpus", str(gpus)), pinned)
    if TP in pinned:  # on 29 GPUs only without it
        assert any("cannot be divided into TP 2" in problem for problem in problems)
    offers = {line.rsplit(": ", 1)[0]: line.rsplit(": ", 1)[1] for line in problems if "that is possible: " in line}
    assert offers["the nearest number of GPUs that is possible"] == str(number), problems
    assert not any("the nearest possible layout" in line for line in problems)
    check_possible(job_of(*SEVEN, "--gpus", str(number)), pinned)
    if batch is not None:
        assert offers["the nearest global_batch_size that is possible"] == str(batch)
        check_possible(job_of(*SEVEN[:-1], str(batch), "--gpus", str(gpus)), pinned)


def test_the_nearest_layout_that_fits():
    """TP 1 x PP 1 of a 7B model is too large: one of the two is to change, and the other stays."""
    job = job_of(*SEVEN, "--gpus", "8")
    pinned = {TP: 1, PP: 1, "recompute_granularity": None}
    check_possible(job, pinned)
    assert not search(job, pinned).fitting
    nearest = nearest_that_fits(job, pinned)
    assert nearest.fits and nearest.config.parallel.recompute_granularity is None
    assert 1 in (
        nearest.config.parallel.tensor_model_parallel_size,
        nearest.config.parallel.pipeline_model_parallel_size,
    )


def test_where_nothing_fits_more_gpus_do():
    job = job_of("--model", "72b", "--gpus", "8", "--gpu", "h100-80gb")
    nearest = nearest_that_fits(job, {})
    assert nearest.fits and nearest.job.num_gpus in (16, 32) and not search(job).fitting
    assert str(nearest.job.num_gpus // 8) in layout_name(nearest.config, nearest.job.num_gpus)
    # A model that one GPU cannot hold a layer of is beyond help.
    tiny = job_of("--model", "72b", "--gpus", "8", "--gpu", "h100-80gb", "--gpu-memory", "3")
    assert nearest_that_fits(tiny, {}) is None


def test_an_offer_that_drops_what_was_given_says_so():
    """PP 29 cuts 28 layers on no number of GPUs: 28 GPUs help without it alone."""
    problems = problems_of(job_of(*SEVEN, "--gpus", "29"), {PP: 29})
    offers = [line for line in problems if "that is possible" in line]
    assert offers == [
        f"without {PP} 29: the nearest number of GPUs that is possible: 28",
        f"without {PP} 29: the nearest global_batch_size that is possible: 116",
    ]


def test_large_machines_are_no_reason_to_search_long():
    """Beyond the model's heads there is no tensor parallelism to look at; to look at a million sizes took hours."""
    job = job_of(*SEVEN, "--gpus", "29", "--gpus-per-node", "1000000")
    assert any("the nearest number of GPUs that is possible: 28" in line for line in problems_of(job, {}))
