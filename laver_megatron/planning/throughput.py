"""How long an iteration takes: arithmetic, memory traffic, communication and the bubble of the slowest stage.

A model of few parts, each with a reason, and three numbers that were fitted to published runs (docs/planning.md says to
which, and how far it is off elsewhere): the share of the peak that matrix products reach, that of attention, and how
much of the tensor-parallel communication hides behind arithmetic where it is overlapped.

Collectives are counted as rings: of a tensor of n bytes over r ranks a GPU sends (r - 1) / r n in an all-gather or a
reduce-scatter, twice that in an all-reduce, and n in a broadcast.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from laver_megatron.config.engine_fields import RECOMPUTED_MODULES
from laver_megatron.config.fields import Config
from laver_megatron.config.modules import MODULES
from laver_megatron.flops.step import ModelFlops, StepFlops, step_flops
from laver_megatron.hf.shape import ModelShape
from laver_megatron.planning.activations import Saved
from laver_megatron.planning.hardware import Gpu
from laver_megatron.planning.memory import FP32_BYTES, OPTIMIZER_BYTES_BF16, StateBytes, value_bytes
from laver_megatron.planning.pipeline import bubble, layers_of_stages
from laver_megatron.planning.workload import Workload


@dataclass(frozen=True)
class SentBytes:
    """Bytes that one GPU sends in one iteration.

    Attributes:
        tensor_parallel: between the parts of each layer, forward, backward and recomputed.
        pipeline: activations and their gradients to the neighbouring stages.
        tied_embeddings: the embedding's gradient, summed over first and last stage, which have a copy each.
        gradients: summed over the data-parallel ranks.
        weights: gathered from them after the optimizer's step.
        teacher: broadcast after the EMA's.
    """

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
    # The MLP, recomputed alone, gathers and scatters again, too.
    again = 4 if parallel.recompute_granularity == "full" else 2 * ("mlp" in recomputed_modules(config))
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


MEMORY_EFFICIENCY, LINK_EFFICIENCY = 0.80, 0.80  # of the data sheets' rates, for long transfers
_INTERLEAVED_EXPOSED = 0.2  # share of the interleaved schedule's messages that arithmetic does not hide
_LAUNCH_SECONDS = 2e-3  # of an iteration: what the host does between steps


@dataclass(frozen=True)
class Overlap:
    """Shares of communication that stand in the way of arithmetic: 1, nothing is overlapped; 0, all hides."""

    tensor_parallel: float
    pipeline: float
    data_parallel: float


NO_OVERLAP = Overlap(1.0, 1.0, 1.0)
FULL_OVERLAP = Overlap(0.5, 0.0, 0.10)  # of the published runs, which overlap all three; the first is fitted


@dataclass(frozen=True)
class Seconds:
    """Of one iteration, on the slowest stage. matmul, attention, memory: linear layers, attention, and what only moves
    data (norms, rotary, activations); the rest by name."""

    matmul: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    tensor_parallel: float = 0.0
    pipeline: float = 0.0
    bubble: float = 0.0
    tied_embeddings: float = 0.0
    data_parallel: float = 0.0
    optimizer: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, item.name) for item in fields(self))


@dataclass(frozen=True)
class StageWork:
    """What the rank of a stage that has most to do computes in one micro-batch. linear, attention: FLOPs that run,
    recomputation included; traffic: bytes to and from memory of what is no matrix product."""

    linear: float
    attention: float
    traffic: float


def micro_batch_flops(config: Config, model: ModelFlops, workload: Workload) -> StepFlops:
    """Model FLOPs of one micro-batch of one replica, all stages."""
    return _flops(config, model, workload, config.data.micro_batch_size * workload.num_visual_tokens, 0)


def _flops(
    config: Config, model: ModelFlops, workload: Workload, num_visual_tokens: int, num_empty_slots: int
) -> StepFlops:
    packs = config.data.micro_batch_size
    return step_flops(
        model,
        num_tokens=packs * workload.seq_length,
        lm_span_area=packs * workload.lm_area,
        num_visual_tokens=num_visual_tokens,
        reconstruction_span_area=packs * workload.image_area + num_empty_slots,
        num_images=packs * workload.num_images,
        image_window_area=packs * workload.image_window_area,
        laver=config.objective.laver,
        gram=config.objective.gram_loss != "none",
        frozen=config.model.freeze,
    )


def computed_flops(config: Config, model: ModelFlops, workload: Workload) -> StepFlops:
    """FLOPs of one micro-batch of one replica as they run, recomputation apart: the decoder computes every visual slot,
    filled or not, and the language head no visual token. An empty slot attends to itself alone."""
    real = micro_batch_flops(config, model, workload)
    lm_head = int(real.lm_head * (1 - workload.visual_share))
    if not config.objective.laver:
        return replace(real, lm_head=lm_head)
    packs = config.data.micro_batch_size
    num_slots, num_tokens = packs * config.data.visual_seq_length, packs * workload.num_visual_tokens
    headless = replace(model, vision_head_per_token=0)
    in_slots = _flops(config, headless, workload, num_slots, num_slots - num_tokens)
    return replace(
        in_slots,
        lm_head=lm_head,
        teacher=in_slots.teacher + num_tokens * model.vision_head_per_token,
        vision_head=real.vision_head,
        gram=real.gram,
        connector=real.connector,
        encoder=real.encoder,
    )


def stage_work(
    config: Config, shape: ModelShape, model: ModelFlops, workload: Workload, stage: int, *, context_ranks: int = 1
) -> StageWork:
    """Of the ranks of a pipeline stage, what the one with most computes in one micro-batch. context_ranks: ranks that
    share a sequence, as in published runs; this program has none."""
    parallel, objective = config.parallel, config.objective
    tp, packs = parallel.tensor_model_parallel_size, config.data.micro_batch_size
    layers = sum(layers_of_stages(config, shape.num_layers)[stage])
    step = computed_flops(config, model, workload)
    slots = packs * config.data.visual_seq_length if objective.laver else 0
    num_empty = slots - packs * workload.num_visual_tokens
    head = packs * workload.num_visual_tokens * model.vision_head_per_token if objective.laver else 0
    in_images = (packs * workload.image_area + num_empty) * model.attention_per_pair if objective.laver else 0
    student_attention = step.student_attention_forward
    # Both operands of attention are activations: its backward pass is twice its forward pass wherever there is one.
    masked_attention = in_images * (3 if set(MODULES) - set(config.model.freeze) else 1)
    attention = step.attention + masked_attention + in_images
    linear = step.decoder_student + step.reconstruction - masked_attention + step.teacher - in_images - head
    if parallel.recompute_granularity == "full":
        linear += step.student_layers_forward - student_attention
    modules = recomputed_modules(config)
    if "core_attn" in modules:
        attention += student_attention
    if "mlp" in modules and parallel.recompute_granularity == "selective":
        linear += step.student_mlp_forward
    ranks = tp * context_ranks
    share = layers / shape.num_layers
    on_stage, attention_on_stage = linear * share / ranks, attention * share / ranks
    if stage == 0:
        # Whole images are divided, not their tokens.
        on_stage += (step.connector + step.encoder) * workload.largest_share_of_images(packs, tp)
    traffic = layers * (packs * workload.seq_length + slots * 4 / 3) * _traffic_per_token(config, shape)
    if stage == parallel.pipeline_model_parallel_size - 1:
        on_stage += (step.lm_head + step.vision_head + step.gram + head) / ranks
        # Logits as bf16 and fp32, their softmax, and the gradients of both.
        labels = packs * (workload.seq_length - workload.num_visual_tokens)
        traffic += labels * shape.vocab_size * 20 / tp
    return StageWork(on_stage, attention_on_stage, traffic / context_ranks)


def recomputed_modules(config: Config) -> tuple[str, ...]:
    """What the backward pass computes again of a layer."""
    granularity = config.parallel.recompute_granularity
    if granularity is None:
        return ()
    return RECOMPUTED_MODULES if granularity == "full" else config.engine.recompute_modules or ("core_attn",)


def _traffic_per_token(config: Config, shape: ModelShape) -> float:
    """Bytes that a layer's norms, residuals, rotary and SwiGLU move for one token, forward and backward."""
    parallel = config.parallel
    tp = parallel.tensor_model_parallel_size
    query_key = (shape.num_attention_heads + shape.num_query_groups) * shape.kv_channels / tp
    hidden = shape.hidden_size / (tp if parallel.sequence_parallel else 1)
    ffn = shape.ffn_hidden_size / tp
    forward = 10 * hidden + 2 * query_key + 3 * ffn
    backward = 12 * hidden + 2 * query_key + 5 * ffn
    again = forward if parallel.recompute_granularity == "full" else 0.0
    if parallel.recompute_granularity == "selective":
        modules = recomputed_modules(config)
        again = 4 * hidden * ("layernorm" in modules) + 3 * ffn * ("mlp" in modules)
    return (forward + backward + again) * value_bytes(config)


def overlap_of(config: Config) -> Overlap:
    """How much communication stands in the way of arithmetic: all of it, unless the configuration asks for overlap. How
    much hides has not been measured with this program."""
    asked = bool(config.engine.overlap_grad_reduce)
    return replace(NO_OVERLAP, data_parallel=FULL_OVERLAP.data_parallel) if asked else NO_OVERLAP


def seconds_of_stage(
    config: Config,
    shape: ModelShape,
    work: StageWork,
    sent: SentBytes,
    state: StateBytes,
    gpu: Gpu,
    data_parallel_size: int,
    num_micro_batches: int,
    overlap: Overlap,
) -> Seconds:
    """Of one iteration in which every stage is as slow as this one."""
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size

    def link(ranks_apart: int) -> float:
        is_near = gpu.holds_groups_of(ranks_apart, tp * data_parallel_size * pp)
        rate = gpu.node_bandwidth if is_near else gpu.network_bandwidth
        return rate * LINK_EFFICIENCY

    matmul = num_micro_batches * work.linear / (gpu.peak_flops * gpu.matmul_efficiency)
    attention = num_micro_batches * work.attention / (gpu.peak_flops * gpu.attention_efficiency)
    memory = num_micro_batches * work.traffic / (gpu.memory_bandwidth * MEMORY_EFFICIENCY)
    tensor_parallel = sent.tensor_parallel / link(tp) * overlap.tensor_parallel
    # Messages of the interleaved schedule run beside its arithmetic, but for the first and last of each round.
    exposed = 1.0 if parallel.num_layers_per_virtual_pipeline_stage is None else _INTERLEAVED_EXPOSED
    pipeline = sent.pipeline / link(tp * data_parallel_size * pp) * overlap.pipeline * exposed
    working = matmul + attention + memory + tensor_parallel + pipeline
    reduced = sent.gradients + sent.weights
    data_parallel = reduced / link(tp * data_parallel_size) * overlap.data_parallel
    data_parallel += sent.teacher * max(data_parallel_size - 1, 0) / link(tp * data_parallel_size)
    # First and last stage are as far apart as ranks can be.
    tied_embeddings = sent.tied_embeddings / link(tp * data_parallel_size * pp)
    return Seconds(
        matmul=matmul,
        attention=attention,
        memory=memory,
        tensor_parallel=tensor_parallel,
        pipeline=pipeline,
        bubble=working * bubble(config, shape.num_layers, num_micro_batches),
        tied_embeddings=tied_embeddings,
        data_parallel=data_parallel,
        optimizer=optimizer_traffic(state) / (gpu.memory_bandwidth * MEMORY_EFFICIENCY) + _LAUNCH_SECONDS,
    )
