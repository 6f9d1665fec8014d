"""Which weights a stage has changed, told from the files it began and ended with, a block of rows at a time.

A module that was frozen must be the same to the last bit; of one that was trained, it says how many tensors have moved.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from laver_megatron.checkpoint.directory import latest_checkpoint
from laver_megatron.config.modules import MODULES
from laver_megatron.convert.torch_dist import TorchDistReader
from laver_megatron.hf.parts import parts_of_hugging_face
from laver_megatron.hf.rows import row_blocks
from laver_megatron.hf.safetensors_reader import SafetensorsReader
from laver_megatron.hf.weights import Weight, weight_table
from laver_megatron.start import HF_PREFIX

_BLOCK_BYTES = 32 << 20
_ENCODER = "encoder.model."
# How the vision tower is called in files that hold a text tower, too.
_VISION_TOWERS = ("vision", "visual")


@dataclass
class ModuleChange:
    """Tensors of a module after a stage: all, those with another value than before, those that were not there."""

    num_tensors: int = 0
    num_changed: int = 0
    num_new: int = 0


class _Start(Protocol):
    """The weights before a stage, under the keys of checkpoints."""

    def pieces(self, key: str, after: TorchDistReader) -> Iterator[tuple[Tensor, Tensor]] | None:
        """(before, after) of the tensor's blocks; None if it was not there."""


def changes_of_modules(load: str, encoder: str | None, checkpoint: Path) -> dict[str, ModuleChange]:
    """By the words of `freeze`, what has become of the weights that a stage took from `load` (and `encoder`), in the
    checkpoint that it left. Without a vision head there are no `heads`.

    Raises:
        ValueError: files that cannot be read; a tensor that has changed its size.
    """
    after = TorchDistReader(checkpoint)
    changes: dict[str, ModuleChange] = {}
    with ExitStack() as stack:
        start = _open(load, encoder, stack)
        for key in after.sizes:
            module = next((name for name, prefixes in MODULES.items() if key.startswith(prefixes)), None)
            if module is None:  # the teacher's or the optimizer's
                continue
            change = changes.setdefault(module, ModuleChange())
            change.num_tensors += 1
            pieces = start.pieces(key, after)
            if pieces is None:
                change.num_new += 1
            # What was stored in another type is compared as the stage has taken it up.
            elif not all(torch.equal(before.to(now.dtype), now) for before, now in pieces):
                change.num_changed += 1
    return changes


def _open(load: str, encoder: str | None, stack: ExitStack) -> _Start:
    if load.startswith(HF_PREFIX):
        directory = Path(load.removeprefix(HF_PREFIX))
        tensors = stack.enter_context(SafetensorsReader(directory))
        of_encoder = None if encoder is None else stack.enter_context(SafetensorsReader(encoder))
        return _HuggingFaceStart(tensors, weight_table(parts_of_hugging_face(directory)), of_encoder)
    path = latest_checkpoint(Path(load))
    if path is None:
        raise ValueError(f"{load}: no checkpoint in it any more to compare with")
    return _CheckpointStart(TorchDistReader(path))


@dataclass
class _CheckpointStart:
    before: TorchDistReader

    def pieces(self, key: str, after: TorchDistReader) -> Iterator[tuple[Tensor, Tensor]] | None:
        if key not in self.before.sizes:
            return None
        if self.before.sizes[key] != after.sizes[key]:
            raise ValueError(f"{key} is {after.sizes[key]}, but was {self.before.sizes[key]}")
        blocks = _blocks(after, key, after.sizes[key])
        return ((self.before.read_rows(key, *rows), after.read_rows(key, *rows)) for rows in blocks)


@dataclass
class _HuggingFaceStart:
    """Without a table's entry, a tensor of the encoder is looked for in the encoder's own directory, whose names may
    stand behind that of the tower."""

    tensors: SafetensorsReader
    table: dict[str, Weight]
    of_encoder: SafetensorsReader | None

    def pieces(self, key: str, after: TorchDistReader) -> Iterator[tuple[Tensor, Tensor]] | None:
        if weight := self.table.get(key):
            if any(name not in self.tensors.names() for name in weight.hugging_face):
                return None
            return self._parts(weight, after)
        name = self._name_of(key)
        if name is None or self.of_encoder is None:
            return None
        of_encoder, blocks = self.of_encoder, _blocks(after, key, after.sizes[key])
        return ((of_encoder.read(name, *rows), after.read_rows(key, *rows)) for rows in blocks)

    def _parts(self, weight: Weight, after: TorchDistReader) -> Iterator[tuple[Tensor, Tensor]]:
        for part, (name, size) in enumerate(weight.hugging_face_sizes()):
            for rows in _blocks(after, weight.megatron, size):
                yield self.tensors.read(name, *rows), after.read_part_rows(weight.megatron, weight, part, *rows)

    def _name_of(self, key: str) -> str | None:
        if self.of_encoder is None or not key.startswith(_ENCODER):
            return None
        bare = key.removeprefix(_ENCODER)
        names = [name for name in self.of_encoder.names() if name == bare or name.endswith(f".{bare}")]
        if len(names) > 1:
            names = [name for name in names if name.startswith(_VISION_TOWERS)]
        return names[0] if len(names) == 1 else None


def _blocks(after: TorchDistReader, key: str, size: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    num_rows, *rest = size
    return row_blocks(num_rows, torch.Size(rest).numel() * after.dtypes[key].itemsize, _BLOCK_BYTES)
