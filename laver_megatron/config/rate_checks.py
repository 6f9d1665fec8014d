"""Whether a run's learning rates and their schedule fit together."""

from __future__ import annotations

from collections.abc import Iterator

from laver_megatron.config.fields import Config, default_of
from laver_megatron.objective.schedules import wsd_decay_steps


def rate_problems(config: Config) -> Iterator[str]:
    """What is wrong with the learning rates."""
    training = config.training
    if training.lr_warmup_iters >= training.train_iters >= 1:
        yield (
            f"lr_warmup_iters {training.lr_warmup_iters} leaves nothing of {training.train_iters} train_iters; "
            "the warm-up must be shorter than the run"
        )
    if training.min_lr > training.lr:
        yield f"min_lr {training.min_lr} is above lr {training.lr}; the rate decays from lr to min_lr"
    yield from _part_problems(config)
    if training.lr_decay_style == "WSD":
        yield from _wsd_problems(config)
        return
    for name in ("lr_wsd_decay_iters", "lr_wsd_decay_style"):
        if (value := config.flat()[name]) != default_of(name):
            yield (
                f"{name} {value} is WSD's, but lr_decay_style is {training.lr_decay_style}; set --lr-decay-style WSD, "
                "or drop it"
            )


def _part_problems(config: Config) -> Iterator[str]:
    """Rates of parts of the model."""
    training = config.training
    parts = {"encoder_lr": "encoder", "connector_lr": "connector", "decoupled_lr": "decoder"}
    for name, module in parts.items():
        rate = config.flat()[name]
        flag = f"--{name.replace('_', '-')}"
        if rate is None:
            continue
        if module in config.model.freeze:
            yield f"{name} is {rate}, but freeze names the {module}, which does not train; drop {flag}, or train it"
        elif training.lr <= 0:
            yield f"{name} {rate} follows lr in proportion, but lr is {training.lr}; raise --lr, or drop {flag}"


def _wsd_problems(config: Config) -> Iterator[str]:
    training = config.training
    decay, most = training.lr_wsd_decay_iters, training.train_iters - training.lr_warmup_iters
    if decay is None:
        yield "lr_decay_style WSD needs the length of its decay; set --lr-wsd-decay-iters, such as 0.1 of the run"
    elif decay > 1 and decay != int(decay):
        yield f"lr_wsd_decay_iters is {decay}, but must be whole iterations or a share between 0 and 1"
    elif decay > 0 and wsd_decay_steps(training) == 1:
        yield (
            f"lr_wsd_decay_iters {decay} is 1 iteration, which would still have lr, so that nothing decays; use at "
            "least 2"
        )
    elif decay > 0 and (steps := wsd_decay_steps(training)) > most >= 1:
        yield (
            f"lr_wsd_decay_iters {decay} is {steps} iterations, but {training.train_iters} train_iters less "
            f"{training.lr_warmup_iters} of warm-up leave {most}; use at most that"
        )
