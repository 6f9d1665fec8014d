"""The gradient norm, and the loss and norm that all ranks decide by whether a step is applied.

Where Megatron-Core has neither TransformerEngine's nor apex's kernel for the norm, it is `blockwise_l2_norm`.
Megatron's own stand-in is `torch.norm` of each fp32 gradient. On a CPU that adds a whole tensor up in a few fp32 sums,
which stop growing once they dwarf what is added: the norm of 1e8 elements comes out 1% too small, of 5e8 10%. The
fused kernels have no such fault: each thread adds up at most 128 squares of a block of 65536 elements, and threads and
blocks are then added in a tree, all in fp32; `torch.norm` on a GPU divides its work in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from laver_megatron.runtime import engine

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer

# Elements that are added up in fp32. Their norm is then good to about 1e-6, in all directions alike, and memory for
# the norms of the blocks is a four-thousandth of the tensor's.
_BLOCK = 4096


def blockwise_l2_norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Sequence[Sequence[Tensor]], per_tensor: bool
) -> tuple[Tensor, None]:
    """The norm of all tensors together, fp32 `[1]`: of blocks in fp32, over the blocks in fp64. Takes and gives what
    Megatron's `local_multi_tensor_l2_norm` does; only tensors that are not contiguous are copied."""
    assert not per_tensor, "norms of single tensors are not implemented"
    norms = []
    for tensor in (tensor for tensors in tensor_lists for tensor in tensors):
        flat = tensor.reshape(-1)
        num_whole = flat.numel() // _BLOCK * _BLOCK
        norms.append(torch.linalg.vector_norm(flat[:num_whole].view(-1, _BLOCK), dim=1))
        norms.append(torch.linalg.vector_norm(flat[num_whole:]).view(1))
    return torch.linalg.vector_norm(torch.cat(norms), dtype=torch.float64).float().view(1), None


def gradient_of(main_parameter: Tensor) -> Tensor | None:
    """The gradient that the optimizer will apply to one of its fp32 parameters; None if there is none."""
    if main_parameter.grad is not None:
        return main_parameter.grad
    return getattr(main_parameter, "decoupled_grad", None)  # with --use-precision-aware-optimizer


@torch.no_grad()
def agreed_loss_and_norm(optimizer: MegatronOptimizer, loss: float) -> tuple[float, float]:
    """Loss and gradient norm of a step, to the same bits on every rank: what one rank decides by them, all do.

    Megatron's norm leaves out copies, of parameters that tensor-parallel ranks hold alike and of an embedding that
    pipeline stages share. Only this rank sees what became of its own copy, so each rank looks at all of its gradients.
    Call once the gradients are reduced and the optimizer has taken them. Collective, with one wait for the device.

    Args:
        loss: of the whole batch, as this rank knows it.

    Returns:
        The loss of rank 0, NaN if any rank's is not finite. The norm over all parameters, each counted once; NaN if any
        copy of a gradient is not finite.
    """
    counted = [gradient for part in optimizer.chained_optimizers for gradient in engine.gradients_of_norm(part)]
    is_counted = {id(gradient) for gradient in counted}
    all_gradients = (gradient_of(main) for part in optimizer.chained_optimizers for main in part.get_parameters())
    copies = [gradient for gradient in all_gradients if gradient is not None and id(gradient) not in is_counted]
    of_rank = loss if dist.get_rank() == 0 else 0.0
    squares = [_square_norm(counted), _square_norm(copies)]
    device = squares[0].device
    sums = torch.cat([*squares, torch.full((1,), of_rank if math.isfinite(loss) else math.nan, device=device)])
    dist.all_reduce(sums)
    square, of_copies, agreed_loss = sums.tolist()
    return agreed_loss, math.sqrt(square) if math.isfinite(of_copies) else math.nan


def _square_norm(gradients: Sequence[Tensor]) -> Tensor:
    """fp32 `[1]`, as Megatron computes it."""
    from megatron.core.optimizer import clip_grads  # here: `blockwise_l2_norm` takes its place there

    device = torch.cuda.current_device()
    if not gradients:
        return torch.zeros(1, device=device)
    nothing_wrong = torch.zeros(1, dtype=torch.int, device=device)
    norm, _ = clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, nothing_wrong, [list(gradients)], False)
    return norm.view(1) ** 2
