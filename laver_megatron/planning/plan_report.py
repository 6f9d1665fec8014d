"""A plan on the terminal and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from laver_megatron.config.fields import Config
from laver_megatron.planning.disk import checkpoint_bytes, room_needed
from laver_megatron.planning.hardware import GIB
from laver_megatron.planning.memory import checkpoint_copy_bytes
from laver_megatron.planning.plan import Job, Plan, activations_by_recomputation, laver_costs, layout_name
from laver_megatron.planning.search import FIRST, LAST, MOST_TIMES, Search

_SHOWN_REASONS = 6
_LAYOUT = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "data_parallel_size",
    "num_layers_per_virtual_pipeline_stage", FIRST, LAST, "sequence_parallel", "micro_batch_size",
    "recompute_granularity", "recompute_modules",
)  # fmt: skip


def plan_json(plan: Plan) -> dict[str, Any]:
    """All figures of a layout, in bytes, seconds and FLOPs."""
    costs = laver_costs(plan)
    settings = {**plan.config.flat(), "data_parallel_size": plan.data_parallel_size}
    return {
        "layout": {name: settings[name] for name in _LAYOUT},
        "fits": plan.fits,
        "usable_bytes": plan.job.gpu.usable_bytes,
        "encoder_bytes": plan.encoder_bytes,
        "host_copy_bytes": host_copies(plan),
        "checkpoint_bytes": checkpoint_size(plan),
        "num_micro_batches": plan.num_micro_batches,
        "stages": [
            {
                "stage": stage.stage,
                "state_bytes": asdict(stage.state),
                "activation_bytes": asdict(stage.activations),
                "memory_bytes": stage.memory_bytes,
                "sent_bytes": asdict(stage.sent),
                "seconds": asdict(stage.seconds),
            }
            for stage in plan.stages
        ],
        "activation_bytes_by_recomputation": activations_by_recomputation(plan),
        "model_flops": {**plan.flops.parts, "total": plan.flops.total},
        "hardware_flops": plan.hardware_flops,
        "bubble": plan.bubble,
        "seconds": plan.seconds,
        "tokens_per_second_per_gpu": plan.tokens_per_second_per_gpu,
        "model_flops_utilisation": plan.model_flops_utilisation,
        "gpu_hours": plan.gpu_hours,
        "laver_costs": None if costs is None else {**asdict(costs), "time_ratio": costs.ratio},
    }


def search_json(job: Job, found: Search, num_layouts: int, instead: Plan | None = None) -> dict[str, Any]:
    """The best layouts, those that do not fit, and why others are impossible. instead: an offer where none fits."""
    return {
        "num_gpus": job.num_gpus,
        "gpu": asdict(job.gpu),
        "workload": {**asdict(job.workload), "lm_area": job.workload.lm_area, "image_area": job.workload.image_area},
        "best": [plan_json(plan) for plan in best_of_each(found.fitting)[:num_layouts]],
        "too_large": [plan_json(plan) for plan in best_of_each(found.too_large)[:num_layouts]],
        "instead": None if instead is None else {"num_gpus": instead.job.num_gpus, **plan_json(instead)},
        "impossible": [{"reason": reason, "num_layouts": number} for reason, number in found.impossible],
    }


def best_of_each(plans: Iterable[Plan]) -> list[Plan]:
    """The first layout of each TP x PP."""
    first: dict[tuple[int, int], Plan] = {}
    for plan in plans:
        first.setdefault(_sizes(plan), plan)
    return list(first.values())


def search_report(job: Job, found: Search, num_layouts: int, instead: Plan | None = None) -> str:
    """The job, the best layouts, the costs of the best, and why the others are not chosen. instead: an offer where none
    fits."""
    work = job.workload
    lines = [
        f"{job.num_gpus} x {job.gpu.name}; packs of {work.seq_length} tokens, {work.num_visual_tokens} of them visual "
        f"({work.visual_share:.0%}) in {work.num_images} images; {job.base.data.global_batch_size} packs an iteration",
        "",
    ]
    if found.fitting:
        lines += [
            "layouts that fit, the fastest of each TP x PP",
            *_table(best_of_each(found.fitting)[:num_layouts]),
            "",
        ]
        lines += _best(found.fitting[0])
    else:
        lines += [*_nothing_fits(found, instead), ""]
    fits = {_sizes(plan) for plan in found.fitting}
    others = [plan for plan in best_of_each(found.too_large) if _sizes(plan) not in fits]
    if others:
        lines += [
            "",
            f"do not fit {_gib(job.gpu.usable_bytes)} GiB (of {_gib(job.gpu.memory_bytes, 0)}) at their smallest",
        ]
        lines += [f"  {_why_too_large(plan)}" for plan in others[:num_layouts]]
    if found.impossible:
        lines += ["", "are not possible"]
        lines += [f"  {number} layouts: {reason}" for reason, number in found.impossible[:_SHOWN_REASONS]]
        rest = sum(number for _, number in found.impossible[_SHOWN_REASONS:])
        lines += [f"  {rest} others, for reasons of these kinds"] if rest else []
    return "\n".join(lines)


def _nothing_fits(found: Search, instead: Plan | None) -> Iterator[str]:
    least = found.too_large[0]
    yield (
        f"no layout fits {_gib(least.job.gpu.usable_bytes)} GiB; the smallest takes "
        f"{_gib(least.fullest.memory_bytes)}: {layout_name(least.config, least.job.num_gpus)}"
    )
    if instead is None:
        yield f"nor does one fit on {MOST_TIMES * least.job.num_gpus} GPUs, the most that were tried"
    elif instead.job.num_gpus == least.job.num_gpus:
        yield f"the nearest that fits: {layout_name(instead.config, instead.job.num_gpus)}"
    else:
        yield f"{instead.job.num_gpus} GPUs are enough: {layout_name(instead.config, instead.job.num_gpus)}"


def _sizes(plan: Plan) -> tuple[int, int]:
    return plan.config.parallel.tensor_model_parallel_size, plan.config.parallel.pipeline_model_parallel_size


def _why_too_large(plan: Plan) -> str:
    fullest = plan.fullest
    return (
        f"{layout_name(plan.config, plan.job.num_gpus)}: stage {fullest.stage} takes {_gib(fullest.memory_bytes)} "
        f"GiB, {_gib(fullest.state.total)} of it state"
    )


def _table(plans: Sequence[Plan]) -> list[str]:
    columns: dict[str, Callable[[Plan], str]] = {
        "TP": lambda plan: str(plan.config.parallel.tensor_model_parallel_size),
        "PP": lambda plan: str(plan.config.parallel.pipeline_model_parallel_size),
        "DP": lambda plan: str(plan.data_parallel_size),
        "chunk": lambda plan: split_cell(plan.config),
        "micro": lambda plan: str(plan.config.data.micro_batch_size),
        "recompute": lambda plan: "+".join(
            plan.config.engine.recompute_modules or (plan.config.parallel.recompute_granularity or "none",)
        ),
        "GiB": lambda plan: _gib(plan.fullest.memory_bytes),
        "s/iteration": lambda plan: f"{plan.seconds:.2f}",
        "tokens/s/GPU": lambda plan: f"{plan.tokens_per_second_per_gpu:,.0f}",
        "MFU": lambda plan: f"{plan.model_flops_utilisation:.1%}",
        "bubble": lambda plan: f"{plan.bubble:.1%}",
        "GPU hours": lambda plan: f"{plan.gpu_hours:,.0f}",
    }
    is_uneven = any("/" in split_cell(plan.config) for plan in plans)
    legend = "chunk a/b: a layers on the first stage and b on the last, -: as many as on the others"
    rows = [[*columns], *([cell(plan) for cell in columns.values()] for plan in plans)]
    return [*align(rows), *([legend] if is_uneven else [])]


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Cells of equal width, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _gib(num_bytes: int, digits: int = 1) -> str:
    return f"{num_bytes / GIB:.{digits}f}"


def split_cell(config: Config) -> str:
    """Layers of a virtual stage, or of the first and last stage: 4, 3/-, -."""
    parallel = config.parallel
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    if first or last:
        return f"{first or '-'}/{last or '-'}"
    return str(parallel.num_layers_per_virtual_pipeline_stage or "-")


def _best(plan: Plan) -> Iterator[str]:
    yield f"the fastest: {layout_name(plan.config, plan.job.num_gpus)}"
    yield from align(_memory_rows(plan))
    by_kind = activations_by_recomputation(plan).items()
    recomputed = ", ".join(f"{kind} {_gib(number, 2)} GiB" for kind, number in by_kind)
    yield f"activations by what is recomputed: {recomputed}"
    yield f"the encoder's weights, on every rank of stage 0: {_gib(plan.encoder_bytes, 2)} GiB"
    copied, stage = max(zip(host_copies(plan), (one.stage for one in plan.stages), strict=True))
    yield (
        f"a checkpoint that is written in the background holds {_gib(copied, 2)} GiB of its host's memory for each "
        f"data-parallel rank 0 of stage {stage}"
    )
    yield room_needed(plan.config, checkpoint_size(plan))
    step, peak = plan.slowest, asdict(plan.slowest.seconds)
    yield f"time, on stage {step.stage}: {_named(peak, lambda seconds: f'{seconds:.3g} s')}"
    sent = _named(asdict(step.sent), lambda number: f"{number / 1e9:.2f} GB")
    yield f"sent by each of its GPUs: {sent or 'nothing'}"
    parts = _named(plan.flops.parts, lambda number: f"{number / plan.flops.total:.1%}", zeros=True)
    yield (
        f"model FLOPs of an iteration: {plan.flops.total:.4g} ({parts}); with what is computed again "
        f"{plan.hardware_flops:.4g}"
    )
    costs = laver_costs(plan)
    if costs is not None:
        yield (
            f"LaVer costs, where most of it lies: teacher {_gib(costs.teacher_bytes, 2)} GiB, vision head "
            f"{_gib(costs.head_bytes, 2)} GiB, second stream {_gib(costs.stream_bytes, 2)} GiB of activations; time: "
            f"{costs.ratio:.2f} x that without it (teacher {costs.teacher_seconds:.3g} s, vision head and Gram "
            f"{costs.head_seconds:.3g} s, second stream {costs.stream_seconds:.3g} s of {plan.seconds:.3g} s)"
        )


def checkpoint_size(plan: Plan) -> int:
    """Of a checkpoint on the disk, see `checkpoint_bytes`."""
    job = plan.job
    return checkpoint_bytes(plan.config, job.shape, job.workload.encoder, job.encoder_sizes)


def host_copies(plan: Plan) -> list[int]:
    """Of each of the plan's stages, see `checkpoint_copy_bytes`."""
    return [checkpoint_copy_bytes(plan.config, stage.state, plan.data_parallel_size) for stage in plan.stages]


def _named(values: Mapping[str, float], text: Callable[[float], str], *, zeros: bool = False) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {text(value)}" for name, value in values.items() if value or zeros)


def _memory_rows(plan: Plan) -> list[list[str]]:
    first = plan.stages[0]
    kinds = [*asdict(first.state), *asdict(first.activations)]
    rows = [["stage", *kinds, "GiB"]]
    for stage in plan.stages:
        held = {**asdict(stage.state), **asdict(stage.activations)}
        rows.append([str(stage.stage), *(_gib(held[kind], 2) for kind in kinds), _gib(stage.memory_bytes, 2)])
    return rows
