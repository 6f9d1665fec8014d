"""What is asked of a sweep. By itself, because its help page needs no more."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

LAVER_AND_BASELINE = {"laver": {"laver": True}, "baseline": {"laver": False}}  # as `Registry.arms` names them
NAME = re.compile(r"[A-Za-z0-9._-]+")  # goes into paths, a CSV and shell scripts
AMOUNT_KINDS = ("iterations", "tokens", "flops", "subsets")


@dataclass
class SweepOptions:
    """The options of a sweep and their defaults, which the command line's parser fills in.

    Attributes:
        models: configuration files, or model directories to be trained by the configuration `base`.
        iterations, tokens, flops, subsets: the amounts; one of these is given, subsets as paths.
        arms: names of LAVER_AND_BASELINE, or YAML files with overrides by the arm's name; with `arm` empty, too: both.
        arm: further arms, as NAME=field:value,field:value.
        seeds: empty for the configuration's own.
        num_gpus: for each model or one for all; empty for the smallest number that its layout fits.
        lr_exponent: the rate falls as N to the power of minus this.
        lr_warmup_share: of the iterations; None keeps the configuration's number.
        flags: of the trainer, for all runs.
    """

    models: list[str] = field(default_factory=list)
    base: str | None = None
    iterations: list[str] | None = None
    tokens: list[str] | None = None
    flops: list[str] | None = None
    subsets: list[str] | None = None
    output: Path = Path()
    arms: list[str] = field(default_factory=list)
    arm: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    max_epochs: float = 1.0
    num_gpus: list[int] = field(default_factory=list)
    gpus_per_node: int = 8
    lr_exponent: float | None = None
    lr_warmup_share: float | None = None
    flags: list[str] = field(default_factory=list)

    @property
    def amount_kind(self) -> str:
        (kind,) = (kind for kind in AMOUNT_KINDS if getattr(self, kind))
        return kind

    @property
    def amounts(self) -> list[str]:
        amounts: list[str] = getattr(self, self.amount_kind)
        return amounts


def is_yaml(name: str) -> bool:
    """Whether this names a YAML file."""
    return Path(name).suffix in (".yaml", ".yml")
