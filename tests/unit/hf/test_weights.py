"""The name table: every tensor of transformers' models once with its size, and fused orders that are Megatron's."""

import dataclasses

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from laver_megatron.encoders import encoder_tensor_sizes
from laver_megatron.hf.shape import ModelShape
from laver_megatron.hf.weights import ModelParts, is_training_state, join_qkv, weight_table
from tests.conversions import SHAPE, VISION_HEAD, numbered


def qwen(shape: ModelShape) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.ffn_hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_query_groups,
            head_dim=shape.kv_channels,
            tie_word_embeddings=shape.tie_word_embeddings,
        )
    )


def siglip() -> SiglipVisionModel:
    return SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
    )


def sizes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Of the parameters as a checkpoint has them: a tied one once."""
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def named_by(table) -> dict[str, tuple[int, ...]]:
    """Hugging Face names and sizes of a table, which must name each once."""
    named = [pair for weight in table.values() for pair in weight.hugging_face_sizes()]
    assert len({name for name, _ in named}) == len(named), "a tensor is named twice"
    return dict(named)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_text_only_is_transformers_qwen2(tied, groups):
    shape = dataclasses.replace(SHAPE, tie_word_embeddings=tied, num_query_groups=groups)
    table = weight_table(ModelParts(shape))
    assert named_by(table) == sizes_of(qwen(shape))
    assert ("output_layer.weight" in table) == (not tied)


def test_heads_wider_than_the_model():
    """kv_channels need not be hidden_size / heads."""
    shape = dataclasses.replace(SHAPE, kv_channels=16)
    assert named_by(weight_table(ModelParts(shape))) == sizes_of(qwen(shape))


@pytest.fixture(scope="module")
def encoder_sizes(tmp_path_factory):
    directory = tmp_path_factory.mktemp("encoder")
    siglip().config.save_pretrained(directory)
    return encoder_tensor_sizes(directory)


def with_images(encoder_sizes, **changes) -> ModelParts:
    parts = ModelParts(
        SHAPE,
        encoder=encoder_sizes,
        encoder_type="siglip_vision_model",
        feature_size=16,
        vision_head=VISION_HEAD,
        teacher=True,
        centre=True,
    )
    return dataclasses.replace(parts, **changes)


def test_an_export_is_llava_of_transformers_parts(encoder_sizes):
    """The names of published llava checkpoints, from transformers' own modules under their prefixes."""
    hidden = SHAPE.hidden_size
    expected = {f"language_model.{name}": size for name, size in sizes_of(qwen(SHAPE)).items()}
    for name, size in sizes_of(siglip()).items():
        expected[f"vision_tower.vision_model.{name.removeprefix('vision_model.')}"] = size
    for number, width in ((1, 16), (2, hidden)):
        expected[f"multi_modal_projector.linear_{number}.weight"] = (hidden, width)
        expected[f"multi_modal_projector.linear_{number}.bias"] = (hidden,)
    found = named_by(weight_table(with_images(encoder_sizes)))
    assert {name: size for name, size in found.items() if not is_training_state(name)} == expected
    alone = with_images(encoder_sizes, vision_head=None, teacher=False, centre=False)
    assert named_by(weight_table(alone)) == expected


def vision_head(prefix: str) -> dict[str, tuple[int, ...]]:
    (middle, output), hidden = VISION_HEAD, SHAPE.hidden_size
    return {
        f"{prefix}vision_head.linear_1.weight": (middle, hidden),
        f"{prefix}vision_head.linear_1.bias": (middle,),
        f"{prefix}vision_head.linear_2.weight": (middle, middle),
        f"{prefix}vision_head.linear_2.bias": (middle,),
        f"{prefix}vision_head.linear_3.weight": (output, middle),
    }


def test_training_state(encoder_sizes):
    head = {"mask_token": (SHAPE.hidden_size,), **vision_head("")}
    teacher = {f"teacher.{name}": size for name, size in sizes_of(qwen(SHAPE)).items() if ".layers." in name}
    teacher |= {"teacher.model.norm.weight": (SHAPE.hidden_size,), **vision_head("teacher.")}
    centre = {"teacher.centre": (VISION_HEAD[1],)}
    for changes, expected in (
        ({}, {**head, **teacher, **centre}),
        ({"centre": False}, {**head, **teacher}),
        ({"centre": False, "teacher": False}, head),
    ):
        table = weight_table(with_images(encoder_sizes, **changes))
        assert {n: s for n, s in named_by(table).items() if is_training_state(n)} == expected


def test_parts_that_need_others_are_our_own_mistakes(encoder_sizes):
    for parts in (
        dataclasses.replace(with_images(encoder_sizes), encoder=None),
        with_images(encoder_sizes, vision_head=None, teacher=False),
        with_images(encoder_sizes, vision_head=None, centre=False),
    ):
        with pytest.raises(AssertionError):
            weight_table(parts)


def test_sizes_of_whole_megatron_tensors(encoder_sizes):
    """A weight's size is that of its joined parts, and nothing but order is changed."""
    for weight in weight_table(with_images(encoder_sizes)).values():
        parts = numbered(weight.sizes)
        joined = weight.join(parts)
        assert tuple(joined.shape) == weight.size, weight.megatron
        elements = torch.cat([part.flatten() for part in parts])
        assert torch.equal(joined.flatten().sort().values, elements), weight.megatron


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_fused_qkv_row_by_row(kind, groups):
    """Each group's query heads, its key, its value; written as loops over groups, heads and rows."""
    width, per_group = SHAPE.kv_channels, SHAPE.num_attention_heads // groups
    rest = (SHAPE.hidden_size,) if kind == "weight" else ()
    num_rows = (SHAPE.num_attention_heads * width, groups * width, groups * width)
    query, key, value = numbered([(rows, *rest) for rows in num_rows])
    rows = []
    for group in range(groups):
        for head in range(group * per_group, (group + 1) * per_group):
            for channel in range(width):
                rows.append(query[head * width + channel])
        for tensor in (key, value):
            for channel in range(width):
                rows.append(tensor[group * width + channel])
    assert torch.equal(join_qkv([query, key, value], groups), torch.stack(rows))
    shape = dataclasses.replace(SHAPE, num_query_groups=groups)
    weight = weight_table(ModelParts(shape))[f"decoder.layers.1.self_attention.linear_qkv.{kind}"]
    assert weight.hugging_face == tuple(f"model.layers.1.self_attn.{x}_proj.{kind}" for x in "qkv")
    assert torch.equal(weight.join([query, key, value]), torch.stack(rows))


def test_gate_stands_before_up():
    weight = weight_table(ModelParts(SHAPE))["decoder.layers.1.mlp.linear_fc1.weight"]
    assert weight.hugging_face == ("model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight")
    gate, up = numbered(weight.sizes)
    assert torch.equal(weight.join([gate, up]), torch.stack([*gate, *up]))


def test_norms_of_a_layer_are_not_exchanged():
    """Both are vectors of one size, so that nothing else would show it."""
    table = weight_table(ModelParts(SHAPE))
    norms = {key: weight.hugging_face for key, weight in table.items() if "layer_norm" in key and ".0." in key}
    assert norms == {
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight": ("model.layers.0.input_layernorm.weight",),
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight": ("model.layers.0.post_attention_layernorm.weight",),
    }
