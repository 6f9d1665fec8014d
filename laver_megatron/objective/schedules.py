"""What changes with the step: learning rate, mask ratio, EMA momentum, and when the EMA moves.

Pure functions of the step and a section of the configuration. `step` is 0-based and T is train_iters: a run does
the steps 0 to T - 1. Nothing is accumulated, so a resumed run needs the step and no saved schedule.
"""

import math

from laver_megatron.config.fields import ObjectiveConfig, TrainingConfig


def learning_rate(step: int, training: TrainingConfig) -> float:
    """Linear warmup to `lr`, then a half cosine to `min_lr` at step T:

        lr (step + 1) / warmup                                                        step < warmup
        min_lr + (lr - min_lr) (1 + cos(pi (step - warmup) / (T - warmup))) / 2       otherwise

    The warmup counts from 1, so that the first step is not spent at a rate of 0 (Megatron's scheduler counts
    from 0 and spends it). The last step T - 1 is still above `min_lr`.

    Example: lr 2e-5, 100 warmup steps, T = 6250: 2e-7 at step 0, 2e-5 at steps 99 and 100, 1e-5 at step 3175.
    """
    warmup = training.lr_warmup_iters
    if step < warmup:
        return training.lr * (step + 1) / warmup
    if step >= training.train_iters:
        return training.min_lr
    share = (step - warmup) / (training.train_iters - warmup)
    return training.min_lr + (training.lr - training.min_lr) * (1 + math.cos(math.pi * share)) / 2


def mask_ratio(step: int, objective: ObjectiveConfig, train_iters: int) -> float:
    """Share r of visual tokens to hide at `step`: constant, or a half cosine r (1 - cos(pi step / T)) / 2
    from 0 to r.

    The paper names one ratio; the official code raises it from 0. Example: r = 0.05, T = 1000: 0 at step 0,
    0.025 at step 500. With the cosine the first step hides nothing and its L_MIM is 0.
    """
    _check_schedule("mask_ratio_schedule", objective.mask_ratio_schedule)
    if objective.mask_ratio_schedule == "constant":
        return objective.mask_ratio
    share = min(step / train_iters, 1.0)
    return objective.mask_ratio * (1 - math.cos(math.pi * share)) / 2


def ema_momentum(step: int, objective: ObjectiveConfig, train_iters: int) -> float:
    """Momentum of the teacher's update that follows the optimizer's step `step`: constant m, or a half cosine
    from m to 1, 1 - (1 - m) (1 + cos(pi x)) / 2 at x = (step + 1) / T.

    The cosine ends at exactly 1: the update after the last step leaves the teacher where it is.
    """
    _check_schedule("ema_momentum_schedule", objective.ema_momentum_schedule)
    if objective.ema_momentum_schedule == "constant":
        return objective.ema_momentum
    share = min((step + 1) / train_iters, 1.0)
    return 1 - (1 - objective.ema_momentum) * (1 + math.cos(math.pi * share)) / 2


def ema_update_due(step: int, objective: ObjectiveConfig, train_iters: int) -> bool:
    """Whether the teacher moves after the optimizer's step `step`: when (step + 1) is a multiple of its
    interval.
    """
    return (step + 1) % ema_interval_steps(objective, train_iters) == 0


def ema_interval_steps(objective: ObjectiveConfig, train_iters: int) -> int:
    """`ema_interval` in steps: an integer is taken as it is, a share of the run (0 < value < 1) as
    max(1, round(value T)).

    Example: 0.02 of T = 6250 is 125 steps.

    Raises:
        ValueError: neither a share nor an integer number of steps.
    """
    interval = objective.ema_interval
    if 0 < interval < 1:
        return max(1, round(interval * train_iters))
    if interval < 1 or interval != int(interval):
        raise ValueError(
            f"ema_interval is {interval}; give an integer number of steps (1, 2, ...), "
            "or a share of train_iters between 0 and 1"
        )
    return int(interval)


def _check_schedule(field: str, schedule: str) -> None:
    if schedule not in ("constant", "cosine"):
        raise ValueError(f"{field} is {schedule!r}; it must be 'constant' or 'cosine'")
