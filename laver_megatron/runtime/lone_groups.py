"""Collectives in a group of one rank, on Gloo: nothing to do, but Gloo copies the whole buffer three times.

A run on one process has such groups everywhere: the data-parallel one alone cost 14% of a language-model step.
"""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor


class _Done:
    """What an asynchronous collective returns, when there was nothing to wait for."""

    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def _is_alone(group: dist.ProcessGroup | None) -> bool:
    return dist.get_world_size(group) == 1


def _in_place(collective: Callable[..., Any]) -> Callable[..., Any]:
    """A collective that changes one tensor, which is the result already."""

    def call(tensor: Tensor, *args: Any, group: Any = None, async_op: bool = False, **kwargs: Any) -> Any:
        if args or not _is_alone(group):
            return collective(tensor, *args, group=group, async_op=async_op, **kwargs)
        return _Done() if async_op else None

    return call


def _to_output(collective: Callable[..., Any]) -> Callable[..., Any]:
    """A collective from one tensor to another, which may be a view of the same memory."""

    def call(
        output: Tensor, input: Tensor, *args: Any, group: Any = None, async_op: bool = False, **kwargs: Any
    ) -> Any:
        if args or not _is_alone(group):
            return collective(output, input, *args, group=group, async_op=async_op, **kwargs)
        if output.data_ptr() != input.data_ptr():
            output.copy_(input.view_as(output))
        return _Done() if async_op else None

    return call


def local_collectives() -> list[tuple[Any, str, Any]]:
    """(owner, name, replacement) of the collectives that Megatron-Core calls on whole buffers."""
    import megatron.core.distributed.param_and_grad_buffer as buffers

    reduce_scatter = _to_output(dist.reduce_scatter_tensor)
    all_gather = _to_output(dist.all_gather_into_tensor)
    return [
        (dist, "all_reduce", _in_place(dist.all_reduce)),
        (dist, "reduce_scatter_tensor", reduce_scatter),
        (dist, "all_gather_into_tensor", all_gather),
        (buffers, "dist_reduce_scatter_func", reduce_scatter),
        (buffers, "dist_all_gather_func", all_gather),
    ]
