"""An encoder's weights from a Hugging Face directory, checked."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from laver_megatron.hf.safetensors_reader import SafetensorsReader
from laver_megatron.hf.tensor_names import misnamed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Under which names larger models have their vision part.
_PREFIXES = ("model.visual.", "visual.", "vision_model.", "model.vision_tower.", "dinov2.")
# In the names of tensors that features depend on, unlike heads and buffers.
_MADE_FOR_FEATURES = re.compile(r"(layers?|blocks)\.\d+\..*(weight|bias)$|_tokens?$")


def load_checked(model: PreTrainedModel, directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A model like `model` (which need hold no memory) with the weights of a directory, of the vision model alone or of
    a larger one, whose other tensors are not read. transformers brings older names up to date.

    Raises:
        ValueError: unreadable files, and missing, misshapen or not finite tensors, by name: transformers would fill
            what is missing with random numbers, which differ from rank to rank.
    """
    tensors = _vision_tensors(directory, SafetensorsReader.read_whole)
    loaded = _load_into(model, tensors, directory, dtype)
    not_finite = sorted(name for name, weight in loaded.named_parameters() if not weight.isfinite().all())
    _refuse(directory, "has NaN or infinite values in", not_finite)
    for weight in loaded.parameters():
        # Out of the mapped file: kernels differ in the last bit with the alignment of a weight, and a run that is
        # resumed, whose encoder comes from a checkpoint, goes on to the last bit.
        weight.data = weight.data.clone()
    return loaded


def check_headers(model: PreTrainedModel, directory: Path) -> None:
    """Whether a directory's safetensors have the tensors of `model` (which need hold no memory), by their headers.

    Raises:
        ValueError: missing or misshapen tensors, or those of layers or tokens that `model` does not have, by name.
    """
    from laver_megatron.runtime.terminal import quiet_transformers  # here, because transformers is slow to import

    zeros = _vision_tensors(directory, lambda tensors, name: torch.zeros(()).expand(tensors.size(name)))
    with quiet_transformers():
        _load_into(model, zeros, directory, torch.float32)


def _load_into(
    model: PreTrainedModel, tensors: dict[str, Tensor], directory: Path, dtype: torch.dtype
) -> PreTrainedModel:
    """transformers' own loading, which knows the names that tensors had in earlier versions."""
    loaded, info = type(model).from_pretrained(
        None,
        config=model.config,
        state_dict=tensors,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    misshapen = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"])
    missing = sorted(info["missing_keys"])
    _refuse(directory, "lacks", missing, misnamed(set(info["unexpected_keys"]), missing, _PREFIXES))
    _refuse(directory, "has, in another size than its config.json says,", misshapen)
    # Heads that nobody asked for do no harm; more layers or tokens than config.json says make another model.
    more = sorted(name for name in info["unexpected_keys"] if _MADE_FOR_FEATURES.search(name))
    _refuse(directory, "is larger than its config.json says, by", more)
    return loaded


def _refuse(directory: Path, problem: str, names: list[str], remedy: str = "") -> None:
    if names:
        remedy = remedy or "its config.json and its weights must be of the same model: download or copy it again"
        raise ValueError(
            f"the encoder of {directory} {problem} {len(names)} tensors, such as {', '.join(names[:3])}; {remedy}"
        )


def _vision_tensors(directory: Path, read: Callable[[SafetensorsReader, str], Tensor]) -> dict[str, Tensor]:
    """The tensors of the vision model under its own names, each as `read` gets it from the directory's files."""
    try:
        with SafetensorsReader(directory) as tensors:
            names = tensors.names()
            prefix = next((prefix for prefix in _PREFIXES if any(name.startswith(prefix) for name in names)), "")
            chosen = sorted(name for name in names if name.startswith(prefix))
            return {name.removeprefix(prefix): read(tensors, name) for name in chosen}
    except (OSError, ValueError) as error:
        raise ValueError(f"the encoder of {directory} cannot be read: {error}; download or copy it again") from error


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Casts the parameters; buffers, such as the frequencies of rotary positions, stay as exact as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
