"""The teacher follows the student's weights exactly, at every layout, and nothing else moves it."""

import json
from collections import Counter
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from laver_megatron.checkpoint.writer import RankWriter
from laver_megatron.objective import schedules
from laver_megatron.train import run_schedule, train, train_step
from tests.distributed.build import (
    assert_same_bits,
    before_the_update,
    make_config,
    make_trainer,
    snapshot,
    synthetic_data,
)
from tests.distributed.harness import Layout


def pairs(trainer):
    return trainer.teacher._pairs


# --- the average ---------------------------------------------------------------------------------------


def average_in_fp64(layout, config, num_steps):
    """Job: an fp64 EMA of this rank's student weights beside the run; the largest deviation of the teacher from
    it, and how far the teacher went, both relative to the tensor's largest entry."""
    trainer = make_trainer(config)
    oracle = [pair.student.detach().double() for pair in pairs(trainer)]
    start = [tensor.clone() for tensor in oracle]
    num_updates = 0
    for step in range(num_steps):
        train_step(trainer)
        if (step + 1) % config.objective.ema_interval == 0:
            momentum = schedules.ema_momentum(step, config.objective, config.training.train_iters)
            oracle = [
                momentum * average + (1 - momentum) * pair.student.detach().double()
                for average, pair in zip(oracle, pairs(trainer), strict=True)
            ]
            num_updates += 1
    deviation = distance = 0.0
    for pair, average, first in zip(pairs(trainer), oracle, start, strict=True):
        scale = average.abs().max()
        deviation = max(deviation, float((pair.teacher - average).abs().max() / scale))
        distance = max(distance, float((average - first).abs().max() / scale))
    return num_updates, deviation, distance


AVERAGED_AT = (Layout(), Layout(dp=2), Layout(tp=2), Layout(pp=2))


@pytest.mark.parametrize(
    "layout, interval",
    [
        *((layout, 1) for layout in AVERAGED_AT),
        (Layout(), 3),
        *(
            pytest.param(
                layout, 3, marks=pytest.mark.slow(reason="when to update is decided without regard to the layout")
            )
            for layout in AVERAGED_AT[1:]
        ),
    ],
    ids=str,
)
def test_equals_an_fp64_average_of_the_students_weights(pool, assets, tmp_path, layout, interval):
    config = make_config(assets, tmp_path, layout, ema_interval=interval, ema_momentum_schedule="cosine")
    num_steps = 3 + interval
    for num_updates, deviation, distance in pool.run(average_in_fp64, layout, config, num_steps):
        assert num_updates == num_steps // interval
        # An update rounds once or twice to 24 bits.
        assert deviation <= 2 * num_updates * 2**-24
        assert distance > 1e-3


def average_in_bf16(layout, config, num_steps):
    """Job: the same for a bf16 run, whose accumulators follow the optimizer's fp32 masters."""
    trainer = make_trainer(config)
    owned = [pair for pair in pairs(trainer) if pair.master is not None]
    oracle = [pair.master.detach().double() for pair in owned]
    for _ in range(num_steps):
        train_step(trainer)
        oracle = [
            config.objective.ema_momentum * average
            + (1 - config.objective.ema_momentum) * pair.master.detach().double()
            for average, pair in zip(oracle, owned, strict=True)
        ]
    for pair, average in zip(owned, oracle, strict=True):
        assert pair.accumulator.dtype == pair.master.dtype == torch.float32
        assert pair.teacher.dtype == torch.bfloat16
        torch.testing.assert_close(pair.accumulator.double(), average, rtol=0, atol=1e-6 * float(average.abs().max()))
        weights = pair.teacher.view(-1)[pair.start : pair.end]
        assert torch.equal(weights, pair.accumulator.bfloat16()), pair.name
    return sum(pair.end - pair.start for pair in owned), sum(pair.student.numel() for pair in pairs(trainer))


def test_accumulates_in_fp32_in_a_bf16_run(pool, assets, tmp_path):
    layout = Layout(dp=2)
    results = pool.run(average_in_bf16, layout, make_config(assets, tmp_path, layout, bf16=True, ema_momentum=0.99), 5)
    assert sum(owned for owned, _ in results) == results[0][1], "every element has one owner"


def look_for_gradients(layout, config):
    """Job: whether forward and backward left any trace on the teacher."""
    trainer = make_trainer(config)
    before = [pair.teacher.clone() for pair in pairs(trainer)]
    batch = trainer.training_data.at(0, mask_ratio=config.objective.mask_ratio, step=0)
    for chunk in trainer.chunks:
        chunk.train()
    run_schedule(trainer, batch, forward_only=False)
    for pair, start in zip(pairs(trainer), before, strict=True):
        assert pair.student.main_grad.any() or pair.student.grad is not None or config.model.freeze, pair.name
        assert pair.teacher.grad is None and not pair.teacher.requires_grad, pair.name
        assert not hasattr(pair.teacher, "main_grad"), f"the optimizer knows {pair.name} of the teacher"
        assert torch.equal(pair.teacher, start), pair.name


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, pp=2, sp=True)], ids=str)
def test_never_receives_a_gradient(pool, assets, tmp_path, layout):
    pool.run(look_for_gradients, layout, make_config(assets, tmp_path, layout, freeze=()))


def run_with_momentum(layout, config):
    """Job: three steps; which of start and student the teacher equals."""
    trainer = make_trainer(config)
    start = [pair.teacher.clone() for pair in pairs(trainer)]
    for _ in range(3):
        train_step(trainer)
    moved = [not torch.equal(pair.student, first) for pair, first in zip(pairs(trainer), start, strict=True)]
    is_start = [torch.equal(pair.teacher, first) for pair, first in zip(pairs(trainer), start, strict=True)]
    is_student = [torch.equal(pair.teacher, pair.student) for pair in pairs(trainer)]
    return all(moved), all(is_start), all(is_student)


@pytest.mark.parametrize("momentum, expected", [(1.0, (True, True, False)), (0.0, (True, False, True))])
def test_momentum_one_stays_and_zero_follows(pool, assets, tmp_path, momentum, expected):
    layout = Layout(tp=2, dp=2)
    config = make_config(assets, tmp_path, layout, ema_momentum=momentum)
    assert pool.run(run_with_momentum, layout, config) == [expected] * 4


# --- steps that are not finite --------------------------------------------------------------------------


def poisoned_gradient(trainer, rank):
    """Infinite gradients in the part that one rank owns, after the reductions: the losses are finite."""

    def poison():
        if dist.get_rank() == rank:
            for part in trainer.optimizer.chained_optimizers:
                for parameter in getattr(part, "model_param_gbuf_map", {}):
                    owned = part._get_model_param_range_map(parameter)["param"]
                    parameter.main_grad.view(-1)[owned.start : owned.end].fill_(float("inf"))

    return before_the_update(trainer, poison)


def step_over_a_nan(layout, config, poisoned_rank):
    """Job: a good step, one that is not finite (by its data, or by a gradient of one rank), a good step."""
    trainer = make_trainer(config)
    train_step(trainer)
    before = snapshot(trainer)
    if poisoned_rank is None:
        record = train_step(trainer)
    else:
        with poisoned_gradient(trainer, poisoned_rank):
            record = train_step(trainer)
    assert_same_bits(snapshot(trainer), before)
    after = train_step(trainer)
    changed = snapshot(trainer)
    unmoved = [name for name in before if name.startswith("accumulator") and torch.equal(before[name], changed[name])]
    assert not unmoved, unmoved
    return record, after


OTHER_RANK = pytest.mark.slow(reason="which rank it is is looked at at the other layout")


@pytest.mark.parametrize(
    "layout, poisoned_rank",
    [
        (Layout(tp=2, dp=2), None),
        (Layout(tp=2, dp=2), 0),
        pytest.param(Layout(tp=2, dp=2), 3, marks=OTHER_RANK),
        (Layout(tp=2, pp=2, sp=True), None),
        pytest.param(Layout(tp=2, pp=2, sp=True), 0, marks=OTHER_RANK),
        (Layout(tp=2, pp=2, sp=True), 3),
    ],
    ids=str,
)
def test_a_step_that_is_not_finite_changes_nothing(pool, assets, tmp_path, layout, poisoned_rank):
    data = "nan" if poisoned_rank is None else "packs"
    config = make_config(assets, tmp_path, layout, data_path=(data,))
    for record, after in pool.run(step_over_a_nan, layout, config, poisoned_rank):
        assert (record["loss"] != record["loss"]) == (poisoned_rank is None)
        assert record["skipped_iterations"] == 1 and not record["grad_norm"] < float("inf")
        assert record["iteration"] == 2 and record["consumed_packs"] == 16, "its data are not tried again"
        assert after["skipped_iterations"] == 1 and after["loss"] == after["loss"]


def train_to_the_end(layout, config):
    """Job: the error that ends a run, or None."""
    with synthetic_data():
        trainer = make_trainer(config)
        try:
            train(trainer)
        except RuntimeError as error:
            return str(error), trainer.progress.iteration
    return None, trainer.progress.iteration


def train_to_the_end_with_a_slow_disk(layout, config):
    """Job: the same, where each checkpoint is on the disk only at the third look."""
    looks = Counter()

    def is_written(writer):
        looks[id(writer)] += 1
        return looks[id(writer)] > 2 and written.__get__(writer)

    written = RankWriter.is_written
    with mock.patch.object(RankWriter, "is_written", property(is_written)):
        return train_to_the_end(layout, config)


def test_many_in_a_row_end_the_run(pool, assets, tmp_path):
    layout = Layout(dp=2)
    config = make_config(
        assets, tmp_path, layout, data_path=("all-nan",), max_skipped_iterations=3, train_iters=10, save_interval=1
    )
    for message, iteration in pool.run(train_to_the_end_with_a_slow_disk, layout, config):
        assert "3 iterations in a row" in message and "iteration 3" in message and iteration == 3
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_iterations"] for line in lines] == [1, 2, 3]
    assert [line["loss"] for line in lines] == [None] * 3
    # A skipped step is saved like any other, also before the optimizer has made a first step, and a checkpoint that is
    # on its way when the run ends is kept.
    assert (tmp_path / "checkpoints" / "iter_0000002").is_dir()


def test_good_steps_between_set_the_count_back(pool, assets, tmp_path):
    config = make_config(assets, tmp_path, data_path=("every-other-nan",), max_skipped_iterations=2, train_iters=5)
    assert pool.run(train_to_the_end, Layout(), config) == [(None, 5)]
