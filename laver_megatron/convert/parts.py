"""What a directory of weights consists of: which parts, of which sizes, and how it was trained."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from laver_megatron.config import CHANGEABLE
from laver_megatron.convert.rows import row_blocks
from laver_megatron.convert.safetensors_reader import TRAINING_STATE, SafetensorsReader
from laver_megatron.convert.weights import EMBEDDING, TEACHER, TIED_HEAD, ModelParts, Size
from laver_megatron.inputs import RUN_FILE, has_encoder
from laver_megatron.model.shape import ModelShape, is_laver_export, read_config, read_encoder_shape, read_model_shape
from laver_megatron.ranks import on_rank_0

_COMPARED_BYTES = 32 << 20
_HEAD = "vision_head.linear_3.weight"
# The names under which a LaVer export's config.json has what a run calls CHANGEABLE.
_EXPORTED_AS = {"encoder_feature_layer": "vision_feature_layer"}


@dataclass(frozen=True)
class Training:
    """What the weights of a model with images were trained with and cannot show themselves (CHANGEABLE)."""

    attention: str
    positions: str
    encoder_feature_layer: int


def parts_of_hugging_face(directory: Path) -> ModelParts:
    """Of a text-only Qwen2.5, or of a LaVer export with or without its training state.

    Raises:
        ValueError: another architecture, or files that cannot be read.
    """
    if not is_laver_export(directory):
        return ModelParts(read_model_shape(directory))
    sizes: dict[str, Size] = {}
    if has_training_state(directory):
        with SafetensorsReader(directory, TRAINING_STATE) as tensors:
            sizes = {name: tensors.size(name) for name in tensors.names() if name in (_HEAD, f"{TEACHER}centre")}
            teacher = any(name.startswith(f"{TEACHER}model.") for name in tensors.names())
            return _with_images(directory, directory, sizes, teacher)
    return _with_images(directory, directory, sizes, False)


def parts_of_megatron(directory: Path, sizes: Mapping[str, Size]) -> ModelParts:
    """Of a checkpoint directory; sizes: of its tensors, by key."""
    if not has_encoder(directory):
        return ModelParts(read_model_shape(directory / "hf"))
    teacher = any(key.startswith(f"{TEACHER}decoder.") for key in sizes)
    return _with_images(directory / "hf", directory / "encoder", sizes, teacher)


def _with_images(text_dir: Path, encoder_dir: Path, sizes: Mapping[str, Size], teacher: bool) -> ModelParts:
    # Importing transformers' encoder takes seconds, which text-only models need not wait for.
    from laver_megatron.model.vision import encoder_tensor_sizes

    head = sizes.get(_HEAD)
    return ModelParts(
        text=read_model_shape(text_dir),
        encoder=encoder_tensor_sizes(encoder_dir),
        feature_size=read_encoder_shape(encoder_dir).hidden_size,
        vision_head=(head[1], head[0]) if head else None,
        teacher=teacher,
        centre=f"{TEACHER}centre" in sizes,
    )


def copies_of_tied_embedding(tensors: SafetensorsReader, text: ModelShape) -> set[str]:
    """LM heads that a checkpoint holds although its embeddings are tied, as some published ones do. Collective.

    Raises:
        ValueError: one that is not the embedding again: transformers would not tie it, whatever config.json says.
    """
    heads = {name for name in tensors.names() if text.tie_word_embeddings and name.endswith(TIED_HEAD)}
    for head in heads:
        on_rank_0("compare the LM head with the embedding", partial(_compare_with_embedding, tensors, head))
    return heads


def _compare_with_embedding(tensors: SafetensorsReader, head: str) -> None:
    embedding = head.removesuffix(TIED_HEAD) + EMBEDDING
    same = embedding in tensors.names() and tensors.size(head) == tensors.size(embedding)
    if same:
        num_rows, *width = tensors.size(head)
        row_bytes = torch.Size(width).numel() * tensors.dtype(head).itemsize
        same = all(
            torch.equal(tensors.read(head, start, stop), tensors.read(embedding, start, stop))
            for start, stop in row_blocks(num_rows, row_bytes, _COMPARED_BYTES)
        )
    if not same:
        raise ValueError(
            f"{tensors.where(head)} is not {embedding} again, though {tensors.directory / 'config.json'} ties the two; "
            'set "tie_word_embeddings": false there if the head was trained apart, or remove it'
        )


def has_training_state(directory: Path) -> bool:
    """Whether an export brings [MASK], vision head and teacher."""
    return any(directory.glob(f"{TRAINING_STATE}*.safetensors*"))


def training_of_export(directory: Path) -> Training:
    """How a LaVer export was trained, by its config.json."""
    path, content = read_config(directory)
    return _training({name: content.get(_EXPORTED_AS.get(name, name)) for name in CHANGEABLE}, path)


def training_of_checkpoint(directory: Path) -> Training:
    """How a Megatron checkpoint was trained, by its run.json."""
    path = directory / RUN_FILE
    try:
        content = json.loads(path.read_text())
        return _training({name: content.get(name) for name in CHANGEABLE}, path)
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); copy the checkpoint again") from error


def _training(found: dict[str, Any], path: Path) -> Training:
    absent = [name for name, value in found.items() if value is None]
    if absent:
        raise ValueError(f"{path} does not say {', '.join(absent)}; copy it again")
    return Training(**found)
