"""NCCL's own records of a fault: torch's flight recorder writes each rank's last collectives to `run_dir/faults/`."""

import os
from collections.abc import Callable, MutableMapping
from pathlib import Path

import torch

from laver_megatron.resilience.stacks import DIRECTORY

_EVENTS = "2000"  # the newest torch's default; older ones record nothing unless told


def set_nccl_variables(run_dir: Path, environ: MutableMapping[str, str] = os.environ) -> None:
    """Turns the flight recorder on, where there is CUDA; what the user has set stays. Before the process group begins.

    Two names for one thing: newer versions of torch read TORCH_FR_*, older ones TORCH_NCCL_*."""
    if not torch.cuda.is_available():
        return
    faults = run_dir.absolute() / DIRECTORY
    faults.mkdir(parents=True, exist_ok=True)
    traces = str(faults / "nccl_rank_")  # to which torch adds the rank's number
    for names, value in (
        (("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"), _EVENTS),
        (("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"), traces),
        (("TORCH_NCCL_DUMP_ON_TIMEOUT",), "1"),
        # End the process on an error without aborting communicators, which can itself hang: torch's default now.
        (("TORCH_NCCL_ASYNC_ERROR_HANDLING",), "3"),
    ):
        if environ.keys().isdisjoint(names):
            environ.update(dict.fromkeys(names, value))


def write_flight_record(directory: Path, rank: int) -> None:
    """Writes this rank's last collectives for `torchfrtrace`, where NCCL records them. torch writes them itself when a
    collective times out, which the watchdog does not wait for."""
    dump: Callable[[], bytes] | None = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
    if dump is None or not torch.cuda.is_available():
        return
    (directory / f"nccl_rank_{rank}").write_bytes(dump())
