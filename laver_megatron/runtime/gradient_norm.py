"""The gradient norm where Megatron-Core has neither TransformerEngine's nor apex's kernel for it.

Megatron's own stand-in is `torch.norm` of each fp32 gradient. On a CPU that adds a whole tensor up in a few fp32 sums,
which stop growing once they dwarf what is added: the norm of 1e8 elements comes out 1% too small, of 5e8 10%. The
fused kernels have no such fault: each thread adds up at most 128 squares of a block of 65536 elements, and threads and
blocks are then added in a tree, all in fp32; `torch.norm` on a GPU divides its work in the same way.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

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
