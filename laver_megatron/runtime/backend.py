"""CUDA with NCCL, or CPU with Gloo: the one place that knows Megatron-Core assumes CUDA.

On a machine without CUDA, `use_backend()` redirects the few CUDA calls that Megatron-Core makes
unconditionally (device queries, RNG states, `device="cuda"` arguments, type names) to the CPU. Nothing
else in the package asks which of the two it runs on, except to choose a kernel.
"""

import datetime
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from laver_megatron.runtime.adam import ResumableAdam
from laver_megatron.runtime.cpu_kernels import cpu_kernels
from laver_megatron.runtime.gradient_norm import blockwise_l2_norm
from laver_megatron.runtime.lone_groups import local_collectives

_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}


@dataclass(frozen=True)
class Backend:
    """What the processes run on. `device` is this process's, `communication` the torch.distributed backend."""

    device: torch.device
    communication: str

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"


def _names_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class CudaTo(TorchFunctionMode):
    """Rewrites `device="cuda"` to another device, and answers `Tensor.cuda()` and `Tensor.type()` as Megatron expects.
    takes_all: every device that is named becomes that one."""

    def __init__(self, device: torch.device, *, takes_all: bool = False) -> None:
        super().__init__()
        self.device, self.takes_all = device, takes_all

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return _CUDA_TYPE_NAMES.get(args[0].dtype) or func(*args)
        if self._is_rewritten(kwargs.get("device")):
            kwargs = {**kwargs, "device": self.device}
        if func is torch.Tensor.to and any(self._is_rewritten(a) for a in args):
            args = tuple(self.device if self._is_rewritten(a) else a for a in args)
        return func(*args, **kwargs)

    def _is_rewritten(self, device: Any) -> bool:
        return _names_cuda(device) or (self.takes_all and isinstance(device, (str, torch.device)))


def cuda_calls(device: torch.device) -> list[tuple[Any, str, Any]]:
    """(owner, name, replacement) of the CUDA functions that Megatron-Core calls without asking."""
    import megatron.core.tensor_parallel.random as megatron_random

    return [
        (torch.cuda, "current_device", lambda: device),
        # Of 0.19: before it reduces gradients, it takes the stream to let it wait for graphs, of which there are none.
        (torch.cuda, "current_stream", lambda *args, **kwargs: None),
        (torch.cuda, "synchronize", lambda *args, **kwargs: None),
        (torch.cuda, "empty_cache", lambda: None),
        (torch.cuda, "get_rng_state", lambda *args, **kwargs: torch.get_rng_state()),
        (torch.cuda, "manual_seed", torch.manual_seed),
        (megatron_random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state()),
        (megatron_random, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state)),
    ]


def resumable_adam() -> list[tuple[Any, str, Any]]:
    """(owner, name, replacement) that hand Megatron's distributed optimizer our Adam in the place of a fused one."""
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distrib_optimizer

    return [
        (optimizer, "Adam", ResumableAdam),
        (optimizer, "USING_PYTORCH_OPTIMIZER", False),
        (distrib_optimizer, "Adam", ResumableAdam),
        (distrib_optimizer, "HAVE_APEX_OR_TE", True),
        (distrib_optimizer, "USING_APEX_OPTIMIZER", True),
    ]


_backend: Backend | None = None


def use_backend() -> Backend:
    """Chooses CUDA if there is a GPU, else the CPU, and prepares Megatron-Core for it. Call before building
    anything; calling again returns the same answer."""
    global _backend
    if _backend is not None:
        return _backend
    # Megatron asks for this order of kernels on the GPU's queues when communication overlaps computation.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        _backend = Backend(device=device, communication="nccl")
    else:
        cpu = torch.device("cpu")
        _replace_attributes(cuda_calls(cpu))
        _replace_attributes([*local_collectives(), *cpu_kernels()])
        CudaTo(cpu).__enter__()
        _backend = Backend(device=cpu, communication="gloo")
    _replace_kernels_that_are_missing()
    return _backend


def _replace_attributes(replacements: Iterable[tuple[Any, str, Any]]) -> None:
    for owner, name, replacement in replacements:
        setattr(owner, name, replacement)


def _replace_kernels_that_are_missing() -> None:
    """Where neither TransformerEngine nor apex is installed, Megatron falls back to torch's AdamW, which its
    distributed optimizer cannot save and load, and to a gradient norm that is too small for large tensors on a CPU."""
    import megatron.core.optimizer.clip_grads as clip_grads
    import megatron.core.optimizer.distrib_optimizer as distrib_optimizer
    from megatron.core.utils import local_multi_tensor_l2_norm

    if not distrib_optimizer.HAVE_APEX_OR_TE:
        _replace_attributes(resumable_adam())
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = blockwise_l2_norm


def initialise_parallelism(
    *,
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int,
    virtual_pipeline_model_parallel_size: int | None,
    timeout_minutes: int,
    seed: int,
) -> None:
    """Joins the process group and builds Megatron's parallel groups."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    join_process_group(timeout_minutes)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_pipeline_model_parallel_size,
        distributed_timeout_minutes=timeout_minutes,
    )
    model_parallel_cuda_manual_seed(seed)


def join_process_group(timeout_minutes: int) -> None:
    """Joins the process group of torchrun, or a group of one, unless this process has."""
    backend = use_backend()
    if not torch.distributed.is_initialized():
        # A group of one needs no rendezvous, and must not set variables that child processes inherit.
        alone: dict[str, Any] = {}
        if "RANK" not in os.environ:
            alone = {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1}
        torch.distributed.init_process_group(
            backend.communication,
            **alone,
            timeout=datetime.timedelta(minutes=timeout_minutes),
            device_id=backend.device if backend.is_cuda else None,
        )


def shut_down_parallelism() -> None:
    """Leaves the process group; safe to call when there is none."""
    from megatron.core import parallel_state

    if torch.distributed.is_initialized():
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def hardware_of(backend: Backend) -> dict[str, Any]:
    """What a run runs on and how it is divided, for its summary; after `initialise_parallelism`."""
    from megatron import core
    from megatron.core import parallel_state

    name = torch.cuda.get_device_name(backend.device) if backend.is_cuda else f"CPU, {platform.machine()}"
    return {
        "device": name,
        "num_devices": torch.distributed.get_world_size(),
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "data_parallel_size": parallel_state.get_data_parallel_world_size(),
        "torch": torch.__version__,
        "megatron_core": core.__version__.partition("+")[0],  # 0.19 adds the commit of whatever repository it lies in
    }
