"""What a directory of weights consists of: its parts and their sizes, and the settings that tensors do not show."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from laver_megatron.checkpoint.directory import RUN_FILE, has_encoder
from laver_megatron.config.fields import ATTENTIONS, CHANGEABLE, POSITIONS, ConfigError
from laver_megatron.encoders import encoder_tensor_sizes, open_preprocessor, read_encoder
from laver_megatron.encoders.native import NativePreprocessor
from laver_megatron.hf.files import PROCESSOR_FILE
from laver_megatron.hf.rows import row_blocks
from laver_megatron.hf.safetensors_reader import TRAINING_STATE, SafetensorsReader
from laver_megatron.hf.shape import ModelShape, is_laver_export, is_size, read_config, read_model_shape
from laver_megatron.hf.tokenizer import tokenizer_problems
from laver_megatron.hf.weights import EMBEDDING, TEACHER, TIED_HEAD, ModelParts, Size
from laver_megatron.runtime.files import read_object
from laver_megatron.runtime.ranks import on_rank_0

_HEAD = "vision_head.linear_3.weight"
# The names under which a LaVer export's config.json has what a run calls CHANGEABLE.
_EXPORTED_AS = {"encoder_feature_layer": "vision_feature_layer"}


@dataclass(frozen=True)
class ModelSettings:
    """What a model with images was trained with and its tensors do not show.

    Attributes:
        attention, positions: one of ATTENTIONS, of POSITIONS.
        encoder_feature_layer: None for an encoder without a choice.
        max_image_tokens: visual tokens of an image at most; None for the limit of its image processor.
    """

    attention: str
    positions: str
    encoder_feature_layer: int | None
    max_image_tokens: int | None = None


def parts_of_hugging_face(directory: Path) -> ModelParts:
    """The parts of a text-only Qwen2.5, or of a LaVer export with or without its training state.

    Raises:
        ValueError: another architecture, or files that cannot be read.
    """
    if not is_laver_export(directory):
        return ModelParts(read_model_shape(directory))
    sizes: dict[str, Size] = {}
    if has_training_state(directory):
        with SafetensorsReader(directory, TRAINING_STATE) as tensors:
            if _HEAD not in tensors.names():
                raise ValueError(f"the training state of {directory} lacks {_HEAD}; copy its files again")
            if len(tensors.size(_HEAD)) != 2:
                raise ValueError(f"{tensors.where(_HEAD)} is of shape {tensors.size(_HEAD)}, not a matrix")
            sizes = {name: tensors.size(name) for name in tensors.names()}
    return _with_images(directory, directory, sizes)


def parts_of_megatron(directory: Path, sizes: Mapping[str, Size]) -> ModelParts:
    """The parts of a checkpoint directory whose tensors have these sizes, by key."""
    if not has_encoder(directory):
        return ModelParts(read_model_shape(directory / "hf"))
    return _with_images(directory / "hf", directory / "encoder", sizes)


def _with_images(text_dir: Path, encoder_dir: Path, sizes: Mapping[str, Size]) -> ModelParts:
    head, encoder = sizes.get(_HEAD), read_encoder(encoder_dir)
    return ModelParts(
        text=read_model_shape(text_dir),
        encoder=encoder_tensor_sizes(encoder_dir),
        encoder_type=encoder.model_type,
        feature_size=encoder.feature_size,
        vision_head=(head[1], head[0]) if head else None,
        teacher=any(name.startswith((f"{TEACHER}decoder.", f"{TEACHER}model.")) for name in sizes),
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
    if embedding not in tensors.names():
        return  # as `check_tensors` says, which knows by which name it should be there
    size = tensors.size(head)
    if size != tensors.size(embedding) or not all(
        torch.equal(tensors.read(head, *rows), tensors.read(embedding, *rows))
        for rows in row_blocks(size, tensors.dtype(head))
    ):
        raise ValueError(
            f"{tensors.where(head)} is not {embedding} again, though {tensors.directory / 'config.json'} ties the two; "
            'set "tie_word_embeddings": false there if the head was trained apart, or remove it'
        )


def has_training_state(directory: Path) -> bool:
    """Whether an export brings [MASK], vision head and teacher."""
    names = f"{TRAINING_STATE}.safetensors", f"{TRAINING_STATE}.safetensors.index.json"
    return any((directory / name).is_file() for name in names)


def settings_of_export(directory: Path) -> ModelSettings:
    """The settings of a LaVer export, by its config.json and processor_config.json."""
    path, content = read_config(directory)
    settings = _read_settings(content, _EXPORTED_AS, path, directory)
    is_native = read_encoder(directory).is_native
    return replace(settings, max_image_tokens=_cap_of_export(directory)) if is_native else settings


def _cap_of_export(directory: Path) -> int | None:
    """Visual tokens of an image at most; None if that is what its image processor says."""
    path, own = directory / PROCESSOR_FILE, open_preprocessor(directory)
    assert isinstance(own, NativePreprocessor)
    max_pixels = read_object(path).get("max_pixels")
    if type(max_pixels) is not int or max_pixels < own.token_size**2:
        raise ValueError(
            f"{path}: max_pixels is {max_pixels!r}, but must be at least {own.token_size**2}, one visual token; "
            "copy the file again"
        )
    return None if max_pixels == own.max_pixels else max_pixels // own.token_size**2


def settings_of_checkpoint(directory: Path) -> ModelSettings:
    """The settings of a Megatron checkpoint, by its run.json."""
    path = directory / RUN_FILE
    content = read_object(path)
    settings, cap = _read_settings(content, {}, path, directory / "encoder"), content.get("max_image_tokens")
    if cap is not None and not is_size(cap):
        raise ValueError(f"{path}: max_image_tokens is {cap!r}, but must be a positive integer or null; copy it again")
    return replace(settings, max_image_tokens=cap)


def _read_settings(
    content: Mapping[str, Any], key_of: Mapping[str, str], path: Path, encoder_dir: Path
) -> ModelSettings:
    """key_of: the file's name for what it does not call as a run does."""
    encoder, keys = read_encoder(encoder_dir), {name: key_of.get(name, name) for name in CHANGEABLE}
    layer_key = keys["encoder_feature_layer"]
    no_choice = encoder.default_feature_layer is None
    absent = [key for key in keys.values() if content.get(key) is None and not (no_choice and key == layer_key)]
    if absent:
        raise ValueError(f"{path} does not say {', '.join(absent)}; copy it again")
    said: dict[str, Any] = {name: content.get(key) for name, key in keys.items()}
    found = ModelSettings(**said)
    for name, value, known in (("attention", found.attention, ATTENTIONS), ("positions", found.positions, POSITIONS)):
        if value not in known:
            raise ValueError(f"{path}: {name} is {value!r}, but must be one of {', '.join(known)}")
    layer, num_layers = found.encoder_feature_layer, encoder.num_layers
    if no_choice and layer is not None:
        raise ValueError(
            f"{path}: {layer_key} is {layer!r}, but {encoder.model_type} has no choice of layers; write null"
        )
    if not no_choice and (type(layer) is not int or not -num_layers - 1 <= layer <= num_layers):
        raise ValueError(f"{path}: {layer_key} is {layer!r}, but must be from {-num_layers - 1} to {num_layers}")
    return found


def check_companions(text_dir: Path, encoder_dir: Path) -> None:
    """Whether a model with images has beside it what using and training it needs: a tokenizer with the image tokens
    and a chat template, and an image processor.

    Raises:
        ConfigError: all that is missing or does not fit.
    """
    problems = list(tokenizer_problems(text_dir, read_model_shape(text_dir)))
    try:
        open_preprocessor(encoder_dir)
    except ConfigError as error:
        problems += error.problems
    except ValueError as error:
        problems.append(f"encoder {error}")
    if problems:
        raise ConfigError(problems)
