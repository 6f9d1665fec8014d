"""Pipeline stages by arithmetic: their layers, what is in flight, and how long they wait."""

from __future__ import annotations

from laver_megatron.config.fields import Config


def layers_of_stages(config: Config, num_layers: int) -> list[list[int]]:
    """Decoder layers of every chunk of every pipeline stage."""
    parallel = config.parallel
    pp = parallel.pipeline_model_parallel_size
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    if first is not None or last is not None:
        others = pp - (first is not None) - (last is not None)
        each = (num_layers - (first or 0) - (last or 0)) // max(others, 1)
        return [
            [first if stage == 0 and first is not None else last if stage == pp - 1 and last is not None else each]
            for stage in range(pp)
        ]
    per_stage = num_layers // pp
    per_chunk = parallel.num_layers_per_virtual_pipeline_stage or per_stage
    return [[per_chunk] * (per_stage // per_chunk) for _ in range(pp)]


def chunks_in_flight(config: Config, num_layers: int, num_micro_batches: int, stage: int) -> int:
    """Forward passes of a (virtual) stage that wait for their backward pass at most.

    1F1B: as many as there are stages from this one to the last. Interleaved: the warm-up of Megatron's schedule, two
    for each stage behind this one and a whole round of stages for each chunk but one, and the pass that runs.
    """
    pp = config.parallel.pipeline_model_parallel_size
    num_chunks = len(layers_of_stages(config, num_layers)[0])
    if num_chunks == 1:
        return min(num_micro_batches, pp - stage)
    warm_up = 2 * (pp - stage - 1) + (num_chunks - 1) * pp
    return min(num_micro_batches * num_chunks, warm_up + 1)


def bubble(config: Config, num_layers: int, num_micro_batches: int) -> float:
    """Time that a stage waits, as a share of the time it works: (pp - 1) / (micro-batches x chunks)."""
    num_chunks = len(layers_of_stages(config, num_layers)[0])
    return (config.parallel.pipeline_model_parallel_size - 1) / (num_micro_batches * num_chunks)
