"""Collectives in a group of one rank, on Gloo: nothing to do, but Gloo copies the whole buffer three times.

A run on one process has such groups everywhere: the data-parallel one alone cost 14% of a language-model step.
"""

import inspect
from collections.abc import Callable
from functools import wraps
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


def _where_alone(collective: Callable[..., Any], finish: Callable[[dict[str, Any]], None]) -> Callable[..., Any]:
    """A collective that in a group of one rank only does what `finish` does with its arguments, by name."""
    signature = inspect.signature(collective)

    @wraps(collective)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        if not _is_alone(given.get("group")):
            return collective(*args, **kwargs)
        finish(given)
        return _Done() if given.get("async_op") else None

    return call


def _in_place(collective: Callable[..., Any]) -> Callable[..., Any]:
    """A collective that changes one tensor, which is the result already."""
    return _where_alone(collective, lambda given: None)


def _to_output(collective: Callable[..., Any], output: str, input: str) -> Callable[..., Any]:
    """A collective from one tensor to another, which may be a view of the same memory; their names."""

    def copy(given: dict[str, Tensor]) -> None:
        if given[output].data_ptr() != given[input].data_ptr():
            given[output].copy_(given[input].view_as(given[output]))

    return _where_alone(collective, copy)


def local_collectives() -> list[tuple[Any, str, Any]]:
    """(owner, name, replacement) of the collectives that Megatron-Core calls on whole buffers."""
    import megatron.core.distributed.param_and_grad_buffer as buffers

    reduce_scatter = _to_output(dist.reduce_scatter_tensor, "output", "input")
    all_gather = _to_output(dist.all_gather_into_tensor, "output_tensor", "input_tensor")
    return [
        (dist, "all_reduce", _in_place(dist.all_reduce)),
        (dist, "reduce_scatter_tensor", reduce_scatter),
        (dist, "all_gather_into_tensor", all_gather),
        (buffers, "dist_reduce_scatter_func", reduce_scatter),
        (buffers, "dist_all_gather_func", all_gather),
    ]
