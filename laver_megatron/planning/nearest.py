"""What to offer to whoever asked for what cannot be or does not fit: the layout, the number of GPUs or the batch that
is nearest to it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

from laver_megatron.config.fields import Config, ConfigError
from laver_megatron.planning.layouts import Pinned, divisors, layout_problems, layouts
from laver_megatron.planning.plan import Job, Plan, layout_name, plan_layout
from laver_megatron.planning.planner import search

_SHOWN_REASONS = 3
_MOST_TIMES = 64  # as many GPUs are looked at for a model that does not fit


def check_possible(job: Job, pinned: Pinned) -> None:
    """Whether any layout has the pinned values, memory apart.

    Raises:
        ConfigError: why none has, and the nearest layout that is possible; where there is none on this number of GPUs,
            the nearest number and the nearest batch.
    """
    if _is_possible(job, pinned):
        return
    problems = _reasons(job, pinned)
    nearest = _nearest_layout(job, pinned, lambda config: not layout_problems(job, config))
    if nearest is not None:
        problems.append(f"the nearest possible layout: {layout_name(nearest.config, job.num_gpus)}")
    else:
        problems += _other_sizes(job, pinned) or [f"without {_named(pinned)}: {line}" for line in _other_sizes(job, {})]
    raise ConfigError(problems)


def nearest_that_fits(job: Job, pinned: Pinned) -> Plan | None:
    """Where no layout with the pinned values fits: the one that does and changes fewest of them; without any, the
    fastest on the least number of GPUs, doubled over and over; None if that does not help either."""

    def fits(config: Config) -> bool:
        return not layout_problems(job, config) and plan_layout(job, config).fits

    nearest = _nearest_layout(job, pinned, fits)
    factor = 2
    while nearest is None and factor <= _MOST_TIMES:
        nearest = next(iter(search(replace(job, num_gpus=job.num_gpus * factor)).fitting), None)
        factor *= 2
    return nearest


def _is_possible(job: Job, pinned: Pinned) -> bool:
    return any(not layout_problems(job, config) for config in layouts(job, pinned))


def _reasons(job: Job, pinned: Pinned) -> list[str]:
    """Those that hold of every layout; if there are none, the most frequent."""
    found = [set(layout_problems(job, config)) for config in layouts(job, pinned)]
    number_of = Counter(problem for problems in found for problem in sorted(problems))
    of_all = [problem for problem, number in number_of.items() if number == len(found)]
    return of_all or [problem for problem, _ in number_of.most_common(_SHOWN_REASONS)]


def _nearest_layout(job: Job, pinned: Pinned, accepts: Callable[[Config], bool]) -> Plan | None:
    """The layout that changes fewest pinned values, by least; among equals one that fits, and the fastest."""
    for number in range(1, len(pinned) + 1):
        found: dict[Config, float] = {}
        for changed in combinations(pinned, number):
            kept = {field: value for field, value in pinned.items() if field not in changed}
            found |= {config: _distance(config, pinned) for config in layouts(job, kept) if accepts(config)}
        if found:
            least = min(found.values())
            plans = [plan_layout(job, config) for config, distance in found.items() if distance == least]
            return min(plans, key=lambda plan: (not plan.fits, plan.seconds))
    return None


def _distance(config: Config, pinned: Pinned) -> float:
    """How far a layout is from the pinned values, in factors of two; 1 for what has no factor."""

    def apart(one: Any, other: Any) -> float:
        if isinstance(one, int) and isinstance(other, int):
            return abs(math.log2(one / other))
        return float(one != other)

    return sum(apart(config.flat()[field], value) for field, value in pinned.items())


def _other_sizes(job: Job, pinned: Pinned) -> list[str]:
    """The nearest number of GPUs, and the nearest batch, for which there is a layout with the pinned values."""
    batch = job.base.data.global_batch_size
    on_others = (replace(job, num_gpus=number) for number in _nearby(_numbers_of_gpus(job, pinned), job.num_gpus))
    with_others = (
        replace(job, base=job.base.replace(global_batch_size=number))
        for number in _nearby(_batches(job, pinned), batch)
    )
    found = []
    if (other := _first_possible(on_others, pinned)) is not None:
        found.append(f"the nearest number of GPUs that is possible: {other.num_gpus}")
    if (other := _first_possible(with_others, pinned)) is not None:
        found.append(f"the nearest global_batch_size that is possible: {other.base.data.global_batch_size}")
    return found


def _named(pinned: Pinned) -> str:
    return ", ".join(f"{field} {value}" for field, value in pinned.items())


def _first_possible(jobs: Iterable[Job], pinned: Pinned) -> Job | None:
    return next((job for job in jobs if _is_possible(job, pinned)), None)


def _nearby(numbers: Iterable[int], number: int) -> list[int]:
    return sorted(set(numbers), key=lambda other: (abs(other - number), other))


def _sizes(job: Job, pinned: Pinned) -> Iterator[tuple[int, int]]:
    """TP and PP that this model can have on some number of GPUs, roughly."""
    asked = pinned.get("tensor_model_parallel_size")
    for tp in [asked] if asked else range(1, min(job.gpu.node_size, job.shape.num_attention_heads) + 1):
        alone = replace(job, num_gpus=tp)
        if _is_possible(alone, {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": 1}):
            stages = pinned.get("pipeline_model_parallel_size")
            yield from ((tp, pp) for pp in ([stages] if stages else range(1, job.shape.num_layers + 1)))


def _numbers_of_gpus(job: Job, pinned: Pinned) -> Iterator[int]:
    micro_batches = job.base.data.global_batch_size // pinned.get("micro_batch_size", 1)
    for tp, pp in _sizes(job, pinned):
        yield from (tp * pp * dp for dp in divisors(max(micro_batches, 1)))


def _batches(job: Job, pinned: Pinned) -> Iterator[int]:
    for tp, pp in _sizes(job, pinned):
        if job.num_gpus % (tp * pp) == 0:
            packs = job.num_gpus // (tp * pp) * pinned.get("micro_batch_size", 1)
            # The interleaved schedule wants a multiple of the stages, too.
            for step in (packs, packs * pp):
                below = job.base.data.global_batch_size // step
                yield from (step * number for number in (below, below + 1) if number)
