"""Peak memory of steps in this process."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_of_steps(build: Callable[[], Callable[[], None]], device: torch.device, num_steps: int = 3) -> int:
    """Bytes at the peak of `num_steps` steps, all that `build` left behind included. On CUDA what the allocator gave
    out; else the resident set (Linux) above what it was before `build`, without the peak of `build` itself."""
    gc.collect()
    before = 0 if device.type == "cuda" else resident("VmRSS")
    step = build()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        _CLEAR.write_text("5")  # the peak begins anew
    for _ in range(num_steps):
        step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident("VmHWM") - before


def resident(name: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise AssertionError(f"no {name} in {_STATUS}")
