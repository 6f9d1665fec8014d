"""What a training step adds to where the run stands, and its record in metrics.jsonl: one function each.

A new column of metrics.jsonl is one line of `step_record`.
"""

from typing import Any

import torch
import torch.distributed as dist

from laver_megatron.checkpoint.progress import Progress
from laver_megatron.config.fields import Config
from laver_megatron.data.batch.batches import GlobalCounts
from laver_megatron.flops.step import ModelFlops, StepFlops, step_flops, tflops_per_gpu
from laver_megatron.objective.micro_batch import TERMS
from laver_megatron.objective.schedules import rates_of_parts
from laver_megatron.run_log.metrics import peak_memory_bytes
from laver_megatron.run_log.utilisation import utilisation, work_of


def flops_of(model: ModelFlops, counts: GlobalCounts, config: Config) -> StepFlops:
    """Model FLOPs of a step with these counts, all devices together."""
    return step_flops(model, **work_of(counts, config))


def advance(
    progress: Progress,
    config: Config,
    counts: GlobalCounts,
    flops: StepFlops,
    *,
    seconds: float,
    data_seconds: float,
    skipped: bool,
) -> None:
    """Adds one iteration to where the run stands and to the sums of its summary."""
    progress.iteration += 1
    progress.consumed_packs += config.data.global_batch_size
    progress.consumed_samples += counts.samples
    progress.bad_samples += counts.bad_samples
    progress.consumed_tokens += counts.tokens
    progress.counted_iterations += 1
    progress.consumed_visual_tokens += counts.visual_tokens
    progress.consumed_label_tokens += counts.labels
    progress.model_flops += flops.total
    progress.laver_flops += flops.laver_overhead
    progress.skipped_iterations += skipped
    progress.training_seconds += seconds
    progress.data_seconds += data_seconds
    progress.skipped_seconds += skipped * (seconds - data_seconds)
    progress.device_seconds += seconds * dist.get_world_size()


def step_record(
    config: Config,
    progress: Progress,
    counts: GlobalCounts,
    model: ModelFlops,
    terms: dict[str, float],
    *,
    grad_norm: float,
    learning_rate: float,
    mask_ratio: float,
    momentum: float,
    seconds: float,
    data_seconds: float,
    data_wait_seconds: float,
    device: torch.device,
) -> dict[str, Any]:
    """What is logged of one iteration. Fields of LaVer are None where it is off."""
    num_devices = dist.get_world_size()
    of_laver: dict[str, Any] = {name: terms[name] for name in TERMS if name not in ("loss", "lm_loss")}
    of_laver.update(mask_ratio=mask_ratio, num_masked_tokens=counts.masked, ema_momentum=momentum)
    return {
        "iteration": progress.iteration,
        "loss": terms["loss"],
        "lm_loss": terms["lm_loss"],
        **(of_laver if config.objective.laver else dict.fromkeys(of_laver)),
        "grad_norm": grad_norm,
        "learning_rate": learning_rate,
        **{
            f"learning_rate_{part}": learning_rate * rate / config.training.lr
            for part, rate in rates_of_parts(config.training).items()
        },
        "visual_token_share": counts.visual_tokens / max(counts.tokens, 1),
        "num_samples": counts.samples,
        "num_bad_samples": counts.bad_samples,
        "num_tokens": counts.tokens,
        "tokens_per_second": counts.tokens / seconds,
        "visual_tokens_per_second": counts.visual_tokens / seconds,
        "images_per_second": counts.images / seconds,
        "tflops_per_gpu": tflops_per_gpu(flops_of(model, counts, config).total, seconds, num_devices),
        **utilisation(model, counts, config, seconds=seconds, num_devices=num_devices, device=device),
        "peak_memory_bytes": peak_memory_bytes(device),
        "consumed_samples": progress.consumed_samples,
        "consumed_packs": progress.consumed_packs,
        "consumed_tokens": progress.consumed_tokens,
        "skipped_iterations": progress.skipped_iterations,
        "elapsed_seconds": seconds,
        "data_seconds": data_seconds,
        "data_wait_seconds": data_wait_seconds,
        "global_batch_size": config.data.global_batch_size,
    }
