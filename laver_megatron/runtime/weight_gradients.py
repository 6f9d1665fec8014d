"""Weight gradients that are added to Megatron's gradient buffer by the matrix product that makes them, on the CPU.

Megatron-Core does this on CUDA with a kernel of apex or TransformerEngine (`gradient_accumulation_fusion`). Without it
every weight's gradient is a fresh matrix that is then added to the buffer, 15% of the time of the product. A BLAS does
both at once.
"""

from collections.abc import Iterable

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor, nn


class _Products:
    """What Megatron-Core calls in the place of the module `fused_weight_gradient_mlp_cuda`."""

    @staticmethod
    def wgrad_gemm_accum_fp32(input_TI: Tensor, grad_output_TO: Tensor, main_grad_OI: Tensor) -> None:
        """main_grad += grad_output^T input; fp32 `[O, I]`, the other two fp32 or bf16."""
        if input_TI.dtype == main_grad_OI.dtype:
            main_grad_OI.addmm_(grad_output_TO.t(), input_TI)
        else:
            main_grad_OI.add_(grad_output_TO.t().matmul(input_TI))


def fuse_weight_gradients(modules: Iterable[nn.Module]) -> None:
    """Turns it on in Megatron's linear layers of modules that DistributedDataParallel has given gradient buffers. On
    CUDA nothing changes: there it is a matter of TransformerEngine or apex."""
    if torch.cuda.is_available():
        return
    layers.fused_weight_gradient_mlp_cuda = _Products
    for module in modules:
        for part in module.modules():
            if isinstance(part, (layers.ColumnParallelLinear, layers.RowParallelLinear)):
                part.gradient_accumulation_fusion = True
