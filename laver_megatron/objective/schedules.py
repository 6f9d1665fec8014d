"""What changes with the step: learning rate, mask ratio, EMA momentum, and when the EMA moves.

Pure functions of (step, config). `step` is 0-based and T is config.train_iters: a run does the steps
0 to T - 1. Nothing is accumulated, so a resumed run needs the step and no saved schedule.
"""

import math
from typing import Protocol


class ScheduleSettings(Protocol):
    """The fields of the configuration that are read here."""

    @property
    def train_iters(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def min_lr(self) -> float: ...
    @property
    def lr_warmup_iters(self) -> int: ...
    @property
    def mask_ratio(self) -> float: ...
    @property
    def mask_ratio_schedule(self) -> str: ...
    @property
    def ema_momentum(self) -> float: ...
    @property
    def ema_momentum_schedule(self) -> str: ...
    @property
    def ema_interval(self) -> float: ...


def learning_rate(step: int, config: ScheduleSettings) -> float:
    """Linear warmup to `lr`, then a half cosine to `min_lr` at step T:

        lr (step + 1) / warmup                                                        step < warmup
        min_lr + (lr - min_lr) (1 + cos(pi (step - warmup) / (T - warmup))) / 2       otherwise

    The warmup counts from 1, so that the first step is not spent at a rate of 0 (Megatron's scheduler counts
    from 0 and spends it). The last step T - 1 is still above `min_lr`.

    Example: lr 2e-5, 100 warmup steps, T = 6250: 2e-7 at step 0, 2e-5 at steps 99 and 100, 1e-5 at step 3175.
    """
    warmup = config.lr_warmup_iters
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if step >= config.train_iters:
        return config.min_lr
    share = (step - warmup) / (config.train_iters - warmup)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * share)) / 2


def mask_ratio(step: int, config: ScheduleSettings) -> float:
    """Share r of visual tokens to hide at `step`: constant, or a half cosine r (1 - cos(pi step / T)) / 2
    from 0 to r.

    The paper names one ratio; the official code raises it from 0. Example: r = 0.05, T = 1000: 0 at step 0,
    0.025 at step 500. With the cosine the first step hides nothing and its L_MIM is 0.
    """
    _check_schedule("mask_ratio_schedule", config.mask_ratio_schedule)
    if config.mask_ratio_schedule == "constant":
        return config.mask_ratio
    share = min(step / config.train_iters, 1.0)
    return config.mask_ratio * (1 - math.cos(math.pi * share)) / 2


def ema_momentum(step: int, config: ScheduleSettings) -> float:
    """Momentum of the teacher's update that follows the optimizer's step `step`: constant m, or a half cosine
    from m to 1, 1 - (1 - m) (1 + cos(pi x)) / 2 at x = (step + 1) / T.

    The cosine ends at exactly 1: the update after the last step leaves the teacher where it is.
    """
    _check_schedule("ema_momentum_schedule", config.ema_momentum_schedule)
    if config.ema_momentum_schedule == "constant":
        return config.ema_momentum
    share = min((step + 1) / config.train_iters, 1.0)
    return 1 - (1 - config.ema_momentum) * (1 + math.cos(math.pi * share)) / 2


def ema_update_due(step: int, config: ScheduleSettings) -> bool:
    """Whether the teacher moves after the optimizer's step `step`: when (step + 1) is a multiple of its
    interval.
    """
    return (step + 1) % ema_interval_steps(config) == 0


def ema_interval_steps(config: ScheduleSettings) -> int:
    """`ema_interval` in steps: a whole number is taken as it is, a share of the run (0 < value < 1) as
    max(1, round(value T)).

    Example: 0.02 of T = 6250 is 125 steps.

    Raises:
        ValueError: neither a share nor a whole number of steps.
    """
    interval = config.ema_interval
    if 0 < interval < 1:
        return max(1, round(interval * config.train_iters))
    if interval < 1 or interval != int(interval):
        raise ValueError(
            f"ema_interval is {interval}; give a whole number of steps (1, 2, ...), "
            "or a share of train_iters between 0 and 1"
        )
    return int(interval)


def _check_schedule(field: str, schedule: str) -> None:
    if schedule not in ("constant", "cosine"):
        raise ValueError(f"{field} is {schedule!r}; it must be 'constant' or 'cosine'")
