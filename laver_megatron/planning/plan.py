"""One layout of a run on a number of GPUs: what it costs in memory and time.

A layout is a configuration of the run; whether it is possible at all is for `planner` to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from laver_megatron.config.fields import Config
from laver_megatron.flops.step import ModelFlops, StepFlops, hardware_flops, run_flops
from laver_megatron.hf.shape import ModelShape
from laver_megatron.hf.weights import Size
from laver_megatron.planning.activations import ActivationBytes, activations_of_stage
from laver_megatron.planning.hardware import Gpu
from laver_megatron.planning.memory import StateBytes, fullest_state, value_bytes
from laver_megatron.planning.pipeline import bubble
from laver_megatron.planning.throughput import (
    Overlap,
    Seconds,
    SentBytes,
    micro_batch_flops,
    overlap_of,
    seconds_of_stage,
    sent_bytes,
    stage_work,
)
from laver_megatron.planning.workload import Workload

RECOMPUTATIONS = (None, "selective", "full")


@dataclass(frozen=True)
class Job:
    """What is to be planned, except for the layout.

    Attributes:
        base: the run's configuration.
        encoder_sizes: of the encoder's tensors.
        overlap: how much of the communication hides behind arithmetic; None: as the configuration overlaps it.
    """

    base: Config
    shape: ModelShape
    workload: Workload
    encoder_sizes: Mapping[str, Size]
    gpu: Gpu
    num_gpus: int
    overlap: Overlap | None = None

    @property
    def flops(self) -> ModelFlops:
        return run_flops(self.base, self.shape, self.workload.encoder)


@dataclass(frozen=True)
class StagePlan:
    """What the fullest data-parallel rank of a pipeline stage holds and sends, and how long an iteration would take at
    its pace."""

    stage: int
    state: StateBytes
    activations: ActivationBytes
    sent: SentBytes
    seconds: Seconds

    @property
    def memory_bytes(self) -> int:
        return self.state.total + self.activations.total


@dataclass(frozen=True)
class Plan:
    """One layout with its costs.

    Attributes:
        stages: the first, the second (which has most in flight of those between) and the last.
        flops: the model's, of one iteration.
        hardware_flops: the same with recomputation.
    """

    config: Config
    job: Job
    data_parallel_size: int
    num_micro_batches: int
    stages: tuple[StagePlan, ...]
    flops: StepFlops
    hardware_flops: int
    bubble: float

    @property
    def slowest(self) -> StagePlan:
        return max(self.stages, key=lambda stage: stage.seconds.total)

    @property
    def fullest(self) -> StagePlan:
        return max(self.stages, key=lambda stage: stage.memory_bytes)

    @property
    def encoder_bytes(self) -> int:
        """The image encoder's weights, whole on every rank of the first stage and among its other weights."""
        return sum(prod(size) for size in self.job.encoder_sizes.values()) * value_bytes(self.config)

    @property
    def seconds(self) -> float:
        """Of one iteration."""
        return self.slowest.seconds.total

    @property
    def fits(self) -> bool:
        return self.fullest.memory_bytes <= self.job.gpu.usable_bytes

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.config.data.global_batch_size * self.config.data.seq_length / self.seconds / self.job.num_gpus

    @property
    def gpu_hours(self) -> float:
        """Of all train_iters."""
        return self.seconds * self.config.training.train_iters * self.job.num_gpus / 3600

    @property
    def model_flops_utilisation(self) -> float:
        """Model FLOPs by the exact mask area, as a share of all GPUs' peak."""
        return self.flops.total / self.seconds / self.job.num_gpus / self.job.gpu.peak_flops


def plan_layout(job: Job, config: Config) -> Plan:
    """The costs of a layout that `validate` finds nothing wrong with."""
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    dp = job.num_gpus // (tp * pp)
    num_micro_batches = config.data.global_batch_size // (dp * config.data.micro_batch_size)
    model, overlap = job.flops, job.overlap or overlap_of(config)
    stages = []
    for stage in sorted({0, min(1, pp - 1), pp - 1}):
        state = fullest_state(config, job.shape, job.workload.encoder, job.encoder_sizes, dp, stage)
        sent = sent_bytes(config, job.shape, job.workload, state, dp, num_micro_batches, stage)
        work = stage_work(config, job.shape, model, job.workload, stage)
        stages.append(
            StagePlan(
                stage,
                state,
                activations_of_stage(config, job.shape, job.workload, num_micro_batches, stage, fused=True),
                sent,
                seconds_of_stage(config, job.shape, work, sent, state, job.gpu, dp, num_micro_batches, overlap),
            )
        )
    one, number = micro_batch_flops(config, model, job.workload), num_micro_batches * dp
    step = replace(one, **{name: value * number for name, value in vars(one).items()})
    return Plan(
        config=config,
        job=job,
        data_parallel_size=dp,
        num_micro_batches=num_micro_batches,
        stages=tuple(stages),
        flops=step,
        hardware_flops=hardware_flops(step, parallel.recompute_granularity, config.engine.recompute_modules),
        bubble=bubble(config, job.shape.num_layers, num_micro_batches),
    )


def layout_name(config: Config, num_gpus: int) -> str:
    """A layout in a few words."""
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    unsplit = ", sequences not split" if tp > 1 and not parallel.sequence_parallel else ""
    recompute = " and ".join(config.engine.recompute_modules or (parallel.recompute_granularity or "nothing",))
    return (
        f"TP {tp} x PP {pp} x DP {num_gpus // (tp * pp)}{split_name(config)}{unsplit}, "
        f"micro-batch {config.data.micro_batch_size}, {recompute} recomputed"
    )


def split_name(config: Config) -> str:
    """How the decoder's layers lie on the stages, where that is not evenly and in one piece."""

    parallel = config.parallel

    def layers(number: int) -> str:
        return f"{number} layer{'s' if number > 1 else ''}"

    chunk = parallel.num_layers_per_virtual_pipeline_stage
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    parts = ["" if chunk is None else f"chunks of {layers(chunk)}"]
    parts += [f"{layers(size)} {end}" for size, end in ((first, "first"), (last, "last")) if size]
    return "".join(f", {part}" for part in parts if part)


@dataclass(frozen=True)
class LaverCosts:
    """What the visual objective adds to a layout: bytes on the rank where each is largest, and seconds of an iteration,
    divided as the FLOPs are.

    Attributes:
        teacher_bytes: weights and accumulators.
        head_bytes: weights, gradients and optimizer of vision head and [MASK].
        stream_bytes: the second stream's activations.
    """

    teacher_bytes: int
    head_bytes: int
    stream_bytes: int
    teacher_seconds: float
    head_seconds: float
    stream_seconds: float
    seconds_without: float

    @property
    def ratio(self) -> float:
        """Time with it, of time without."""
        return 1 + (self.teacher_seconds + self.head_seconds + self.stream_seconds) / self.seconds_without


def laver_costs(plan: Plan) -> LaverCosts | None:
    """None for a layout without LaVer."""
    if not plan.config.objective.laver:
        return None
    without = plan_layout(plan.job, plan.config.replace(laver=False))
    pairs = list(zip(plan.stages, without.stages, strict=True))
    parts = plan.flops.parts
    head = parts["vision_head"] + parts["gram"]
    added = parts["teacher"] + parts["reconstruction"] + head
    seconds = plan.seconds - without.seconds
    return LaverCosts(
        teacher_bytes=max(stage.state.teacher + stage.state.accumulators for stage in plan.stages),
        head_bytes=max(_student_bytes(one.state) - _student_bytes(other.state) for one, other in pairs),
        stream_bytes=max(one.activations.total - other.activations.total for one, other in pairs),
        teacher_seconds=seconds * parts["teacher"] / added,
        head_seconds=seconds * head / added,
        stream_seconds=seconds * parts["reconstruction"] / added,
        seconds_without=without.seconds,
    )


def _student_bytes(state: StateBytes) -> int:
    return state.weights + state.gradients + state.optimizer


def activations_by_recomputation(plan: Plan) -> dict[str, int]:
    """Bytes of activations on the rank with most of them, in this layout, for each kind of recomputation."""

    def most(kind: str | None) -> int:
        rest = plan.config.replace(recompute_granularity=kind), plan.job.shape, plan.job.workload
        stages = [stage.stage for stage in plan.stages]
        return max(activations_of_stage(*rest, plan.num_micro_batches, stage, fused=True).total for stage in stages)

    return {kind or "none": most(kind) for kind in RECOMPUTATIONS}
