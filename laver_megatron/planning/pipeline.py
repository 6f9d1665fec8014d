"""Pipeline schedules by arithmetic: what is in flight on a stage, and how long stages wait."""

from __future__ import annotations

from laver_megatron.config.fields import Config
from laver_megatron.planning.memory import layers_of_stages


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
