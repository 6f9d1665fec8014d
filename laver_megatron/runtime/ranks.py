"""Doing something on several ranks so that a failure on one of them ends all, instead of leaving them waiting.

Without torch.distributed there is one rank, and the functions just do it.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from laver_megatron.runtime.exit_status import OF_ANOTHER_RANK

Result = TypeVar("Result")


class RaisedByAll(ValueError):
    """An error that all ranks raise together before a step has changed anything: the state is that of the last whole
    step, so that they can save it first. An error of one rank cannot: the others wait for it elsewhere."""


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gathered(value: Any) -> list[Any]:
    """Every rank's value, in the order of the ranks."""
    values = [value] * num_ranks()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def on_every_rank(is_so: bool) -> bool:
    """Whether something holds on all ranks."""
    if not dist.is_initialized():
        return is_so
    found = torch.tensor([int(is_so)], device=torch.cuda.current_device())  # of this backend, see `use_backend`
    dist.all_reduce(found, op=dist.ReduceOp.MIN)
    return bool(found.item())


def all_ranks(action: str, work: Callable[[], Result]) -> Result:
    """Runs `work` and, if it fails anywhere, fails everywhere with the first reason; on the other ranks the error has
    the note `OF_ANOTHER_RANK`.

    Raises:
        ValueError, or OSError if that is what the first was: `could not {action}: rank N: reason`.
    """
    if not dist.is_initialized():
        return work()
    result, problem = None, None
    try:
        result = work()
    except (Exception, CheckpointException) as error:  # the second is no Exception
        kind = OSError if isinstance(error, OSError) else ValueError
        problem = kind, f"{type(error).__name__}: {error}"
    failed = [(number, *found) for number, found in enumerate(gathered(problem)) if found]
    if failed:
        number, kind, text = failed[0]
        agreed = kind(f"could not {action}: rank {number}: {text}")
        if number != rank():
            agreed.add_note(OF_ANOTHER_RANK)
        raise agreed
    return result  # type: ignore[return-value]


def on_rank_0(action: str, work: Callable[[], None]) -> None:
    """Runs `work` on rank 0 while the others wait; fails everywhere if it fails there."""
    all_ranks(action, work if rank() == 0 else lambda: None)
