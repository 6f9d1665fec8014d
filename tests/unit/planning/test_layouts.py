"""The layouts that a search goes through: those that are usual, those that were asked for, and uneven ones."""

from dataclasses import replace

import pytest

from laver_megatron.planning.pipeline import layers_of_stages
from laver_megatron.planning.plan import plan_layout
from laver_megatron.planning.search import FIRST, LAST, divisors, layout_problems, layouts
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
