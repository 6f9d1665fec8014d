"""What changes with the step: learning rate, mask ratio, EMA momentum, and when the EMA moves.

Pure functions of the step and a section of the configuration. `step` is 0-based and T is train_iters: a run does
the steps 0 to T - 1. Nothing is accumulated, so a resumed run needs the step and no saved schedule.
"""

import math
from collections.abc import Callable, Mapping

from laver_megatron.config.fields import ObjectiveConfig, TrainingConfig


def learning_rate(step: int, training: TrainingConfig) -> float:
    """Linear warmup to `lr`, then, by `lr_decay_style`, a decay to `min_lr` at step T:

        lr (step + 1) / warmup                            step < warmup
        min_lr + (lr - min_lr) f(x)                       otherwise, x = (step - warmup) / (T - warmup)

        f: cosine (1 + cos(pi x)) / 2; linear 1 - x; constant 1, also from step T on; WSD 1 up to step T - D, then
        g(y) with y = (step - T + D) / D and D of `wsd_decay_steps`
        g: linear 1 - y; cosine (1 + cos(pi y)) / 2; exponential 2 * 0.5^y - 1; minus_sqrt 1 - sqrt(y)

    The formulas are Megatron's, but the warmup counts from 1, so that the first step is not spent at a rate of 0
    (Megatron's scheduler counts from 0 and spends it). The last step T - 1 is still above `min_lr`.

    Example: lr 2e-5, 100 warmup steps, T = 6250, cosine: 2e-7 at step 0, 2e-5 at steps 99 and 100, 1e-5 at step 3175.
    """
    warmup = training.lr_warmup_iters
    if step < warmup:
        return training.lr * (step + 1) / warmup
    return training.min_lr + (training.lr - training.min_lr) * _decay(step, training)


def rates_of_parts(training: TrainingConfig) -> dict[str, float]:
    """What parts of the model have in the place of `lr`, where that is set; `decoupled`: embedding and LM head."""
    rates = {"encoder": training.encoder_lr, "connector": training.connector_lr, "decoupled": training.decoupled_lr}
    return {part: rate for part, rate in rates.items() if rate is not None}


def _decay(step: int, training: TrainingConfig) -> float:
    """Where the rate stands between `min_lr` (0) and `lr` (1) after the warmup."""
    style, end = training.lr_decay_style, training.train_iters
    if style == "constant":
        return 1.0
    if step >= end:
        return 0.0
    if style == "WSD":
        num_steps = wsd_decay_steps(training)
        share = max(0.0, (step - end + num_steps) / num_steps)
        style = training.lr_wsd_decay_style
    else:
        share = (step - training.lr_warmup_iters) / (end - training.lr_warmup_iters)
    return _DECAYS[style](share)


_DECAYS: Mapping[str, Callable[[float], float]] = {
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
    "linear": lambda share: 1 - share,
    "exponential": lambda share: 2 * 0.5**share - 1,
    "minus_sqrt": lambda share: 1 - math.sqrt(share),
}


def wsd_decay_steps(training: TrainingConfig) -> int:
    """`lr_wsd_decay_iters` in steps: a number of at least 1 is taken as it is, a share of the run (0 < value < 1) as
    max(1, round(value T))."""
    decay = training.lr_wsd_decay_iters
    assert decay is not None, "validation lets no such run pass"
    return max(1, round(decay * training.train_iters)) if decay < 1 else int(decay)


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
