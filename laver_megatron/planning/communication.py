"""Bytes that one GPU sends in one iteration, by kind.

Collectives are counted as rings: of a tensor of n bytes over r ranks a GPU sends (r - 1) / r n in an all-gather or a
reduce-scatter, twice that in an all-reduce, and n in a broadcast.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from laver_megatron.config.fields import Config
from laver_megatron.hf.shape import ModelShape
from laver_megatron.planning.activations import Saved
from laver_megatron.planning.memory import (
    FP32_BYTES,
    OPTIMIZER_BYTES_BF16,
    StateBytes,
    layers_of_stages,
    value_bytes,
)
from laver_megatron.planning.workload import Workload


@dataclass(frozen=True)
class SentBytes:
    """tensor_parallel: between the parts of each layer, forward, backward and recomputed; pipeline: activations and
    their gradients to the neighbouring stages; tied_embeddings: the gradient of the table of words, summed over first
    and last stage, which have a copy each; gradients: summed over the data-parallel ranks; weights: gathered from them
    after the optimizer's step; teacher: broadcast after the EMA's."""

    tensor_parallel: int = 0
    pipeline: int = 0
    tied_embeddings: int = 0
    gradients: int = 0
    weights: int = 0
    teacher: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, item.name) for item in fields(self))


def sent_bytes(
    config: Config,
    shape: ModelShape,
    workload: Workload,
    state: StateBytes,
    data_parallel_size: int,
    num_micro_batches: int,
    stage: int,
    *,
    context_ranks: int = 1,
) -> SentBytes:
    """Of one GPU of a pipeline stage. state: what it holds; context_ranks: that share a sequence, in published runs."""
    dp = data_parallel_size
    # Weights and gradients of what trains, as Megatron's buffers hold them.
    trained = state.gradients // FP32_BYTES * value_bytes(config)
    return SentBytes(
        tensor_parallel=num_micro_batches * tensor_parallel_bytes(config, shape, workload, stage) // context_ranks,
        pipeline=num_micro_batches * pipeline_bytes(config, shape, workload, stage) // context_ranks,
        tied_embeddings=tied_embedding_bytes(config, shape, stage),
        gradients=state.gradients * (dp - 1) // dp,
        weights=trained * (dp - 1) // dp,
        teacher=state.teacher // dp if dp > 1 else 0,
    )


def tensor_parallel_bytes(config: Config, shape: ModelShape, workload: Workload, stage: int) -> int:
    """In one micro-batch. Each layer gathers its input and scatters its output twice, around attention and MLP, and so
    do their gradients; under sequence parallelism the inputs are gathered once more for the weights' gradients."""
    parallel = config.parallel
    tp = parallel.tensor_model_parallel_size
    if tp == 1:
        return 0
    saved = Saved(config, shape, workload, fused=True)
    hidden = shape.hidden_size * saved.value_bytes * (tp - 1) // tp
    student = saved.num_tokens * hidden
    num_layers = sum(layers_of_stages(config, shape.num_layers)[stage])
    backward = 6 if parallel.sequence_parallel else 4
    again = 4 if parallel.recompute_granularity == "full" else 0
    total = num_layers * (4 + backward + again) * student
    if config.objective.laver:
        total += num_layers * 4 * config.data.micro_batch_size * config.data.visual_seq_length * hidden
    if stage == parallel.pipeline_model_parallel_size - 1:
        total += 2 * student  # the heads' input and its gradient
    return total


def pipeline_bytes(config: Config, shape: ModelShape, workload: Workload, stage: int) -> int:
    """In one micro-batch: what `[student | teacher]` holds to the next stage, for every chunk, and gradients back."""
    pp = config.parallel.pipeline_model_parallel_size
    if pp == 1:
        return 0
    received = Saved(config, shape, workload, fused=True).received()
    num_chunks = len(layers_of_stages(config, shape.num_layers)[stage])
    # Of all boundaries between chunks in a row, those behind and before this stage's chunks.
    after = num_chunks - (stage == pp - 1)
    before = num_chunks - (stage == 0)
    return received * (after + before)


def tied_embedding_bytes(config: Config, shape: ModelShape, stage: int) -> int:
    """In one iteration: an all-reduce over two ranks of this rank's whole part of the table, in fp32 like all
    gradients."""
    pp = config.parallel.pipeline_model_parallel_size
    if pp == 1 or not shape.tie_word_embeddings or "decoder" in config.model.freeze or stage not in (0, pp - 1):
        return 0
    return shape.vocab_size * shape.hidden_size // config.parallel.tensor_model_parallel_size * FP32_BYTES


def optimizer_traffic(state: StateBytes) -> int:
    """Bytes to and from memory in the optimizer's step and the EMA's: state read and written, gradients read."""
    values = state.optimizer // OPTIMIZER_BYTES_BF16
    return 2 * state.optimizer + values * (FP32_BYTES + 2) + state.gradients + 3 * state.accumulators
