"""The section of the configuration that says how Megatron-Core computes a step: none of it changes the numbers by more
than rounding. Names are Megatron's."""

from __future__ import annotations

from dataclasses import dataclass

from laver_megatron.config.options import POSITIVE, option

RECOMPUTED_MODULES = ("core_attn", "layernorm", "mlp")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a step is computed and communicated."""

    overlap_grad_reduce: bool | None = option(
        "reduce gradients over the data-parallel replicas during the backward pass, bucket by bucket (default: where "
        "there are several replicas, on CUDA)",
        default=None,
    )
    overlap_param_gather: bool | None = option(
        "gather updated parameters during the next forward pass (default: as --overlap-grad-reduce, which it needs)",
        default=None,
    )
    ddp_bucket_size: int | None = option(
        "parameters of a bucket at least (default: Megatron's 40 million, or a million for each replica if that is "
        "more)",
        valid=POSITIVE,
        default=None,
    )
    cuda_graph_impl: str = option(
        "capture layers in CUDA graphs: refused, because this program's attention cannot be captured",
        choices=("none", "local", "transformer_engine"),
        default="none",
    )
    fine_grained_activation_offloading: bool = option(
        "activations to the host: refused, because this program's stages cannot do it", default=False
    )
    tp_comm_overlap: bool = option(
        "tensor-parallel communication beside matrix products: refused, because its buffers have one shape",
        default=False,
    )
    recompute_modules: tuple[str, ...] | None = option(
        "what --recompute-granularity selective computes again (default: core_attn)",
        choices=RECOMPUTED_MODULES,
        default=None,
    )
