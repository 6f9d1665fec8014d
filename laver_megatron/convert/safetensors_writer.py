"""Safetensors files of known content, written in any order and from several threads, never held in memory.

The layout of every file follows from names, sizes and types, so its header comes first and each tensor has
its place before the first value is known (the safetensors library itself wants all tensors at once).
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from laver_megatron.convert.output import groups_of_bytes
from laver_megatron.hf.safetensors_reader import DTYPES
from laver_megatron.hf.weights import Size
from laver_megatron.runtime.files import named_errors, write_json

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorPlace:
    """One tensor to be written: its name, size and type, its file and where its values start there."""

    name: str
    size: Size
    dtype: torch.dtype
    file: str = ""
    offset: int = 0

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.size).numel() * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        return self.num_bytes // self.size[0]


@dataclass
class SafetensorsPlan:
    """All files of one set: header of each file, place of each tensor."""

    stem: str
    headers: dict[str, bytes] = field(default_factory=dict)
    places: list[TensorPlace] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """Of the tensors."""
        return sum(place.num_bytes for place in self.places)


def plan_safetensors(tensors: Sequence[TensorPlace], stem: str, max_file_bytes: float) -> SafetensorsPlan:
    """Divides the tensors, in their order, into files of at most `max_file_bytes` (or one larger tensor)."""
    groups = groups_of_bytes(tensors, lambda tensor: tensor.num_bytes, max_file_bytes)
    plan = SafetensorsPlan(stem)
    for number, group in enumerate(groups, start=1):
        file = f"{stem}.safetensors" if len(groups) == 1 else f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors"
        entries: dict = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor in group:
            start, end = end, end + tensor.num_bytes
            entries[tensor.name] = {
                "dtype": _DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.size),
                "data_offsets": [start, end],
            }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # values are aligned to 8 bytes
        plan.headers[file] = len(text).to_bytes(8, "little") + text
        for tensor in group:
            offset = len(plan.headers[file]) + entries[tensor.name]["data_offsets"][0]
            plan.places.append(TensorPlace(tensor.name, tensor.size, tensor.dtype, file, offset))
    return plan


def create_files(plans: Sequence[SafetensorsPlan], directory: Path) -> None:
    """Files with their headers and their final length, and an index where a set has several."""
    for plan in plans:
        _create_files(plan, directory)


def _create_files(plan: SafetensorsPlan, directory: Path) -> None:
    for file, header in plan.headers.items():
        with named_errors(directory / file), (directory / file).open("wb") as stream:
            stream.write(header)
            values = sum(place.num_bytes for place in plan.places if place.file == file)
            stream.truncate(len(header) + values)
    if len(plan.headers) > 1:
        index = {
            "metadata": {"total_size": plan.num_bytes},
            "weight_map": {place.name: place.file for place in sorted(plan.places, key=lambda place: place.name)},
        }
        write_json(directory / f"{plan.stem}.safetensors.index.json", index)


class SafetensorsWriter:
    """Writes rows into the files of plans. Several threads and processes may write different rows."""

    def __init__(self, plans: Sequence[SafetensorsPlan], directory: Path) -> None:
        self._directory = directory
        self._handles: dict[str, int] = {}
        try:
            for file in (file for plan in plans for file in plan.headers):
                self._handles[file] = os.open(directory / file, os.O_WRONLY)
        except OSError:
            self.close(flush=False)
            raise

    def write_rows(self, place: TensorPlace, start: int, rows: Tensor) -> None:
        """rows: `[n, ...]` from row `start` on, in the type of the plan."""
        assert rows.dtype == place.dtype and rows.shape[1:] == place.size[1:]
        values = rows.contiguous().flatten().view(torch.uint8).numpy().data
        offset = place.offset + start * place.row_bytes
        with named_errors(self._directory / place.file):
            while values:
                written = os.pwrite(self._handles[place.file], values, offset)
                values, offset = values[written:], offset + written

    def close(self, *, flush: bool = True) -> None:
        """flush: to disk, with everything that this process wrote."""
        for handle in self._handles.values():
            if flush:
                os.fsync(handle)
            os.close(handle)
        self._handles.clear()
