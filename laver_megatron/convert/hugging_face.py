"""Reads a Hugging Face checkpoint directory into pipeline stages: `--load hf:DIR`."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from safetensors import SafetensorError, safe_open
from torch import Tensor

from laver_megatron.convert.weights import WeightRule, hugging_face_names, rule_for
from laver_megatron.model.laver import LAVER_PARTS, LaverStage
from laver_megatron.model.shape import ModelShape

# Parts of the model that a text-only checkpoint does not have; they are initialised or loaded elsewhere.
NEW_PARTS = ("encoder.", "connector.", *LAVER_PARTS)


class HuggingFaceTensors:
    """The tensors of a directory of safetensors, one file or several with an index, opened lazily.

    Raises ValueError, naming the file and, where there is one, the tensor, for whatever cannot be read.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._stack = ExitStack()
        index = self.directory / "model.safetensors.index.json"
        if index.is_file():
            self._file_of = _read_index(index)
        elif (self.directory / "model.safetensors").is_file():
            with self._open_file("model.safetensors") as tensors:
                self._file_of = dict.fromkeys(tensors.keys(), "model.safetensors")
        else:
            message = f"{self.directory} has neither model.safetensors nor model.safetensors.index.json"
            pickled = sorted(path.name for path in self.directory.glob("*.bin"))
            if pickled:
                message += f", only {', '.join(pickled)}; save the model again with transformers' save_pretrained"
            raise ValueError(message)
        self._open: dict[str, Any] = {}

    def _open_file(self, name: str) -> Any:
        path = self.directory / name
        if not path.is_file():
            raise ValueError(f"{path} is missing, though the index of {self.directory} names it")
        try:
            return safe_open(str(path), framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}; download or copy it again") from error

    def __enter__(self) -> "HuggingFaceTensors":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._file_of:
            raise ValueError(f"{self.directory} has no tensor {name}")
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = self._stack.enter_context(self._open_file(file))
        try:
            return self._open[file].get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{self.where(name)} cannot be read: {error}") from error

    def names(self) -> set[str]:
        """All tensors of the directory."""
        return set(self._file_of)

    def where(self, name: str) -> str:
        """File and tensor, for messages."""
        return f"{self.directory / self._file_of[name]}, tensor {name},"


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name to file name; files lie in the index's own directory."""
    try:
        file_of = dict(json.loads(path.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not an index of safetensors files ({error!r}); copy it again") from error
    for file in file_of.values():
        if Path(file).name != file:
            raise ValueError(f"{path} names {file!r}, which is not in the directory of the index")
    return file_of


def sharded_tensors(stage: LaverStage, metadata: dict) -> Iterator[ShardedTensor]:
    """Every tensor of a stage as Megatron-Core shards it, with views of the parameters as data."""
    state = stage.sharded_state_dict(metadata=metadata)
    apply_factories(state)
    for value in state.values():
        for tensor in value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]:
            if isinstance(tensor, ShardedTensor):
                yield tensor


@torch.no_grad()
def load_hugging_face(stages: Sequence[LaverStage], directory: str | Path, shape: ModelShape, metadata: dict) -> None:
    """Fills decoder, embedding and LM head of this rank's stages, each with the rows and columns it owns.

    Raises ValueError, with file and tensor, on a missing tensor, one that the model of config.json has no
    place for, a wrong shape, and a value that is not finite, and if any of these weights was left unwritten.
    """
    with HuggingFaceTensors(directory) as tensors:
        _refuse_surplus(tensors, shape)
        for stage in stages:
            whole: dict[str, Tensor] = {}
            for sharded in sharded_tensors(stage, metadata):
                found = rule_for(sharded.key)
                if found is None:
                    if not sharded.key.startswith(NEW_PARTS):
                        raise ValueError(f"no Hugging Face tensor is known for {sharded.key}")
                    continue
                rule, names = found
                if sharded.key not in whole:
                    whole = {sharded.key: _join(tensors, rule, names, shape, tuple(sharded.global_shape))}
                full = whole[sharded.key]
                rows = tuple(slice(o, o + n) for o, n in zip(sharded.global_offset, sharded.local_shape, strict=True))
                sharded.data.copy_(full[rows])
            _refuse_unwritten(stage, directory)


def _refuse_surplus(tensors: HuggingFaceTensors, shape: ModelShape) -> None:
    surplus = sorted(tensors.names() - hugging_face_names(shape))
    if surplus:
        raise ValueError(
            f"{tensors.where(surplus[0])} and {len(surplus) - 1} more have no place in the model of "
            f"{tensors.directory / 'config.json'} with its {shape.num_layers} layers; do the two belong together?"
        )


def _join(
    tensors: HuggingFaceTensors, rule: WeightRule, names: Sequence[str], shape: ModelShape, size: tuple[int, ...]
) -> Tensor:
    """The whole Megatron tensor of `size`. Every part is held against the size it would be split into: wrong
    parts can add up to the right whole."""
    expected = rule.split(torch.empty(size, device="meta"), shape)
    parts = [tensors[name] for name in names]
    for name, part, like in zip(names, parts, expected, strict=True):
        if part.shape != like.shape:
            raise ValueError(
                f"{tensors.where(name)} is of shape {tuple(part.shape)}, but the model of "
                f"{tensors.directory / 'config.json'} needs {tuple(like.shape)}"
            )
        if not part.isfinite().all():
            raise ValueError(f"{tensors.where(name)} holds NaN or infinite values; download or copy it again")
    return rule.join(parts, shape)


def _refuse_unwritten(stage: LaverStage, directory: str | Path) -> None:
    """Weights are NaN until they are written."""
    for name, parameter in stage.named_parameters():
        if name.startswith(("decoder.", "embedding.", "output_layer.")) and parameter.isnan().any():
            raise ValueError(f"{name} is NaN after loading {directory}: no tensor of the checkpoint reached it")
