"""What to say when memory runs out: the numbers, and which options lower it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from laver_megatron.config.fields import Config

_GIB = 2**30
_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+ ?\w+)")
_ON_CPU = "DefaultCPUAllocator: can't allocate memory"  # torch has no type of its own for it


class OutOfMemory(RuntimeError):
    """Memory has run out, in words for the user."""


@contextmanager
def explaining_memory(config: Config) -> Iterator[None]:
    """An error of the block that says that memory has run out becomes OutOfMemory, from the same place."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        said = out_of_memory_message(error, config, int(os.environ.get("WORLD_SIZE", "1")))
        raise OutOfMemory(said).with_traceback(error.__traceback__) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device or the host has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _ON_CPU in str(error)


def out_of_memory_message(error: BaseException, config: Config, world_size: int) -> str:
    """One message: what was asked for, what was held and free, the layout, and what lowers it."""
    asked = _ASKED.search(str(error))
    on_device = isinstance(error, torch.OutOfMemoryError)
    numbers = f"{asked[1]} asked for" if asked else "it is not known how much was asked for"
    numbers += f"; {_device_numbers() if on_device else _host_numbers()}"
    parallel, data = config.parallel, config.data
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    layout = (
        f"TP {tp} x PP {pp} x DP {max(1, world_size // (tp * pp))}, --micro-batch-size {data.micro_batch_size}, "
        f"--seq-length {data.seq_length}, --recompute-granularity {parallel.recompute_granularity or 'none'}"
    )
    remedies = list(_device_remedies(config) if on_device else _host_remedies(config))
    where = "the GPU" if on_device else "the host"
    return f"out of memory on {where}: {numbers}; layout {layout}. What lowers it: {'; '.join(remedies)}"


def _device_numbers() -> str:
    if not torch.cuda.is_available():
        return "no CUDA device to ask for more"
    free, total = torch.cuda.mem_get_info()
    held = (
        f"{torch.cuda.memory_allocated() / _GIB:.1f} GiB allocated, {torch.cuda.memory_reserved() / _GIB:.1f} reserved"
    )
    return f"{held}, {free / _GIB:.1f} free of {total / _GIB:.1f}"


def _host_numbers() -> str:
    import psutil

    memory, own = psutil.virtual_memory(), psutil.Process().memory_info().rss
    return f"{own / _GIB:.1f} GiB held by this process, {memory.available / _GIB:.1f} free of {memory.total / _GIB:.1f}"


def _device_remedies(config: Config) -> Iterator[str]:
    """Options that are not in force yet, those that cost least first."""
    parallel, data = config.parallel, config.data
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        yield "--sequence-parallel"
    if parallel.recompute_granularity is None:
        yield "--recompute-granularity selective"
    if data.micro_batch_size > 1:
        yield f"--micro-batch-size {data.micro_batch_size // 2}"
    if parallel.recompute_granularity != "full":
        yield "--recompute-granularity full"
    yield f"--tensor-model-parallel-size {2 * parallel.tensor_model_parallel_size} or more pipeline stages"
    yield "a shorter --seq-length or --max-image-tokens"
    yield "`laver plan` shows what each layout needs (state and activations of every stage)"


def _host_remedies(config: Config) -> Iterator[str]:
    """What the host's memory is spent on besides the model."""
    if config.data.num_workers > 0:
        yield f"--num-workers {config.data.num_workers // 2}"
    yield "fewer processes on this host"
    yield "more memory for the job"
    if not torch.cuda.is_available():  # the model lies there, too
        yield from _device_remedies(config)
