"""Reads a Hugging Face checkpoint directory into pipeline stages: `--load hf:DIR`."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from safetensors import SafetensorError, safe_open
from torch import Tensor

from laver_megatron.convert.weights import rule_for
from laver_megatron.model.laver import LaverStage
from laver_megatron.model.shape import ModelShape

# Parts of the model that a text-only checkpoint does not have; they are initialised or loaded elsewhere.
NEW_PARTS = ("encoder.", "connector.", "mask_token", "vision_head.")


class HuggingFaceTensors:
    """The tensors of a directory of safetensors, one file or several with an index, opened lazily."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._stack = ExitStack()
        index = self.directory / "model.safetensors.index.json"
        if index.is_file():
            self._file_of = dict(json.loads(index.read_text())["weight_map"])
        elif (self.directory / "model.safetensors").is_file():
            with self._open_file("model.safetensors") as tensors:
                self._file_of = dict.fromkeys(tensors.keys(), "model.safetensors")
        else:
            raise ValueError(
                f"{self.directory} has neither model.safetensors nor model.safetensors.index.json"
            )
        self._open: dict[str, object] = {}

    def _open_file(self, name: str):
        path = self.directory / name
        if not path.is_file():
            raise ValueError(f"{path} is missing, though the index of {self.directory} names it")
        try:
            return safe_open(str(path), framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}; download or copy it again") from error

    def __enter__(self) -> "HuggingFaceTensors":
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._file_of:
            raise ValueError(f"{self.directory} has no tensor {name}")
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = self._stack.enter_context(self._open_file(file))
        return self._open[file].get_tensor(name)  # type: ignore[attr-defined]


def sharded_tensors(stage: LaverStage, metadata: dict) -> Iterator[ShardedTensor]:
    """Every tensor of a stage as Megatron-Core shards it, with views of the parameters as data."""
    state = stage.sharded_state_dict(metadata=metadata)
    apply_factories(state)
    for value in state.values():
        for tensor in (
            value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        ):
            if isinstance(tensor, ShardedTensor):
                yield tensor


@torch.no_grad()
def load_hugging_face(
    stages: Sequence[LaverStage], directory: str | Path, shape: ModelShape, metadata: dict
) -> None:
    """Fills decoder, embedding and LM head of this rank's stages, each with the rows and columns it owns.

    Raises ValueError, with file and tensor, on a missing tensor or a wrong shape, and if any of these
    weights was left unwritten or is NaN.
    """
    with HuggingFaceTensors(directory) as tensors:
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
                    whole = {sharded.key: rule.join([tensors[name] for name in names], shape)}
                full = whole[sharded.key]
                if tuple(full.shape) != tuple(sharded.global_shape):
                    raise ValueError(
                        f"{directory}: {', '.join(names)} make a tensor of {tuple(full.shape)}, "
                        f"the model of its config.json needs {tuple(sharded.global_shape)}"
                    )
                rows = tuple(
                    slice(o, o + n) for o, n in zip(sharded.global_offset, sharded.local_shape, strict=True)
                )
                sharded.data.copy_(full[rows])
            _refuse_nan(stage, directory)


def _refuse_nan(stage: LaverStage, directory: str | Path) -> None:
    for name, parameter in stage.named_parameters():
        if name.startswith(("decoder.", "embedding.", "output_layer.")) and parameter.isnan().any():
            raise ValueError(
                f"{name} holds NaN after loading {directory}: the checkpoint has NaN or lacks a part of it"
            )
