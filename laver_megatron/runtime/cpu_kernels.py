"""On the CPU, what Megatron-Core has kernels for on CUDA alone: weight gradients that are added to the gradient buffer
by the product that makes them, and SwiGLU."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class _WeightGradients:
    """In the place of apex's module `fused_weight_gradient_mlp_cuda`. Without it every weight's gradient is a fresh
    matrix that is then added to the buffer, 15% of the time of the product."""

    @staticmethod
    def wgrad_gemm_accum_fp32(input_TI: Tensor, grad_output_TO: Tensor, main_grad_OI: Tensor) -> None:
        """main_grad += grad_output^T input; fp32 `[O, I]`, the other two fp32 or bf16."""
        if input_TI.dtype == main_grad_OI.dtype:
            main_grad_OI.addmm_(grad_output_TO.t(), input_TI)
        else:
            main_grad_OI.add_(grad_output_TO.t().matmul(input_TI))


def fuse_weight_gradients(modules: Iterable[nn.Module]) -> None:
    """Turns it on in the linear layers of modules that DistributedDataParallel has given gradient buffers: in
    Megatron's own on the CPU, and on CUDA where apex is there; in TransformerEngine's, which have it built in."""
    from megatron.core.tensor_parallel import layers

    on_cuda = torch.cuda.is_available()
    if not on_cuda:
        layers.fused_weight_gradient_mlp_cuda = _WeightGradients
    for part in (part for module in modules for part in module.modules()):
        if isinstance(part, (layers.ColumnParallelLinear, layers.RowParallelLinear)):
            part.gradient_accumulation_fusion = not on_cuda or layers._grad_accum_fusion_available
        elif hasattr(part, "fuse_wgrad_accumulation"):
            part.fuse_wgrad_accumulation = True  # type: ignore[assignment]


class _SwiGLU(torch.autograd.Function):
    """SiLU(gate) * up of `[..., 2 F]`, gate first. Keeps its input alone, and needs no `cat` for its gradient."""

    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        gate, up = gate_and_up.chunk(2, dim=-1)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gate_and_up,) = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        gradient = torch.empty_like(gate_and_up)
        of_gate, of_up = gradient.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(gradients[0] * up, gate, grad_input=of_gate)
        torch.mul(gradients[0], nn.functional.silu(gate), out=of_up)
        return gradient


def _swiglu(gate_and_up: Tensor, bias: Tensor | None, fp8_input_store: bool, offloads: bool) -> Tensor:
    """In the place of `bias_swiglu_impl`, which Megatron compiles."""
    assert bias is None and not fp8_input_store and not offloads
    return _SwiGLU.apply(gate_and_up)


def cpu_kernels() -> list[tuple[Any, str, Any]]:
    """(owner, name, replacement) of Megatron-Core's fused functions."""
    import megatron.core.transformer.mlp as mlp

    return [(mlp, "bias_swiglu_impl", _swiglu)]
