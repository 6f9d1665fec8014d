"""Layouts of a run on a number of GPUs: which are possible, which fit, and which is the fastest.

Whether a layout is possible is for `validate` to say, as it does of every run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from laver_megatron.config import Config, ConfigError
from laver_megatron.inputs import EncoderInputs
from laver_megatron.scaling.plan import RECOMPUTATIONS, Job, Plan, layout_name, plan_layout
from laver_megatron.validate import validate

_MICRO_BATCH_SIZES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Search:
    """fitting: the fastest first; too_large: possible, but not in memory, the least too large first; impossible: why
    some layouts cannot be at all, with how many."""

    fitting: tuple[Plan, ...]
    too_large: tuple[Plan, ...]
    impossible: tuple[tuple[str, int], ...]


def search(job: Job, pinned: Mapping[str, object] | None = None) -> Search:
    """All layouts of the job's GPUs. pinned: fields of Config that are not searched but given."""
    fitting: list[Plan] = []
    too_large: list[Plan] = []
    impossible: dict[str, int] = {}
    for config in _layouts(job):
        if any(getattr(config, name) != value for name, value in (pinned or {}).items()):
            continue
        problems = layout_problems(job, config)
        if problems:
            impossible[problems[0]] = impossible.get(problems[0], 0) + 1
            continue
        plan = plan_layout(job, config)
        (fitting if plan.fits else too_large).append(plan)
    return Search(
        tuple(sorted(fitting, key=lambda plan: plan.seconds)),
        tuple(sorted(too_large, key=lambda plan: plan.fullest.memory_bytes)),
        tuple(sorted(impossible.items(), key=lambda item: -item[1])),
    )


def _layouts(job: Job) -> Iterator[Config]:
    """Every TP within a machine, PP, interleaving, micro-batch and recomputation; sequence parallel wherever TP is."""
    layers = job.shape.num_layers
    for tp in (size for size in _divisors(job.num_gpus) if size <= job.gpu.node_size):
        for pp in (size for size in _divisors(job.num_gpus // tp) if size <= layers):
            per_stage = layers // pp
            chunks = [None, *(size for size in _divisors(per_stage) if pp > 1 and size < per_stage)]
            for chunk in chunks if layers % pp == 0 else [None]:
                for micro_batch_size in _MICRO_BATCH_SIZES:
                    for recompute in RECOMPUTATIONS:
                        yield job.base.replace(
                            tensor_model_parallel_size=tp,
                            pipeline_model_parallel_size=pp,
                            num_layers_per_virtual_pipeline_stage=chunk,
                            sequence_parallel=tp > 1,
                            micro_batch_size=micro_batch_size,
                            recompute_granularity=recompute,
                        )


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def check_layout(job: Job, pinned: Mapping[str, object]) -> None:
    """Whether any layout has the pinned values, memory apart.

    Raises:
        ConfigError: why none has, and the nearest layout that is possible.
    """
    if not pinned:
        return
    asked = job.base.replace(**pinned)
    if "sequence_parallel" not in pinned:
        asked = asked.replace(sequence_parallel=asked.tensor_model_parallel_size > 1)
    problems = layout_problems(job, asked)
    if asked.tensor_model_parallel_size > job.gpu.node_size:
        problems.append(
            f"tensor_model_parallel_size {asked.tensor_model_parallel_size} reaches out of a machine of "
            f"{job.gpu.node_size} GPUs, over a network far too slow for it"
        )
    if not problems:
        return
    nearest = min(
        (config for config in _layouts(job) if not layout_problems(job, config)),
        key=lambda config: _distance(config, asked),
        default=None,
    )
    if nearest is not None:
        problems.append(f"the nearest possible layout: {layout_name(nearest, job.num_gpus)}")
    raise ConfigError(problems)


def _distance(one: Config, other: Config) -> tuple[float, ...]:
    """How far layouts are apart: first in factors of TP and PP, then in the rest."""
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "micro_batch_size")
    factors = [abs(math.log2(getattr(one, name) / max(getattr(other, name), 1))) for name in sizes]
    others = ("num_layers_per_virtual_pipeline_stage", "recompute_granularity")
    return (factors[0] + factors[1], factors[2], sum(getattr(one, name) != getattr(other, name) for name in others))


def layout_problems(job: Job, config: Config) -> list[str]:
    """Why a layout cannot be, memory apart; empty if it can."""
    encoder = job.workload.encoder
    inputs = None if encoder is None else EncoderInputs(encoder, job.workload.image_tokens)
    return validate(config, job.shape, job.num_gpus, encoder=inputs)
