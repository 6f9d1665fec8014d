"""Schedules: the formulas at hand-picked steps, their ends, and the refusals."""

import math
from types import SimpleNamespace

import pytest
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from laver_megatron.config.training_fields import LR_DECAY_STYLES, LR_WSD_DECAY_STYLES
from laver_megatron.objective.schedules import (
    ema_interval_steps,
    ema_momentum,
    ema_update_due,
    learning_rate,
    mask_ratio,
    wsd_decay_steps,
)


def settings(**changes):
    values = {
        "train_iters": 1000,
        "lr": 2e-5,
        "min_lr": 1e-6,
        "lr_warmup_iters": 100,
        "lr_decay_style": "cosine",
        "lr_wsd_decay_iters": None,
        "lr_wsd_decay_style": "exponential",
        "mask_ratio": 0.05,
        "mask_ratio_schedule": "cosine",
        "ema_momentum": 0.95,
        "ema_momentum_schedule": "cosine",
        "ema_interval": 1,
    }
    return SimpleNamespace(**values | changes)


def exactly(value):
    """Up to the rounding of a few fp64 operations."""
    return pytest.approx(value, rel=1e-12, abs=1e-18)


def test_learning_rate_warms_up_then_decays():
    config = settings()
    assert learning_rate(0, config) == exactly(2e-5 / 100)
    assert learning_rate(49, config) == exactly(1e-5)
    assert learning_rate(99, config) == exactly(2e-5)
    assert learning_rate(100, config) == exactly(2e-5)
    assert learning_rate(550, config) == exactly((2e-5 + 1e-6) / 2)
    assert learning_rate(400, config) == exactly(1e-6 + 1.9e-5 * (1 + 0.5) / 2)  # a third of the way: cos = 1/2
    assert learning_rate(999, config) > 1e-6
    assert learning_rate(1000, config) == exactly(1e-6)
    assert learning_rate(5000, config) == exactly(1e-6)
    rates = [learning_rate(step, config) for step in range(1000)]
    assert rates[:100] == sorted(rates[:100]) and rates[99:] == sorted(rates[99:], reverse=True)


def test_learning_rate_without_warmup_and_with_nothing_else():
    assert learning_rate(0, settings(lr_warmup_iters=0)) == exactly(2e-5)
    assert learning_rate(0, settings(lr_warmup_iters=0, train_iters=1)) == exactly(2e-5)
    only_warmup = settings(lr_warmup_iters=10, train_iters=10)
    assert learning_rate(9, only_warmup) == exactly(2e-5)
    assert learning_rate(10, only_warmup) == exactly(1e-6)


@pytest.mark.parametrize("style", LR_DECAY_STYLES)
@pytest.mark.parametrize("shape", LR_WSD_DECAY_STYLES)
def test_decays_are_megatrons(style, shape):
    """Megatron's scheduler stands at a number of steps that are done; its own warm-up is not compared."""
    config = settings(lr_decay_style=style, lr_wsd_decay_iters=300, lr_wsd_decay_style=shape)
    group = {"max_lr": config.lr, "min_lr": config.min_lr}
    scheduler = OptimizerParamScheduler(
        SimpleNamespace(param_groups=[group]), init_lr=0.0, max_lr=config.lr, min_lr=config.min_lr,
        lr_warmup_steps=100, lr_decay_steps=1000, lr_decay_style=style, start_wd=0.0, end_wd=0.0, wd_incr_steps=1,
        wd_incr_style="constant", use_checkpoint_opt_param_scheduler=False, wsd_decay_steps=300,
        lr_wsd_decay_style=shape,
    )  # fmt: skip
    for step in range(101, 1100):
        scheduler.num_steps = step
        assert learning_rate(step, config) == exactly(scheduler.get_lr(group)), step


def test_wsd_is_flat_until_its_decay():
    config = settings(lr_decay_style="WSD", lr_wsd_decay_iters=0.25, lr_wsd_decay_style="linear")
    assert {learning_rate(step, config) for step in range(99, 751)} == {2e-5}
    assert learning_rate(875, config) == exactly((2e-5 + 1e-6) / 2)
    assert learning_rate(999, config) == exactly(1e-6 + 1.9e-5 / 250)
    assert wsd_decay_steps(settings(lr_wsd_decay_iters=0.0001)) == 1
    assert (
        wsd_decay_steps(settings(lr_wsd_decay_iters=1)) == 1 and wsd_decay_steps(settings(lr_wsd_decay_iters=40)) == 40
    )
    # A run that goes on beyond what it was planned for repeats no step at another rate before the new decay.
    longer = settings(lr_decay_style="WSD", lr_wsd_decay_iters=250, lr_wsd_decay_style="linear", train_iters=2000)
    assert all(learning_rate(step, longer) == learning_rate(step, config) for step in range(751))


def test_official_stage_two():
    config = settings(train_iters=6250, min_lr=0.0, ema_interval=0.02)
    assert learning_rate(3175, config) == exactly(1e-5)
    due = [step for step in range(6250) if ema_update_due(step, config, config.train_iters)]
    assert len(due) == 50 and due[:2] == [124, 249] and due[-1] == 6249


def test_mask_ratio():
    config = settings()
    assert mask_ratio(0, config, config.train_iters) == 0
    assert mask_ratio(250, config, config.train_iters) == exactly(0.05 * (1 - math.sqrt(0.5)) / 2)
    assert mask_ratio(500, config, config.train_iters) == exactly(0.025)
    assert mask_ratio(1000, config, config.train_iters) == 0.05
    assert mask_ratio(2000, config, config.train_iters) == 0.05
    assert [mask_ratio(step, settings(mask_ratio_schedule="constant"), 1000) for step in (0, 999)] == [0.05, 0.05]


def test_ema_momentum():
    config = settings()
    assert ema_momentum(0, config, config.train_iters) == pytest.approx(
        0.95, abs=1e-6
    )  # one step of 1000 along the cosine: 1.2e-7
    assert ema_momentum(0, config, config.train_iters) > 0.95
    assert ema_momentum(249, config, config.train_iters) == exactly(1 - 0.05 * (1 + math.sqrt(0.5)) / 2)
    assert ema_momentum(499, config, config.train_iters) == exactly(0.975)
    assert ema_momentum(999, config, config.train_iters) == 1
    assert [ema_momentum(step, settings(ema_momentum_schedule="constant"), 1000) for step in (0, 999)] == [
        0.95,
        0.95,
    ]


@pytest.mark.parametrize(
    ("interval", "train_iters", "steps"),
    [
        (1, 1000, 1),
        (7, 1000, 7),
        (5.0, 1000, 5),
        (0.02, 6250, 125),
        (0.02, 10, 1),
        (0.5, 10, 5),
        (0.999, 10, 10),
    ],
)
def test_ema_interval(interval, train_iters, steps):
    config = settings(ema_interval=interval, train_iters=train_iters)
    assert ema_interval_steps(config, config.train_iters) == steps
    due = [step for step in range(3 * steps) if ema_update_due(step, config, config.train_iters)]
    assert due == [steps - 1, 2 * steps - 1, 3 * steps - 1]


@pytest.mark.parametrize("interval", [0, -1, 1.5, -0.1])
def test_ema_interval_refusals(interval):
    with pytest.raises(ValueError, match="ema_interval"):
        ema_update_due(0, settings(ema_interval=interval), 1000)


def test_schedule_refusals():
    with pytest.raises(ValueError, match="mask_ratio_schedule"):
        mask_ratio(0, settings(mask_ratio_schedule="linear"), 1000)
    with pytest.raises(ValueError, match="ema_momentum_schedule"):
        ema_momentum(0, settings(ema_momentum_schedule="linear"), 1000)
