"""A Qwen2.5 decoder for Megatron-Core: its TransformerConfig and its layer, from a Hugging Face config.json.

Everything that differs between checkpoints (vocabulary, tying, norm epsilon, key/value heads) is read from
the file, nothing is inferred from a size's name.
"""

import importlib.util
from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from laver_megatron.config.fields import Config
from laver_megatron.hf.shape import ModelShape
from laver_megatron.model.attention import SpanAttention
from laver_megatron.model.positions import rotate
from laver_megatron.model.precision import fp8_settings
from laver_megatron.runtime.engine import mlp_builder

# Without TransformerEngine, Megatron-Core defines these names as mocks.
HAVE_TRANSFORMER_ENGINE = importlib.util.find_spec("transformer_engine") is not None
if HAVE_TRANSFORMER_ENGINE:
    from megatron.core.extensions.transformer_engine import (
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )
else:
    # Recomputed norms ask TransformerEngine whether FP8 is on unless this argument is None; its default, False, is not.
    CheckpointWithoutOutput.__init__.__defaults__ = (None,) * len(CheckpointWithoutOutput.__init__.__defaults__ or ())


def _fill_with_nan(weight: Tensor) -> None:
    """Initialises with NaN what a checkpoint must overwrite, so that a weight that was not loaded is found at once."""
    torch.nn.init.constant_(weight, float("nan"))


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm, computed in fp32.

    Megatron-Core's local norm refuses sequence parallelism; this one tells Megatron to sum the gain's
    gradient over the tensor-parallel ranks, each of which sees a part of the sequence.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.full((hidden_size,), float("nan"), dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


class RotatedSelfAttention(SelfAttention):
    """Megatron-Core's self-attention with `rotary_pos_emb` as a table of cosines and sines (`rotary_table`).

    Megatron takes angles and computes their cosines and sines anew for query and key of every layer.
    """

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor, *args: Any, rotary_pos_emb: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        assert rotary_pos_emb is not None
        self._table: Tensor | None = rotary_pos_emb  # read within this call alone, so no schedule can mix it up
        output = super().forward(hidden_states, attention_mask, *args, rotary_pos_emb=None, **kwargs)
        self._table = None
        return output

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        assert self._table is not None
        return rotate(query, self._table), rotate(key, self._table), value


def num_virtual_stages(config: Config, num_layers: int) -> int | None:
    """Virtual stages of each pipeline stage under the interleaved schedule; None for the plain one."""
    parallel = config.parallel
    if parallel.num_layers_per_virtual_pipeline_stage is None:
        return None
    return num_layers // parallel.pipeline_model_parallel_size // parallel.num_layers_per_virtual_pipeline_stage


def transformer_config(config: Config, shape: ModelShape) -> TransformerConfig:
    """Megatron-Core's configuration of the decoder: the shape from Hugging Face, the layout from the run."""
    parallel = config.parallel
    dtype = torch.bfloat16 if config.training.bf16 else torch.float32
    num_stages = parallel.pipeline_model_parallel_size
    virtual_stages = num_virtual_stages(config, shape.num_layers)
    on_gpu = torch.cuda.is_available()
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        normalization="RMSNorm",
        layernorm_epsilon=shape.rms_norm_eps,
        add_bias_linear=False,
        add_qkv_bias=True,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=_fill_with_nan,
        output_layer_init_method=_fill_with_nan,
        gradient_accumulation_fusion=False,
        bf16=config.training.bf16,
        **fp8_settings(config),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=num_stages,
        virtual_pipeline_model_parallel_size=virtual_stages,
        num_layers_in_first_pipeline_stage=parallel.decoder_first_pipeline_num_layers,
        num_layers_in_last_pipeline_stage=parallel.decoder_last_pipeline_num_layers,
        sequence_parallel=parallel.sequence_parallel,
        recompute_granularity=parallel.recompute_granularity,
        recompute_method="uniform" if parallel.recompute_granularity == "full" else None,
        recompute_modules=None if config.engine.recompute_modules is None else list(config.engine.recompute_modules),
        recompute_num_layers=1 if parallel.recompute_granularity == "full" else None,
        # Every loss is divided by its count over the global batch before the backward pass, so nothing
        # downstream may divide again.
        calculate_per_token_loss=True,
        # Gloo reads a tensor until its receiver has it; the interleaved schedule frees it before that. (NCCL's
        # streams keep the order.)
        deallocate_pipeline_outputs=num_stages > 1 and (on_gpu or virtual_stages is None),
        # With two stages, batched messages of the interleaved schedule's two directions get mixed up.
        overlap_p2p_comm=virtual_stages is not None,
        batch_p2p_comm=virtual_stages is None,
    )


def layer_spec(kernel: str, segments: tuple[int, ...], ffn_hidden_size: int) -> ModuleSpec:
    """One decoder layer whose attention runs over spans. With TransformerEngine its linear layers and norms
    are used; checkpoint keys are the same with and without."""
    core_attention = partial(SpanAttention, kernel=kernel, segments=segments)
    with_te = HAVE_TRANSFORMER_ENGINE
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            **({} if with_te else {"input_layernorm": RMSNorm, "pre_mlp_layernorm": RMSNorm}),
            self_attention=ModuleSpec(
                module=RotatedSelfAttention,
                params={"attn_mask_type": AttnMaskType.arbitrary},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=TELayerNormColumnParallelLinear if with_te else ColumnParallelLinear,
                    core_attention=core_attention,
                    linear_proj=TERowParallelLinear if with_te else RowParallelLinear,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            mlp=mlp_builder(
                MLPSubmodules(
                    linear_fc1=TELayerNormColumnParallelLinear if with_te else ColumnParallelLinear,
                    linear_fc2=TERowParallelLinear if with_te else RowParallelLinear,
                ),
                ffn_hidden_size,
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def build_decoder(
    config: TransformerConfig,
    kernel: str,
    segments: tuple[int, ...],
    *,
    is_last_stage: bool,
    vp_stage: int | None,
) -> TransformerBlock:
    """This stage's decoder layers, and the final norm on the last stage. Takes its input as an argument on
    every stage: the stage module, not the block, knows what the pipeline delivered."""
    num_layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlock(
        config=config,
        spec=TransformerBlockSubmodules(
            layer_specs=[layer_spec(kernel, segments, config.ffn_hidden_size)] * num_layers,
            layer_norm=TENorm if HAVE_TRANSFORMER_ENGINE else RMSNorm,
        ),
        pre_process=True,
        post_process=is_last_stage,
        vp_stage=vp_stage,
    )
