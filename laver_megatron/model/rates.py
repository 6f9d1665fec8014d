"""Learning rates of their own for parts of the model, as Megatron-Core's parameter groups.

A group's rate is the schedule's times its `lr_mult`, so a part's rate follows the same warm-up and decay.
"""

from collections.abc import Mapping

import torch
from megatron.core.optimizer import OptimizerConfig, ParamKey, get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from laver_megatron.config.fields import TrainingConfig
from laver_megatron.config.modules import MODULES
from laver_megatron.objective.schedules import rates_of_parts

INPUT_AND_OUTPUT = ("embedding.", "output_layer.")


def rate_multipliers(training: TrainingConfig) -> Mapping[tuple[str, ...], float]:
    """Multipliers of the learning rate by the prefixes of the parameters that they are for."""
    prefixes = {"encoder": MODULES["encoder"], "connector": MODULES["connector"], "decoupled": INPUT_AND_OUTPUT}
    return {prefixes[part]: rate / training.lr for part, rate in rates_of_parts(training).items()}


def group_overrides(optimizer_config: OptimizerConfig, training: TrainingConfig) -> dict[ParamKey, ParamGroupOverride]:
    """Which parameters form groups of their own: those of one dimension, which do not decay, and those of parts with
    another rate."""
    overrides = get_standard_config_overrides(optimizer_config)
    for prefixes, multiplier in rate_multipliers(training).items():
        key = ParamKey(with_name_predicate=ParamWithNamePredicate(prefixes[0], _Begins(prefixes)))
        overrides[key] = ParamGroupOverride(lr_mult=multiplier)
    return overrides


class _Begins:
    """Whether a parameter of a wrapped stage belongs to a part."""

    def __init__(self, prefixes: tuple[str, ...]) -> None:
        self.prefixes = prefixes

    def __call__(self, parameter: torch.nn.Parameter, name: str) -> bool:
        return name.removeprefix("module.").startswith(self.prefixes)
