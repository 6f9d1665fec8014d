"""The layouts that the planner goes through, and which of them are possible.

Whether a layout is possible is for `validate` to say, as it does of every run; the planner itself refuses tensor
parallelism over the network alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from laver_megatron.config.checks import sequence_problems, validate
from laver_megatron.config.directories import CheckedEncoder
from laver_megatron.config.fields import Config
from laver_megatron.planning.plan import RECOMPUTATIONS, Job

MICRO_BATCH_SIZES = (1, 2, 4, 8)
FIRST, LAST = "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"
_CHUNK = "num_layers_per_virtual_pipeline_stage"

Pinned = Mapping[str, Any]
"""Fields of Config that are not searched but given."""


def layouts(job: Job, pinned: Pinned) -> Iterator[Config]:
    """Every TP within a machine, PP, split of the layers, interleaving, micro-batch and recomputation, with the pinned
    values in place of those that are usual. At least one layout, possible or not."""
    for tp in _values(pinned, "tensor_model_parallel_size", _tensor_parallel_sizes(job)):
        for pp in _values(pinned, "pipeline_model_parallel_size", _pipeline_sizes(job, tp)):
            for first, last in _splits(job.shape.num_layers, pp, pinned):
                is_even = first is None and last is None
                for chunk in _values(pinned, _CHUNK, _chunks(job.shape.num_layers, pp) if is_even else [None]):
                    sizes = {FIRST: first, LAST: last, _CHUNK: chunk}
                    sizes |= {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
                    sizes["sequence_parallel"] = _can_split_sequences(job.base, tp)
                    for micro_batch_size in _values(pinned, "micro_batch_size", MICRO_BATCH_SIZES):
                        for recompute in _values(pinned, "recompute_granularity", RECOMPUTATIONS):
                            yield job.base.replace(
                                **sizes, micro_batch_size=micro_batch_size, recompute_granularity=recompute
                            )


def layout_problems(job: Job, config: Config) -> list[str]:
    """Why a layout cannot be, memory apart; empty if it can."""
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
    """All of them, ascending."""
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def _values(pinned: Pinned, field: str, usual: Iterable[Any]) -> list[Any]:
    return [pinned[field]] if field in pinned else list(usual)


def _tensor_parallel_sizes(job: Job) -> list[int]:
    return [size for size in divisors(job.num_gpus) if size <= job.gpu.node_size]


def _pipeline_sizes(job: Job, tp: int) -> list[int]:
    return [size for size in divisors(max(job.num_gpus // tp, 1)) if size <= job.shape.num_layers]


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
                # Two stages could be told in several ways.
                layers_of_stages = (at_first, at_last) if pp == 2 else (at_first, each, at_last)
                told = first or (None if at_first == each else at_first), last or (None if at_last == each else at_last)
                found.setdefault(layers_of_stages, told)
    # Without a layer for every stage it stays as it is, for `validate` to say why not.
    return list(found.values()) or [(first, last)]


def _can_split_sequences(base: Config, tp: int) -> bool:
    """Sequence parallelism saves memory and traffic wherever the sequences divide."""
    asked = base.replace(tensor_model_parallel_size=tp, sequence_parallel=True)
    return tp > 1 and not any(sequence_problems(asked))
