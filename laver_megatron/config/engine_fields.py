"""The section of the configuration that says how Megatron-Core computes a step: none of it changes the numbers by more
than rounding. Names are Megatron's."""

from __future__ import annotations

from dataclasses import dataclass

from laver_megatron.config.options import POSITIVE, option
from laver_megatron.config.refused import refused

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
        refused("cuda_graph_impl", "capture layers in CUDA graphs"),
        choices=("none", "local", "transformer_engine"),
        default="none",
    )
    fine_grained_activation_offloading: bool = option(
        refused("fine_grained_activation_offloading", "keep activations in the host's memory"), default=False
    )
    tp_comm_overlap: bool = option(
        refused("tp_comm_overlap", "tensor-parallel communication beside matrix products"), default=False
    )
    recompute_modules: tuple[str, ...] | None = option(
        "what --recompute-granularity selective computes again (default: core_attn, which saves memory with attention "
        "kernel dense alone: flex and flash keep no scores, so it saves their outputs at most)",
        choices=RECOMPUTED_MODULES,
        default=None,
    )
