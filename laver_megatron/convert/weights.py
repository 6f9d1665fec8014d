"""The name table: which Hugging Face tensors make up each Megatron tensor, and how, in both directions.

It speaks in Megatron's checkpoint keys (the same with and without TransformerEngine) and in whole tensors;
how a tensor is sharded is Megatron's own knowledge (its sharded state dict) and appears nowhere here.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from laver_megatron.model.shape import ModelShape

Join = Callable[[Sequence[Tensor], ModelShape], Tensor]
Split = Callable[[Tensor, ModelShape], list[Tensor]]


@dataclass(frozen=True)
class WeightRule:
    """Megatron key (with `{layer}` where it is per layer), the Hugging Face names, and the pure, invertible
    operation between them on whole tensors."""

    megatron: str
    hugging_face: tuple[str, ...]
    join: Join
    split: Split


def _copy(tensors: Sequence[Tensor], shape: ModelShape) -> Tensor:
    (tensor,) = tensors
    return tensor


def _same(tensor: Tensor, shape: ModelShape) -> list[Tensor]:
    return [tensor]


def join_qkv(tensors: Sequence[Tensor], shape: ModelShape) -> Tensor:
    """Query, key, value to Megatron's fused order: for each key/value group its query heads, its key, its value.

    Works on weights `[rows, H]` and biases `[rows]`. With 4 query heads and 2 groups the rows become
    q0 q1 k0 v0 q2 q3 k1 v1.
    """
    groups = shape.num_query_groups
    return torch.cat([t.unflatten(0, (groups, -1)) for t in tensors], dim=1).flatten(0, 1)


def split_qkv(fused: Tensor, shape: ModelShape) -> list[Tensor]:
    """Inverse of `join_qkv`."""
    queries = shape.num_attention_heads // shape.num_query_groups * shape.kv_channels
    parts = fused.unflatten(0, (shape.num_query_groups, -1)).split([queries, shape.kv_channels, shape.kv_channels], 1)
    return [part.flatten(0, 1) for part in parts]


def _join_rows(tensors: Sequence[Tensor], shape: ModelShape) -> Tensor:
    return torch.cat(list(tensors))


def _halve_rows(tensor: Tensor, shape: ModelShape) -> list[Tensor]:
    return list(tensor.chunk(2))


_HF_LAYER = "model.layers.{layer}."
_MEGATRON_LAYER = "decoder.layers.{layer}."


def _layer(megatron: str, names: Sequence[str], join: Join = _copy, split: Split = _same) -> WeightRule:
    return WeightRule(_MEGATRON_LAYER + megatron, tuple(_HF_LAYER + name for name in names), join, split)


QWEN2_WEIGHTS: tuple[WeightRule, ...] = (
    WeightRule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), _copy, _same),
    _layer("self_attention.linear_qkv.layer_norm_weight", ["input_layernorm.weight"]),
    _layer("self_attention.linear_qkv.weight", [f"self_attn.{x}_proj.weight" for x in "qkv"], join_qkv, split_qkv),
    _layer("self_attention.linear_qkv.bias", [f"self_attn.{x}_proj.bias" for x in "qkv"], join_qkv, split_qkv),
    _layer("self_attention.linear_proj.weight", ["self_attn.o_proj.weight"]),
    _layer("mlp.linear_fc1.layer_norm_weight", ["post_attention_layernorm.weight"]),
    _layer("mlp.linear_fc1.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], _join_rows, _halve_rows),
    _layer("mlp.linear_fc2.weight", ["mlp.down_proj.weight"]),
    WeightRule("decoder.final_layernorm.weight", ("model.norm.weight",), _copy, _same),
    WeightRule("output_layer.weight", ("lm_head.weight",), _copy, _same),
)


def rule_for(megatron_key: str) -> tuple[WeightRule, tuple[str, ...]] | None:
    """The rule of a checkpoint key and its Hugging Face names with the layer filled in; None if there is none."""
    layer = re.match(r"decoder\.layers\.(\d+)\.", megatron_key)
    for rule in QWEN2_WEIGHTS:
        if rule.megatron.format(layer=layer.group(1) if layer else "") == megatron_key:
            return rule, tuple(name.format(layer=layer.group(1) if layer else "") for name in rule.hugging_face)
    return None


def hugging_face_names(shape: ModelShape) -> set[str]:
    """Every tensor a Qwen2 checkpoint of this shape may hold (the LM head also where it is tied)."""
    return {
        name.format(layer=layer)
        for rule in QWEN2_WEIGHTS
        for name in rule.hugging_face
        for layer in (range(shape.num_layers) if "{layer}" in name else ("",))
    }
