"""One rank of a world that does not exist, in this process."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch.testing._internal.distributed.fake_pg import FakeStore

from laver_megatron.model import qwen
from laver_megatron.runtime.backend import CudaTo, cuda_calls, resumable_adam, shut_down_parallelism


@contextlib.contextmanager
def simulated_rank(
    rank: int,
    world_size: int,
    *,
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int,
    virtual_pipeline_model_parallel_size: int | None,
) -> Iterator[None]:
    """Lets this process build what one rank of a world builds that does not exist.

    Within it tensors have shapes but no memory, whatever device they are asked for on, collectives move nothing, and
    the other ranks are taken to say what this one says. Layers and optimizer are those that need neither CUDA nor
    TransformerEngine: the parameters and their checkpoint keys are the same. Leaves everything as it was.
    """
    devices = torch.distributed.Backend.backend_capability["fake"]
    if "meta" not in devices:
        devices.append("meta")
    assert not torch.distributed.is_initialized(), "a rank can only be simulated outside of a process group"
    meta = torch.device("meta")
    changes = [
        *cuda_calls(meta),
        *resumable_adam(),
        (qwen, "HAVE_TRANSFORMER_ENGINE", False),
        (torch.distributed, "all_gather_object", _answer_for_all),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in changes:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replacement)
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.callback(shut_down_parallelism)
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor_model_parallel_size,
            pipeline_model_parallel_size=pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=virtual_pipeline_model_parallel_size,
            create_gloo_process_groups=False,
        )
        model_parallel_cuda_manual_seed(0)
        stack.enter_context(meta)
        stack.enter_context(CudaTo(meta, takes_all=True))
        yield


def _answer_for_all(answers: list, own: Any, group: Any = None) -> None:
    answers[:] = [own] * len(answers)
