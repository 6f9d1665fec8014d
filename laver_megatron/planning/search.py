"""The layouts of a run on a number of GPUs: which are possible, which fit, which is the fastest, and what to offer
where none is.

Whether a layout is possible is for `validate` to say, as it does of every run; the planner itself refuses tensor
parallelism over the network alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from laver_megatron.config.checks import validate
from laver_megatron.config.directories import CheckedEncoder
from laver_megatron.config.fields import Config, ConfigError
from laver_megatron.config.layout_checks import sequence_problems
from laver_megatron.planning.plan import RECOMPUTATIONS, Job, Plan, layout_name, plan_layout

MICRO_BATCH_SIZES = (1, 2, 4, 8)
FIRST, LAST = "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"
_CHUNK = "num_layers_per_virtual_pipeline_stage"

Pinned = Mapping[str, Any]  # fields of the configuration that are given, not searched
_SHOWN_REASONS = 3
MOST_TIMES = 64  # as many GPUs are looked at for a model that does not fit


def layouts(job: Job, pinned: Pinned) -> Iterator[Config]:
    """Every TP within a machine, PP, split of the layers, interleaving, micro-batch and recomputation, with the pinned
    values in place of those that are usual. At least one layout, possible or not."""
    num_layers = job.shape.num_layers
    tensor_parallel_sizes = (size for size in divisors(job.num_gpus) if size <= job.gpu.node_size)
    for tp in _values(pinned, "tensor_model_parallel_size", tensor_parallel_sizes):
        pipeline_sizes = (size for size in divisors(max(job.num_gpus // tp, 1)) if size <= num_layers)
        for pp in _values(pinned, "pipeline_model_parallel_size", pipeline_sizes):
            for first, last in _splits(num_layers, pp, pinned):
                is_even = first is None and last is None
                for chunk in _values(pinned, _CHUNK, _chunks(num_layers, pp) if is_even else [None]):
                    sizes = {FIRST: first, LAST: last, _CHUNK: chunk}
                    sizes |= {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
                    sizes["sequence_parallel"] = _can_split_sequences(job.base, tp)
                    for micro_batch_size in _values(pinned, "micro_batch_size", MICRO_BATCH_SIZES):
                        for recompute in _values(pinned, "recompute_granularity", RECOMPUTATIONS):
                            modules = job.base.engine.recompute_modules if recompute == "selective" else None
                            yield job.base.replace(
                                **sizes, micro_batch_size=micro_batch_size, recompute_granularity=recompute,
                                recompute_modules=modules,
                            )  # fmt: skip


def layout_problems(job: Job, config: Config) -> list[str]:
    """Why a layout is impossible, memory apart; empty if it is possible."""
    encoder = job.workload.encoder
    inputs = None if encoder is None else CheckedEncoder(encoder, job.workload.image_tokens)
    problems = validate(config, job.shape, job.num_gpus, encoder=inputs)
    tp, machine = config.parallel.tensor_model_parallel_size, job.gpu.node_size
    if not job.gpu.holds_groups_of(tp, job.num_gpus):
        problems.append(
            f"tensor_model_parallel_size {tp} reaches out of a machine of {machine} GPUs, over a network far too slow "
            f"for it; use {', '.join(map(str, divisors(machine)))}"
        )
    return problems


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def _values(pinned: Pinned, field: str, usual: Iterable[Any]) -> list[Any]:
    return [pinned[field]] if field in pinned else list(usual)


def _chunks(num_layers: int, pp: int) -> list[int | None]:
    """Layers of a virtual stage."""
    if pp == 1 or num_layers % pp:
        return [None]
    per_stage = num_layers // pp
    return [None, *(size for size in divisors(per_stage) if size < per_stage)]


def _splits(num_layers: int, pp: int, pinned: Pinned) -> list[tuple[int | None, int | None]]:
    """(layers of the first stage, of the last), None for as many as the other stages have. Where the layers do not
    divide, the first stage, the last, or both have fewer than the others, or more; in no other way if they are to be
    interleaved."""
    first, last = pinned.get(FIRST), pinned.get(LAST)
    if pp == 1 or pinned.get(_CHUNK) is not None or (first is not None and last is not None):
        return [(first, last)]
    given = (first or 0) + (last or 0)
    rest, stages = num_layers - given, pp - bool(given)
    if rest % stages == 0:
        return [(first, last)]
    found: dict[tuple[int, ...], tuple[int | None, int | None]] = {}
    for each in (rest // stages + 1, rest // stages):
        left = rest - each * stages  # below 0: so many fewer at the ends
        half = int(left / 2)
        if first is not None:
            ends = [(first, each + left)]
        elif last is not None:
            ends = [(each + left, last)]
        else:
            ends = [(each + left, each), (each, each + left), (each + half, each + left - half)]
        for at_first, at_last in ends:
            if min(at_first, each, at_last) > 0:
                # Two stages could be written in several ways.
                key = (at_first, at_last) if pp == 2 else (at_first, each, at_last)
                split = (
                    first or (None if at_first == each else at_first),
                    last or (None if at_last == each else at_last),
                )
                found.setdefault(key, split)
    # Without a layer for every stage it stays as it is, for `validate` to say why not.
    return list(found.values()) or [(first, last)]


def _can_split_sequences(base: Config, tp: int) -> bool:
    """Sequence parallelism saves memory and traffic wherever the sequences divide."""
    asked = base.replace(tensor_model_parallel_size=tp, sequence_parallel=True)
    return tp > 1 and not any(sequence_problems(asked))


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        fitting: the fastest first.
        too_large: possible, but not in memory; the smallest first.
        impossible: reasons, and how many layouts each rules out.
    """

    fitting: tuple[Plan, ...]
    too_large: tuple[Plan, ...]
    impossible: tuple[tuple[str, int], ...]


def search(job: Job, pinned: Pinned | None = None) -> Search:
    """All layouts of the job's GPUs that have the pinned values."""
    plans: list[Plan] = []
    impossible: Counter[str] = Counter()
    for config in layouts(job, pinned or {}):
        if problems := layout_problems(job, config):
            impossible[problems[0]] += 1
        else:
            plans.append(plan_layout(job, config))
    return Search(
        tuple(sorted((plan for plan in plans if plan.fits), key=lambda plan: plan.seconds)),
        tuple(sorted((plan for plan in plans if not plan.fits), key=lambda plan: plan.fullest.memory_bytes)),
        tuple(impossible.most_common()),
    )


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
        named = ", ".join(f"{field} {value}" for field, value in pinned.items())
        problems += [*_other_sizes(job, pinned)] or [f"without {named}: {line}" for line in _other_sizes(job, {})]
    raise ConfigError(problems)


def nearest_that_fits(job: Job, pinned: Pinned) -> Plan | None:
    """Where no layout with the pinned values fits: the one that does and changes fewest of them; without any, the
    fastest on the least number of GPUs, doubled over and over; None if that does not help either."""

    def fits(config: Config) -> bool:
        return not layout_problems(job, config) and plan_layout(job, config).fits

    nearest = _nearest_layout(job, pinned, fits)
    factor = 2
    while nearest is None and factor <= MOST_TIMES:
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


def _other_sizes(job: Job, pinned: Pinned) -> Iterator[str]:
    """The nearest number of GPUs, and the nearest batch, for which there is a layout with the pinned values."""
    batch = job.base.data.global_batch_size
    changes: tuple[tuple[str, int, Iterable[int], Callable[[int], Job]], ...] = (
        ("number of GPUs", job.num_gpus, _numbers_of_gpus(job, pinned), lambda number: replace(job, num_gpus=number)),
        (
            "global_batch_size", batch, _batches(job, pinned),
            lambda number: replace(job, base=job.base.replace(global_batch_size=number)),
        ),
    )  # fmt: skip
    for name, asked, candidates, changed in changes:
        for number in sorted(set(candidates), key=lambda number: (abs(number - asked), number)):
            if _is_possible(changed(number), pinned):
                yield f"the nearest {name} that is possible: {number}"
                break


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
            # The interleaved schedule also needs a multiple of the stages.
            for step in (packs, packs * pp):
                below = job.base.data.global_batch_size // step
                yield from (step * number for number in (below, below + 1) if number)
