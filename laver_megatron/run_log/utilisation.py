"""How much of the hardware a step used: MFU and HFU, by definitions that stand in docs/performance.md.

- MFU counts what the method needs: real tokens, the exact mask area, the LM head where there is a label, the teacher's
  forward pass. Nothing that a kernel computes beside it, and no recomputation.
- HFU adds the recomputation that the run asked for.
- `mfu_full_square` counts as published figures do: attention over the square of the sequence, whatever the mask, and
  the LM head on every real token. For comparisons with those alone.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from laver_megatron.config.fields import Config
from laver_megatron.data.batch.batches import GlobalCounts
from laver_megatron.flops.hardware import PEAK_BF16_TFLOPS, peak_tflops
from laver_megatron.flops.step import ModelFlops, hardware_flops, step_flops, tflops_per_gpu

UTILISATION_FIELDS = ("mfu", "hfu", "mfu_full_square")


def peak_of_run(config: Config, device: torch.device) -> float | None:
    """TFLOP/s of one device that the run is held against, None where nobody knows it."""
    if config.run.peak_tflops is not None:
        return config.run.peak_tflops
    # Without bf16 the tensor cores' rate is out of reach.
    return _table_entry(device) if config.training.bf16 and device.type == "cuda" else None


@cache
def _table_entry(device: torch.device) -> float | None:
    return peak_tflops(torch.cuda.get_device_name(device))


def missing_peak(config: Config, device: torch.device) -> str | None:
    """Why there is no MFU, to be said once; None where there is."""
    if peak_of_run(config, device) is not None:
        return None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    reason = f"the peak {'bf16' if config.training.bf16 else 'fp32'} throughput of {name} is not known"
    return f"no MFU: {reason} (known in bf16: {', '.join(PEAK_BF16_TFLOPS)}); set it with --peak-tflops"


def utilisation(
    model: ModelFlops, counts: GlobalCounts, config: Config, *, seconds: float, num_devices: int, device: torch.device
) -> dict[str, float | None]:
    """`UTILISATION_FIELDS` of a step, shares of the devices' peak; all None without one."""
    peak = peak_of_run(config, device)
    if peak is None:
        return dict.fromkeys(UTILISATION_FIELDS)
    needed = step_flops(model, **work_of(counts, config), num_label_tokens=counts.labels)
    square = config.data.global_batch_size * config.data.seq_length**2
    published = step_flops(model, **(work_of(counts, config) | {"lm_span_area": square}))
    flops = {
        "mfu": needed.total,
        "hfu": hardware_flops(needed, config.parallel.recompute_granularity, config.engine.recompute_modules),
        "mfu_full_square": published.total,
    }
    return {name: tflops_per_gpu(value, seconds, num_devices) / peak for name, value in flops.items()}


def work_of(counts: GlobalCounts, config: Config) -> dict[str, Any]:
    """Arguments of `step_flops` for a step with these counts."""
    return {
        "num_tokens": counts.tokens,
        "lm_span_area": counts.language_span_area,
        "num_visual_tokens": counts.visual_tokens,
        "reconstruction_span_area": counts.image_span_area,
        "num_images": counts.images,
        "image_window_area": counts.image_window_area,
        "laver": config.objective.laver,
        "gram": config.objective.gram_loss != "none",
        "frozen": config.model.freeze,
    }
