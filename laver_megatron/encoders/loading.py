"""An encoder's weights from a Hugging Face directory, checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Under which names larger models have their vision part.
_PREFIXES = ("model.visual.", "visual.", "vision_model.", "model.vision_tower.", "dinov2.")


def load_checked(model: PreTrainedModel, directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A model like `model` (which need hold no memory) with the weights of a directory, of the vision model alone or of
    a larger one, whose other tensors are not read. transformers brings older names up to date.

    Raises:
        ValueError: unreadable files, and missing, misshapen or not finite tensors, by name: transformers would fill
            what is missing with random numbers, which differ from rank to rank.
    """
    try:
        tensors = _vision_tensors(directory)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"the encoder of {directory} cannot be read: {error}; download or copy it again") from error
    loaded, info = type(model).from_pretrained(
        None,
        config=model.config,
        state_dict=tensors,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    missing = sorted(info["missing_keys"])
    misshapen = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"])
    not_finite = sorted(name for name, weight in loaded.named_parameters() if not weight.isfinite().all())
    for problem, names in (
        ("lacks", missing),
        ("has, in another size than its config.json says,", misshapen),
        ("has NaN or infinite values in", not_finite),
    ):
        if names:
            raise ValueError(
                f"the encoder of {directory} {problem} {len(names)} tensors, such as {', '.join(names[:3])}; "
                "download or copy it again"
            )
    return loaded


def _vision_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of the vision model under its own names."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        file_of = dict(json.loads(index.read_text())["weight_map"])
    else:
        with safe_open(directory / "model.safetensors", "pt") as file:
            file_of = dict.fromkeys(file.keys(), "model.safetensors")
    prefix = next((prefix for prefix in _PREFIXES if any(name.startswith(prefix) for name in file_of)), "")
    tensors = {}
    for name in sorted(set(file_of.values())):
        with safe_open(directory / name, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - no dictionary
                if key.startswith(prefix):
                    tensors[key.removeprefix(prefix)] = file.get_tensor(key)
    return tensors


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Casts the parameters; buffers, such as the frequencies of rotary positions, stay as exact as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
