"""The name table: which Hugging Face tensors make up each Megatron tensor, and how. Read in both directions.

It speaks in Megatron's checkpoint keys (the same with and without TransformerEngine) and in whole tensors;
how a tensor is sharded is Megatron's own knowledge (its sharded state dict) and appears nowhere here.

    part of the model      Megatron keys                     Hugging Face names
    decoder, embedding,    embedding. decoder. output_layer. model. lm_head.            (text only)
    LM head                                                  language_model.            (with images)
    connector              connector.                        multi_modal_projector.
    image encoder          encoder.model.                    vision_tower.
    [MASK], vision head    mask_token vision_head.           the same, in the training state
    teacher                teacher.                          the same beginning, in the training state

In Megatron the encoder's tensors are called as in transformers' class while it runs; where published checkpoints call
them otherwise, an export does so, too: any version of transformers reads these names.

Every join only moves rows: a Megatron tensor is a permutation of the rows of its Hugging Face tensors, which
`laver_megatron.hf.rows` finds out by joining row numbers. So no inverse is written down anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from laver_megatron.hf.shape import ModelShape

if TYPE_CHECKING:  # the planner, which counts the rows, needs no torch
    from torch import Tensor

Join: TypeAlias = "Callable[[Sequence[Tensor]], Tensor]"
Size = tuple[int, ...]

TEACHER = "teacher."
EMBEDDING = "model.embed_tokens.weight"
TIED_HEAD = "lm_head.weight"

_VISION_MODEL = ((r"^(?:vision_model\.)?", "vision_model."),)
_DINOV2 = (
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
)
# By the encoder's type, what makes a published name of one at run time. (DINOv2 giant publishes gate and up projection
# as one tensor, which no renaming makes of two: its MLPs keep the names of run time, which transformers reads as well.)
_PUBLISHED = {
    "siglip_vision_model": _VISION_MODEL,
    "clip_vision_model": _VISION_MODEL,
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
}


@dataclass(frozen=True)
class Weight:
    """One Megatron tensor.

    Attributes:
        megatron: its checkpoint key.
        hugging_face, sizes: the tensors that it is made of.
        join: makes it of these, as whole tensors.
    """

    megatron: str
    hugging_face: tuple[str, ...]
    sizes: tuple[Size, ...]
    join: Join

    def hugging_face_sizes(self) -> Iterator[tuple[str, Size]]:
        return zip(self.hugging_face, self.sizes, strict=True)

    @property
    def size(self) -> Size:
        """The size of the whole Megatron tensor: the rows of all parts."""
        return (sum(size[0] for size in self.sizes), *self.sizes[0][1:])


@dataclass(frozen=True)
class ModelParts:
    """What a checkpoint consists of, apart from its values.

    Attributes:
        text: the decoder's shape.
        encoder: name and size of each tensor of the image encoder, which may have none; None for a text-only model.
        encoder_type: its model_type.
        feature_size: width of its features.
        vision_head: (middle, output) width, None without [MASK] and vision head.
        teacher, centre: whether they are there.
    """

    text: ModelShape
    encoder: Mapping[str, Size] | None = None
    encoder_type: str = ""
    feature_size: int = 0
    vision_head: tuple[int, int] | None = None
    teacher: bool = False
    centre: bool = False


def copy_rows(tensors: Sequence[Tensor]) -> Tensor:
    """A tensor that is the same on both sides."""
    (tensor,) = tensors
    return tensor


def join_qkv(tensors: Sequence[Tensor], num_query_groups: int) -> Tensor:
    """Query, key, value to Megatron's fused order: for each key/value group its query heads, its key, its value.

    Works on weights `[rows, H]` and biases `[rows]`. With 4 query heads and 2 groups the rows become
    q0 q1 k0 v0 q2 q3 k1 v1.
    """
    import torch

    return torch.cat([t.unflatten(0, (num_query_groups, -1)) for t in tensors], dim=1).flatten(0, 1)


def join_gate_up(tensors: Sequence[Tensor]) -> Tensor:
    """Gate and up projection one after the other."""
    import torch

    return torch.cat(list(tensors))


def weight_table(parts: ModelParts) -> dict[str, Weight]:
    """Every tensor of a checkpoint with these parts, by Megatron key, in the order of the forward pass."""
    with_images = parts.encoder is not None
    weights = [*_language_model(parts.text, "language_model." if with_images else "")]
    if parts.encoder is not None:
        connector = _connector(parts.feature_size, parts.text.hidden_size)
        weights = [*_encoder(parts.encoder, parts.encoder_type), *connector, *weights]
    if parts.vision_head is not None:
        assert with_images, "LaVer's parts need images"
        weights += [_same("mask_token", (parts.text.hidden_size,)), *_vision_head("", parts)]
    if parts.teacher:
        weights += [*_decoder(parts.text, TEACHER, f"{TEACHER}model."), *_vision_head(TEACHER, parts)]
    if parts.centre:
        assert parts.vision_head is not None
        weights.append(_same(f"{TEACHER}centre", parts.vision_head[1:]))
    return {weight.megatron: weight for weight in weights}


def is_training_state(hugging_face_name: str) -> bool:
    """Whether only training needs this tensor: exports keep it apart from the model."""
    return hugging_face_name.startswith((TEACHER, "vision_head.", "mask_token"))


def _language_model(shape: ModelShape, hf: str) -> Iterator[Weight]:
    words = (shape.vocab_size, shape.hidden_size)
    yield Weight("embedding.word_embeddings.weight", (hf + EMBEDDING,), (words,), copy_rows)
    yield from _decoder(shape, "", f"{hf}model.")
    if not shape.tie_word_embeddings:
        yield Weight("output_layer.weight", (hf + TIED_HEAD,), (words,), copy_rows)


def _decoder(shape: ModelShape, megatron: str, hf: str) -> Iterator[Weight]:
    """Layers and final norm, of the student or of the teacher."""
    for layer in range(shape.num_layers):
        yield from _layer(shape, f"{megatron}decoder.layers.{layer}.", f"{hf}layers.{layer}.")
    yield Weight(f"{megatron}decoder.final_layernorm.weight", (f"{hf}norm.weight",), ((shape.hidden_size,),), copy_rows)


def _layer(shape: ModelShape, megatron: str, hf: str) -> Iterator[Weight]:
    hidden, middle = shape.hidden_size, shape.ffn_hidden_size
    query = shape.num_attention_heads * shape.kv_channels
    key = shape.num_query_groups * shape.kv_channels
    qkv = partial(join_qkv, num_query_groups=shape.num_query_groups)

    def weight(name: str, hf_names: Sequence[str], sizes: Sequence[Size], join: Join = copy_rows) -> Weight:
        return Weight(megatron + name, tuple(hf + hf_name for hf_name in hf_names), tuple(sizes), join)

    projections = [f"self_attn.{letter}_proj" for letter in "qkv"]
    yield weight("self_attention.linear_qkv.layer_norm_weight", ["input_layernorm.weight"], [(hidden,)])
    yield weight(
        "self_attention.linear_qkv.weight",
        [f"{name}.weight" for name in projections],
        [(query, hidden), (key, hidden), (key, hidden)],
        qkv,
    )
    yield weight(
        "self_attention.linear_qkv.bias", [f"{name}.bias" for name in projections], [(query,), (key,), (key,)], qkv
    )
    yield weight("self_attention.linear_proj.weight", ["self_attn.o_proj.weight"], [(hidden, query)])
    yield weight("mlp.linear_fc1.layer_norm_weight", ["post_attention_layernorm.weight"], [(hidden,)])
    yield weight(
        "mlp.linear_fc1.weight",
        ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
        [(middle, hidden), (middle, hidden)],
        join_gate_up,
    )
    yield weight("mlp.linear_fc2.weight", ["mlp.down_proj.weight"], [(hidden, middle)])


def _same(name: str, size: Size) -> Weight:
    return Weight(name, (name,), (size,), copy_rows)


def _encoder(sizes: Mapping[str, Size], encoder_type: str) -> Iterator[Weight]:
    for name, size in sizes.items():
        published = name
        for pattern, replacement in _PUBLISHED.get(encoder_type, ()):
            published = re.sub(pattern, replacement, published)
        yield Weight(f"encoder.model.{name}", (f"vision_tower.{published}",), (size,), copy_rows)


def _connector(feature_size: int, hidden_size: int) -> Iterator[Weight]:
    for layer, size in (("linear_1", (hidden_size, feature_size)), ("linear_2", (hidden_size, hidden_size))):
        for kind, kind_size in (("weight", size), ("bias", size[:1])):
            name = f"{layer}.{kind}"
            yield Weight(f"connector.{name}", (f"multi_modal_projector.{name}",), (kind_size,), copy_rows)


def _vision_head(prefix: str, parts: ModelParts) -> Iterator[Weight]:
    assert parts.vision_head is not None
    middle, output = parts.vision_head
    yield _same(f"{prefix}vision_head.linear_1.weight", (middle, parts.text.hidden_size))
    yield _same(f"{prefix}vision_head.linear_1.bias", (middle,))
    yield _same(f"{prefix}vision_head.linear_2.weight", (middle, middle))
    yield _same(f"{prefix}vision_head.linear_2.bias", (middle,))
    yield _same(f"{prefix}vision_head.linear_3.weight", (output, middle))
