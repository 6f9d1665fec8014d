"""Which weights a stage has changed, told from the files it began and ended with, a block of rows at a time.

A module that was frozen must be the same to the last bit; of one that was trained, it says how many tensors have moved.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from laver_megatron.checkpoint.directory import latest_checkpoint
from laver_megatron.config.modules import MODULES
from laver_megatron.convert.torch_dist import TorchDistReader
from laver_megatron.hf.rows import row_blocks
from laver_megatron.hf.safetensors_reader import SafetensorsReader
from laver_megatron.hf.source import WeightSource
from laver_megatron.start import HF_PREFIX

Blocks = Iterator[tuple[Tensor, Tensor]]
"""(before, after) of a tensor, a block of rows at a time."""

_ENCODER = "encoder.model."
# How the vision tower is called in files that hold a text tower, too.
_VISION_TOWERS = ("vision", "visual")


@dataclass
class ModuleChange:
    """How many tensors a module has after a stage, with another value than before, and that were not there."""

    num_tensors: int = 0
    num_changed: int = 0
    num_new: int = 0


def changes_of_modules(load: str, encoder: str | None, checkpoint: Path) -> dict[str, ModuleChange]:
    """By the words of `freeze`, what has become of the weights that a stage took from `load` (and `encoder`), in the
    checkpoint that it left. Without a vision head there are no `heads`.

    Raises:
        ValueError: files that cannot be read; a tensor that has changed its size.
    """
    after = TorchDistReader(checkpoint)
    changes: dict[str, ModuleChange] = {}
    with ExitStack() as stack:
        blocks_of = _open(load, encoder, after, stack)
        for key in after.sizes:
            module = next((name for name, prefixes in MODULES.items() if key.startswith(prefixes)), None)
            if module is None:  # the teacher's or the optimizer's
                continue
            change = changes.setdefault(module, ModuleChange())
            change.num_tensors += 1
            blocks = blocks_of(key)
            if blocks is None:
                change.num_new += 1
            # What was stored in another type is compared as the stage has taken it up.
            elif not all(torch.equal(before.to(now.dtype), now) for before, now in blocks):
                change.num_changed += 1
    return changes


def _open(load: str, encoder: str | None, after: TorchDistReader, stack: ExitStack) -> Callable[[str], Blocks | None]:
    """What gives the blocks of a checkpoint key; None if the tensor was not there."""
    if load.startswith(HF_PREFIX):
        source = stack.enter_context(WeightSource(Path(load.removeprefix(HF_PREFIX))))
        of_encoder = None if encoder is None else stack.enter_context(SafetensorsReader(encoder))
        return partial(_blocks_of_hugging_face, source, of_encoder, after)
    path = latest_checkpoint(Path(load))
    if path is None:
        raise ValueError(f"{load}: no checkpoint in it any more to compare with")
    return partial(_blocks_of_checkpoint, TorchDistReader(path), after)


def _blocks_of_checkpoint(before: TorchDistReader, after: TorchDistReader, key: str) -> Blocks | None:
    if key not in before.sizes:
        return None
    if before.sizes[key] != after.sizes[key]:
        raise ValueError(f"{key} is {after.sizes[key]}, but was {before.sizes[key]}")
    blocks = row_blocks(after.sizes[key], after.dtypes[key])
    return ((before.read_rows(key, *rows), after.read_rows(key, *rows)) for rows in blocks)


def _blocks_of_hugging_face(
    source: WeightSource, encoder: SafetensorsReader | None, after: TorchDistReader, key: str
) -> Blocks | None:
    """A tensor that is not in the source is looked for in the encoder's own directory."""
    if weight := source.weights.get(key):
        parts = range(len(weight.sizes))
        return chain.from_iterable(after.paired_rows(key, weight, i, source.reader(weight)) for i in parts)
    if encoder is None or not key.startswith(_ENCODER):
        return None
    bare = key.removeprefix(_ENCODER)
    # The encoder's names may stand behind that of the tower.
    names = [name for name in encoder.names() if name == bare or name.endswith(f".{bare}")]
    if len(names) > 1:
        names = [name for name in names if name.startswith(_VISION_TOWERS)]
    if len(names) != 1:
        return None
    blocks = row_blocks(after.sizes[key], after.dtypes[key])
    return ((encoder.read(names[0], *rows), after.read_rows(key, *rows)) for rows in blocks)
