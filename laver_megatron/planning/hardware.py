"""GPUs that plans are made for: what the data sheets say of them, and how much of it training gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from laver_megatron.config.fields import ConfigError
from laver_megatron.flops.hardware import PEAK_BF16_TFLOPS

GIB, GIGA, TERA = 1 << 30, 10**9, 10**12
# What is left of a GPU's memory for tensors: the rest goes to CUDA, NCCL, the libraries and what lies between blocks.
_USABLE_SHARE = 0.92
_RESERVED_BYTES = 2 * GIB
_LEAST, _MOST = 1e-3, 1e6  # of what a GPU can be described with


@dataclass(frozen=True)
class Gpu:
    """One GPU and its connections. Rates are per GPU and second, in one direction.

    Attributes:
        peak_flops: dense bf16.
        memory_bandwidth: bytes to and from its memory.
        node_bandwidth: bytes to the other GPUs of its machine; network_bandwidth: bytes to other machines.
        node_size: GPUs of one machine.
        matmul_efficiency: share of the peak that large matrix products reach in training (docs/planning.md).
        attention_efficiency: the same for attention kernels, of the pairs inside the mask.
    """

    name: str
    memory_bytes: int
    peak_flops: float
    memory_bandwidth: float
    node_bandwidth: float
    network_bandwidth: float
    node_size: int = 8
    matmul_efficiency: float = 0.63
    attention_efficiency: float = 0.42

    @property
    def usable_bytes(self) -> int:
        """Of its memory, what tensors may take."""
        return int(self.memory_bytes * _USABLE_SHARE) - _RESERVED_BYTES

    def holds_groups_of(self, num_ranks: int, num_gpus: int) -> bool:
        """Whether every group of so many neighbouring ranks lies within one machine. num_gpus: of the run, whose ranks
        fill one machine after the other."""
        return num_gpus <= self.node_size or self.node_size % num_ranks == 0


def _peak(name: str) -> float:
    return PEAK_BF16_TFLOPS[name] * TERA


# The data sheets' figures: memory, HBM, NVLink in one direction (PCIe 5 for the L40S), and the peaks of
# `flops/hardware.py`; the network is one 400 Gb/s adapter for each GPU (200 Gb/s with the A100), as in NVIDIA's own
# clusters.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40gb", 40 * GIB, _peak("A100"), 1.555e12, 300e9, 25e9, matmul_efficiency=0.65),
        Gpu("a100-80gb", 80 * GIB, _peak("A100"), 2.039e12, 300e9, 25e9, matmul_efficiency=0.65),
        Gpu("h100-80gb", 80 * GIB, _peak("H100"), 3.35e12, 450e9, 50e9),
        Gpu("h200-141gb", 141 * 10**9, _peak("H200"), 4.8e12, 450e9, 50e9),
        Gpu("h20-96gb", 96 * GIB, _peak("H20"), 4.0e12, 450e9, 50e9, matmul_efficiency=0.85),
        Gpu("b200-180gb", 180 * 10**9, _peak("B200"), 8.0e12, 900e9, 50e9),
        Gpu("l40s-48gb", 48 * GIB, _peak("L40S"), 0.864e12, 32e9, 25e9),
    )
}
# The field and the unit of what a flag gives.
_FIELDS = {
    "--gpu-tflops": ("peak_flops", TERA),
    "--bandwidth": ("network_bandwidth", GIGA),
    "--node-bandwidth": ("node_bandwidth", GIGA),
    "--gpus-per-node": ("node_size", 1),
}


def find_gpu(
    name: str | None,
    *,
    memory_gib: float | None = None,
    tflops: float | None = None,
    bandwidth_gb: float | None = None,
    node_bandwidth_gb: float | None = None,
    node_size: int | None = None,
) -> Gpu:
    """A known GPU, with some of its figures replaced, or another one by its figures alone. bandwidth_gb: to other
    machines; node_bandwidth_gb: within one, where a GPU that is not known has the former unless it is said.

    Raises:
        ConfigError: an unknown GPU that is not described, or figures out of range.
    """
    flags = {
        "--gpu-memory": memory_gib,
        "--gpu-tflops": tflops,
        "--bandwidth": bandwidth_gb,
        "--node-bandwidth": node_bandwidth_gb,
        "--gpus-per-node": node_size,
    }
    given = {flag: value for flag, value in flags.items() if value is not None}
    wrong = [
        f"{flag} is {value}, but must be a number from {_LEAST:g} to {_MOST:,.0f}"
        for flag, value in given.items()
        if not _LEAST <= value <= _MOST
    ]
    if wrong:
        raise ConfigError(wrong)
    known = GPUS.get(name or "") or _described(name, given)
    changes: dict[str, Any] = {field: given[flag] * unit for flag, (field, unit) in _FIELDS.items() if flag in given}
    if memory_gib is not None:
        changes["memory_bytes"] = int(memory_gib * GIB)
    gpu = replace(known, **changes)
    if gpu.usable_bytes <= 0:
        raise ConfigError(
            [
                f"--gpu-memory is {gpu.memory_bytes / GIB:g} GiB, of which nothing is left for tensors: "
                f"{1 - _USABLE_SHARE:.0%} and {_RESERVED_BYTES / GIB:g} GiB are kept for CUDA and NCCL"
            ]
        )
    return gpu


def _described(name: str | None, given: Mapping[str, float]) -> Gpu:
    """A GPU that is not in the list, from the flags that were given."""
    if missing := [flag for flag in ("--gpu-memory", "--gpu-tflops", "--bandwidth") if flag not in given]:
        unknown = "no GPU is named" if name is None else f"GPU {name!r} is not known"
        raise ConfigError(
            [
                f"{unknown}; choose one of {', '.join(GPUS)}, or describe it: {', '.join(missing)} "
                "(GiB, dense bf16 TFLOPS, GB/s of the network)"
            ]
        )
    flops, bandwidth = given["--gpu-tflops"] * TERA, given["--bandwidth"] * GIGA
    # Memory keeps pace with arithmetic on most accelerators, about as on an H100.
    return Gpu(name or "custom", 0, flops, flops * 3.35e12 / 989.4e12, bandwidth, bandwidth)
