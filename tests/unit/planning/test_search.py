"""Which layouts are tried, which are possible, and what is offered where none is or none fits."""

from dataclasses import replace

import pytest

from laver_megatron.config.fields import ConfigError
from laver_megatron.planning.pipeline import layers_of_stages
from laver_megatron.planning.plan import layout_name, plan_layout
from laver_megatron.planning.search import (
    FIRST,
    LAST,
    check_possible,
    divisors,
    layout_problems,
    layouts,
    nearest_that_fits,
    search,
)
from tests.unit.planning.plans import job_of

SEVEN = ("--model", "7b", "--gpu", "h100-80gb", "--seq-length", "2048", "--global-batch-size", "128")
TP, PP, CHUNK = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage",
)


def possible(job, **pinned):
    return [config for config in layouts(job, pinned) if not layout_problems(job, config)]


@pytest.mark.parametrize(
    "gpus, pinned",
    [
        # None of these is possible at TP 1 x PP 1 without chunks: the other values must be searched.
        (256, {"recompute_granularity": None}),
        (1024, {"recompute_granularity": "full"}),
        (1024, {"micro_batch_size": 1}),
        (16, {CHUNK: 2}),
        # And these are not among the usual values.
        (16, {"micro_batch_size": 16}),
        (24, {"micro_batch_size": 16}),
        (24, {PP: 3}),
        (24, {PP: 3, FIRST: 8}),
        (24, {PP: 3, LAST: 6}),
        (16, {PP: 4, FIRST: 4, LAST: 6}),
    ],
)
def test_what_is_pinned_is_held_and_the_rest_searched(gpus, pinned):
    job = job_of(*SEVEN, "--gpus", str(gpus))
    found = possible(job, **pinned)
    assert found
    assert all(config.flat()[field] == value for config in found for field, value in pinned.items())


def test_every_kind_of_layout_is_gone_through():
    job = job_of(*SEVEN, "--gpus", "16")
    found = possible(job)
    assert len(set(found)) == len(found)
    for field in (TP, PP, CHUNK, "micro_batch_size", "recompute_granularity", FIRST, LAST):
        assert len({config.flat()[field] for config in found}) > 1, field


def test_whatever_is_found_can_be_asked_for():
    """Every possible layout is found again if all its values are pinned, and is the only one."""
    job = job_of(*SEVEN, "--gpus", "24")
    found = possible(job)
    assert len(found) > 100
    for config in found[:: len(found) // 40]:
        fields = (TP, PP, CHUNK, "micro_batch_size", "recompute_granularity", FIRST, LAST)
        pinned = {field: config.flat()[field] for field in fields}
        given = {
            field: value for field, value in pinned.items() if value is not None or field == "recompute_granularity"
        }
        again = possible(job, **given)
        assert config in again
        if CHUNK in given or FIRST in given and LAST in given:
            assert again == [config]


@pytest.mark.parametrize(
    "pp, splits",
    [
        (4, [[7, 7, 7, 7]]),
        (3, [[8, 10, 10], [10, 10, 8], [9, 10, 9], [10, 9, 9], [9, 9, 10]]),
        (8, [[2, *[4] * 6, 2], [7, *[3] * 7], [*[3] * 7, 7], [5, *[3] * 6, 5]]),
        # 9 x 4 - 28 = 8 too many: neither end has them to give, but one has one more.
        (9, [[4, *[3] * 8], [*[3] * 8, 4]]),
        (13, [[4, *[2] * 12], [*[2] * 12, 4], [3, *[2] * 11, 3]]),
        (29, []),
    ],
)
def test_layers_that_do_not_divide(pp, splits):
    """28 layers: the ends have fewer than the other stages, or more, and no split is gone through twice."""
    job = job_of(*SEVEN, "--gpus", str(pp))
    found = [
        [chunks[0] for chunks in layers_of_stages(config, 28)]
        for config in possible(job, **{PP: pp, "micro_batch_size": 1, "recompute_granularity": None})
        if config.parallel.num_layers_per_virtual_pipeline_stage is None
    ]
    assert sorted(found) == sorted(splits) and all(sum(split) == 28 for split in found)


@pytest.mark.parametrize(
    "pinned, splits",
    [
        ({FIRST: 8}, [[8, 10, 10]]),
        ({FIRST: 9}, [[9, 10, 9], [9, 9, 10]]),
        ({LAST: 7}, [[10, 11, 7], [11, 10, 7]]),
        ({FIRST: 1, LAST: 1}, [[1, 26, 1]]),
    ],
    ids=str,
)
def test_an_end_that_is_given_stays(pinned, splits):
    job = job_of(*SEVEN, "--gpus", "3", "--global-batch-size", "126")
    one = {PP: 3, "micro_batch_size": 1, "recompute_granularity": None}
    found = [[chunks[0] for chunks in layers_of_stages(config, 28)] for config in possible(job, **one, **pinned)]
    assert sorted(found) == sorted(splits)


def test_two_stages_are_told_in_one_way():
    """9 layers: 4 and 5, or 5 and 4, each once."""
    job = job_of(*SEVEN, "--gpus", "2")
    job = replace(job, shape=replace(job.shape, num_layers=9))
    found = possible(job, **{PP: 2, "micro_batch_size": 1, "recompute_granularity": None})
    assert sorted([chunks[0] for chunks in layers_of_stages(config, 9)] for config in found) == [[4, 5], [5, 4]]


def test_a_lighter_stage_holds_and_takes_less():
    job = job_of(*SEVEN, "--gpus", "3", "--global-batch-size", "126")
    by_ends = {(config.flat()[FIRST], config.flat()[LAST]): config for config in possible(job, **{PP: 3})}
    lighter, other = plan_layout(job, by_ends[8, None]), plan_layout(job, by_ends[None, 8])
    assert lighter.stages[0].state.total < other.stages[0].state.total
    assert lighter.stages[0].activations.layers < other.stages[0].activations.layers
    assert lighter.stages[0].seconds.matmul < other.stages[0].seconds.matmul
    assert lighter.stages[-1].seconds.matmul > other.stages[-1].seconds.matmul
    assert sum(stage.seconds.attention for stage in lighter.stages) == pytest.approx(
        sum(stage.seconds.attention for stage in other.stages)
    )


def test_sequences_that_do_not_divide_are_not_split():
    odd = job_of("--model", "7b", "--gpu", "h100-80gb", "--gpus", "8", "--seq-length", "1001", "--visual-share", "0.73")
    found = possible(odd, **{TP: 2})
    assert found and not any(config.parallel.sequence_parallel for config in found)
    even = job_of(*SEVEN, "--gpus", "8")
    assert all(
        config.parallel.sequence_parallel == (config.parallel.tensor_model_parallel_size > 1)
        for config in possible(even)
    )
    config = possible(even, **{TP: 2})[0]
    whole = plan_layout(even, config.replace(sequence_parallel=False))
    assert whole.fullest.activations.total > plan_layout(even, config).fullest.activations.total


def test_tensor_parallelism_stays_within_a_machine():
    """Machines of six: groups of four straddle them, unless all is one machine."""
    six = job_of(*SEVEN, "--gpus", "16", "--gpus-per-node", "6")
    assert not possible(six, **{TP: 4}) and possible(six, **{TP: 2})
    (reason,) = {problem for config in layouts(six, {TP: 4, PP: 1}) for problem in layout_problems(six, config)}
    assert "reaches out of a machine of 6 GPUs" in reason and "use 1, 2, 3, 6" in reason
    assert possible(job_of(*SEVEN, "--gpus", "4", "--gpus-per-node", "6"), **{TP: 4})


def test_replicas_that_straddle_machines_use_the_network():
    """TP 2 x DP 2 fills machines of four, not those of six."""
    four, six = (job_of(*SEVEN, "--gpus", "8", "--gpus-per-node", number) for number in ("4", "6"))
    config = next(iter(possible(four, **{TP: 2, PP: 2, CHUNK: None})))
    near, far = plan_layout(four, config), plan_layout(six, config)
    assert near.stages[0].sent == far.stages[0].sent
    assert far.stages[0].seconds.data_parallel > 5 * near.stages[0].seconds.data_parallel


def test_divisors():
    assert divisors(1) == [1] and divisors(12) == [1, 2, 3, 4, 6, 12] and divisors(49) == [1, 7, 49]
    assert len(divisors(2 * 10**9)) == 110  # not by trying all numbers


SEVEN_ON_A100 = ("--model", "7b", "--gpu", "a100-80gb", "--seq-length", "2048", "--global-batch-size", "128")
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
    problems = problems_of(job_of(*SEVEN_ON_A100, "--gpus", "16"), pinned)
    assert any(reason in problem for problem in problems[:-1]), problems
    assert problems[-1].startswith("the nearest possible layout: ") and nearest in problems[-1], problems


def test_fewest_values_are_changed():
    """TP 8 alone is wrong; a layout that changed more values by less would be no nearer."""
    job = job_of(*SEVEN_ON_A100, "--gpus", "16")
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
    problems = problems_of(job_of(*SEVEN_ON_A100, "--gpus", str(gpus)), pinned)
    if TP in pinned:  # on 29 GPUs only without it
        assert any("cannot be divided into TP 2" in problem for problem in problems)
    offers = {line.rsplit(": ", 1)[0]: line.rsplit(": ", 1)[1] for line in problems if "that is possible: " in line}
    assert offers["the nearest number of GPUs that is possible"] == str(number), problems
    assert not any("the nearest possible layout" in line for line in problems)
    check_possible(job_of(*SEVEN_ON_A100, "--gpus", str(number)), pinned)
    if batch is not None:
        assert offers["the nearest global_batch_size that is possible"] == str(batch)
        check_possible(job_of(*SEVEN_ON_A100[:-1], str(batch), "--gpus", str(gpus)), pinned)


def test_the_nearest_layout_that_fits():
    """TP 1 x PP 1 of a 7B model is too large: one of the two is to change, and the other stays."""
    job = job_of(*SEVEN_ON_A100, "--gpus", "8")
    pinned = {TP: 1, PP: 1, "recompute_granularity": None}
    check_possible(job, pinned)
    assert not search(job, pinned).fitting
    nearest = nearest_that_fits(job, pinned)
    assert nearest.fits and nearest.config.parallel.recompute_granularity is None
    assert 1 in (
        nearest.config.parallel.tensor_model_parallel_size,
        nearest.config.parallel.pipeline_model_parallel_size,
    )


@pytest.mark.processes
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
    problems = problems_of(job_of(*SEVEN_ON_A100, "--gpus", "29"), {PP: 29})
    offers = [line for line in problems if "that is possible" in line]
    assert offers == [
        f"without {PP} 29: the nearest number of GPUs that is possible: 28",
        f"without {PP} 29: the nearest global_batch_size that is possible: 116",
    ]


def test_large_machines_are_no_reason_to_search_long():
    """Beyond the model's heads there is no tensor parallelism to look at; to look at a million sizes took hours."""
    job = job_of(*SEVEN_ON_A100, "--gpus", "29", "--gpus-per-node", "1000000")
    assert any("the nearest number of GPUs that is possible: 28" in line for line in problems_of(job, {}))
