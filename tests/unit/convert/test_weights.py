"""The name table: every rule goes both ways, and the fused orders are Megatron's."""

import dataclasses

import pytest
import torch

from laver_megatron.convert.weights import QWEN2_WEIGHTS, join_qkv, rule_for, split_qkv
from laver_megatron.model.shape import ModelShape

SHAPE = ModelShape(
    num_layers=2,
    hidden_size=24,
    ffn_hidden_size=40,
    num_attention_heads=6,
    num_query_groups=3,
    kv_channels=4,
    vocab_size=50,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    tie_word_embeddings=False,
    max_position_embeddings=128,
)


def hugging_face_sizes(shape):
    """Sizes of transformers' Qwen2 tensors, by the last parts of their names."""
    query, key = shape.num_attention_heads * shape.kv_channels, shape.num_query_groups * shape.kv_channels
    hidden, middle = shape.hidden_size, shape.ffn_hidden_size
    return {
        "embed_tokens.weight": (shape.vocab_size, hidden),
        "lm_head.weight": (shape.vocab_size, hidden),
        "norm.weight": (hidden,),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "q_proj.weight": (query, hidden), "k_proj.weight": (key, hidden), "v_proj.weight": (key, hidden),
        "q_proj.bias": (query,), "k_proj.bias": (key,), "v_proj.bias": (key,),
        "o_proj.weight": (hidden, query),
        "gate_proj.weight": (middle, hidden), "up_proj.weight": (middle, hidden), "down_proj.weight": (hidden, middle),
    }  # fmt: skip


def numbered(names, shape):
    """Tensors in which every element of every tensor is another number."""
    sizes, tensors, first = hugging_face_sizes(shape), [], 0
    for name in names:
        (size,) = (size for end, size in sizes.items() if name.endswith(f".{end}") or name == end)
        count = torch.Size(size).numel()
        tensors.append(torch.arange(first, first + count, dtype=torch.float64).view(size))
        first += count
    return tensors


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("rule", QWEN2_WEIGHTS, ids=lambda rule: rule.megatron)
def test_split_undoes_join(rule, groups):
    shape = dataclasses.replace(SHAPE, num_query_groups=groups)
    parts = numbered(rule.hugging_face, shape)
    joined = rule.join(parts, shape)
    assert joined.numel() == sum(part.numel() for part in parts)
    assert torch.equal(joined.flatten().sort().values, torch.cat([p.flatten() for p in parts]).sort().values)
    back = rule.split(joined, shape)
    assert len(back) == len(parts)
    for part, again in zip(parts, back, strict=True):
        assert torch.equal(part, again)
    assert torch.equal(rule.join(back, shape), joined)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_fused_qkv_row_by_row(kind, groups):
    """Each group's query heads, its key, its value; written as loops over groups, heads and rows."""
    shape = dataclasses.replace(SHAPE, num_query_groups=groups)
    query, key, value = numbered([f"{x}_proj.{kind}" for x in "qkv"], shape)
    width, per_group = shape.kv_channels, shape.num_attention_heads // groups
    rows = []
    for group in range(groups):
        for head in range(group * per_group, (group + 1) * per_group):
            for channel in range(width):
                rows.append(query[head * width + channel])
        for tensor in (key, value):
            for channel in range(width):
                rows.append(tensor[group * width + channel])
    fused = join_qkv([query, key, value], shape)
    assert torch.equal(fused, torch.stack(rows))
    for part, again in zip((query, key, value), split_qkv(fused, shape), strict=True):
        assert torch.equal(part, again)


def test_heads_wider_than_the_model():
    """kv_channels need not be hidden_size / heads."""
    shape = dataclasses.replace(SHAPE, kv_channels=16)
    parts = numbered([f"{x}_proj.weight" for x in "qkv"], shape)
    fused = join_qkv(parts, shape)
    assert fused.shape == ((6 + 2 * 3) * 16, 24)
    assert all(torch.equal(a, b) for a, b in zip(parts, split_qkv(fused, shape), strict=True))


def test_gate_stands_before_up():
    rule, names = rule_for("decoder.layers.1.mlp.linear_fc1.weight")
    assert names == ("model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight")
    gate, up = numbered(names, SHAPE)
    assert torch.equal(rule.join([gate, up], SHAPE), torch.cat([gate, up]))


def test_rules_by_key():
    rule, names = rule_for("decoder.layers.12.self_attention.linear_qkv.bias")
    assert names == tuple(f"model.layers.12.self_attn.{x}_proj.bias" for x in "qkv")
    assert rule_for("embedding.word_embeddings.weight")[1] == ("model.embed_tokens.weight",)
    assert rule_for("vision_head.linear_1.weight") is None
    assert rule_for("decoder.layers.0.mlp.linear_fc3.weight") is None
    assert rule_for("teacher.decoder.layers.0.mlp.linear_fc1.weight") is None


def test_table_names_every_tensor_of_a_checkpoint_once():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
            num_key_value_heads=3, tie_word_embeddings=False,
        )
    )  # fmt: skip
    named = [
        name.format(layer=layer)
        for rule in QWEN2_WEIGHTS
        for layer in (range(2) if "{layer}" in rule.megatron else [None])
        for name in rule.hugging_face
    ]
    assert sorted(named) == sorted(model.state_dict())
    sizes = hugging_face_sizes(SHAPE)
    for name, tensor in model.state_dict().items():
        assert any(name.endswith(end) and tuple(tensor.shape) == size for end, size in sizes.items()), name
