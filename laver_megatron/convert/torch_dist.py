"""Reading and writing the tensors of a Megatron-Core checkpoint (format `torch_dist`) a piece at a time.

The format is torch's distributed checkpoint: `.metadata` (a pickled `Metadata`) says which tensors there are, which
boxes of each are stored, and in which file at which offset every box lies, as a small archive of its own made by
`torch.save`. Megatron-Core's own functions hold whole tensors (loading) or whole checkpoints (saving) in memory;
here stored boxes are mapped, and written one after the other. Each archive brings a CRC-32 of its values, which
neither torch nor Megatron-Core looks at; it is checked here before values are used.
"""

import io
import json
import mmap
import os
import pickle
import threading
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from laver_megatron.hf.rows import join_blocks, row_blocks, runs_of_part_rows
from laver_megatron.hf.safetensors_reader import SafetensorsReader
from laver_megatron.hf.weights import Size, Weight
from laver_megatron.runtime.pickles import read_metadata

# How Megatron-Core names the format, in metadata.json. (Its own function would take seconds to import.)
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class Box:
    """A stored part of a tensor: `sizes` values from `offsets` on, in `file` at [start, start + length)."""

    key: str
    offsets: Size
    sizes: Size
    file: str
    start: int
    length: int

    @property
    def stop_row(self) -> int:
        return self.offsets[0] + self.sizes[0]


class TorchDistReader:
    """The tensors of a checkpoint directory, by key. Several threads may read.

    Raises ValueError, naming file and tensor, for whatever cannot be read or is damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        metadata = read_metadata(directory)
        self.sizes: dict[str, Size] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._boxes: dict[str, list[Box]] = {}
        for key, tensor in metadata.state_dict_metadata.items():
            if not isinstance(tensor, TensorStorageMetadata):
                continue
            self.sizes[key], self.dtypes[key] = tuple(tensor.size), tensor.properties.dtype
            stored = [(chunk, metadata.storage_data[MetadataIndex(key, chunk.offsets)]) for chunk in tensor.chunks]
            self._boxes[key] = [
                Box(key, tuple(chunk.offsets), tuple(chunk.sizes), place.relative_path, place.offset, place.length)
                for chunk, place in stored
            ]
        self._files: dict[str, mmap.mmap] = {}
        self._opened: dict[Box, Tensor] = {}
        self._lock = threading.Lock()

    def read_rows(self, key: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a whole tensor: a view of a mapped file where one box has them all."""
        size = self.sizes[key]
        touched = [box for box in self._boxes[key] if box.offsets[0] < stop and box.stop_row > start]
        if len(touched) == 1 and touched[0].sizes[1:] == size[1:]:
            box = touched[0]
            assert box.offsets[0] <= start and stop <= box.stop_row
            return self._values(box)[start - box.offsets[0] : stop - box.offsets[0]]
        rows = torch.empty((stop - start, *size[1:]), dtype=self.dtypes[key])
        num_written = 0
        for box in touched:
            first, last = max(start, box.offsets[0]), min(stop, box.stop_row)
            target = rows[first - start : last - start]
            for axis, (offset, length) in enumerate(zip(box.offsets[1:], box.sizes[1:], strict=True), start=1):
                target = target.narrow(axis, offset, length)
            target.copy_(self._values(box)[first - box.offsets[0] : last - box.offsets[0]])
            num_written += target.numel()
        if num_written != rows.numel():
            raise ValueError(f"{self.directory}: {key} is not stored whole ({num_written} of {rows.numel()} values)")
        return rows

    def read_part_rows(self, key: str, weight: Weight, part: int, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of Hugging Face tensor number `part` of a weight that is stored under `key`."""
        runs = runs_of_part_rows(weight, part, start, stop)
        return join_blocks([self.read_rows(key, run.row, run.row + run.num_rows) for run in runs])

    def paired_rows(
        self, key: str, weight: Weight, part: int, tensors: SafetensorsReader
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(theirs, ours): all rows of Hugging Face tensor number `part` of a weight that is stored here under `key`, a
        block at a time."""
        name = weight.hugging_face[part]
        for rows in row_blocks(weight.sizes[part], tensors.dtype(name)):
            yield tensors.read(name, *rows), self.read_part_rows(key, weight, part, *rows)

    def _values(self, box: Box) -> Tensor:
        """A stored box as a view of its mapped file; checked when it is first used."""
        if box not in self._opened:
            self._opened[box] = self._open(box)
        return self._opened[box]

    def _open(self, box: Box) -> Tensor:
        where = f"{self.directory / box.file}, tensor {box.key},"
        archive = memoryview(self._map(box.file))[box.start : box.start + box.length]
        try:
            with FakeTensorMode():  # size, type and strides, and where the values begin: without reading them
                described = torch.load(io.BufferedReader(_FileView(archive)), weights_only=True)
            first_byte = described.untyped_storage()._checkpoint_offset
            values = torch.frombuffer(
                archive, dtype=described.dtype, count=described.numel(), offset=first_byte
            ).as_strided(described.shape, described.stride(), 0)
            is_whole = _matches_checksum(archive)
        except Exception as error:  # damaged archives raise what they like
            raise ValueError(f"{where} is damaged: {error}; copy the checkpoint again") from error
        if tuple(values.shape) != box.sizes or values.dtype != self.dtypes[box.key]:
            raise ValueError(f"{where} is {tuple(values.shape)} {values.dtype}, but .metadata says {box.sizes}")
        if not is_whole:
            raise ValueError(f"{where} is damaged: its values do not fit their checksum; copy the checkpoint again")
        return values

    def _map(self, file: str) -> mmap.mmap:
        with self._lock:
            if file not in self._files:
                path = self.directory / file
                try:
                    with path.open("rb") as stream:
                        # Copy on write: torch wants a writable buffer; nobody writes.
                        self._files[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
                except (OSError, ValueError) as error:
                    raise ValueError(f"{path} cannot be read ({error}), though .metadata names it") from error
            return self._files[file]


def _matches_checksum(archive: memoryview) -> bool:
    """Whether the archive's values have its CRC-32."""
    with zipfile.ZipFile(io.BufferedReader(_FileView(archive))) as content:
        (values,) = (entry for entry in content.infolist() if "/data/" in entry.filename)
    # A record's name and padding stand between its header, of 30 bytes, and its values.
    lengths = archive[values.header_offset + 26 : values.header_offset + 30]
    start = values.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
    return zlib.crc32(archive[start : start + values.file_size]) == values.CRC


class _FileView(io.RawIOBase):
    """A part of a mapped file as a file of its own."""

    def __init__(self, content: memoryview) -> None:
        self._content, self._position = content, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: len(self._content)}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        part = self._content[self._position : self._position + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)


# --- writing ---


def write_box(stream: BinaryIO, file: str, key: str, offsets: Size, values: Tensor) -> Box:
    """Appends a box to an open file; `values` are whole memory of their own, not a view of more."""
    start = stream.tell()
    try:
        torch.save(values, stream)
    except RuntimeError as error:
        # On a full disk torch closes the archive and stumbles over its length, which hides why.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    return Box(key, offsets, tuple(values.shape), file, start, stream.tell() - start)


def write_metadata(directory: Path, tensors: Sequence[tuple[str, Size, torch.dtype]], boxes: Iterable[Box]) -> None:
    """Everything besides the files of boxes that makes a directory a Megatron-Core checkpoint."""
    by_key: dict[str, list[Box]] = {key: [] for key, _, _ in tensors}
    for box in boxes:
        by_key[box.key].append(box)
    metadata = Metadata(state_dict_metadata={}, storage_data={})
    for key, size, dtype in tensors:
        ordered = sorted(by_key[key], key=lambda box: box.offsets)
        metadata.state_dict_metadata[key] = TensorStorageMetadata(
            properties=TensorProperties(dtype=dtype),
            size=torch.Size(size),
            chunks=[ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in ordered],
        )
        for number, box in enumerate(ordered):
            index = MetadataIndex(key, torch.Size(box.offsets), number)
            metadata.storage_data[index] = _StorageInfo(box.file, box.start, box.length)
    with (directory / ".metadata").open("wb") as stream:
        pickle.dump(metadata, stream)
        stream.flush()
        os.fsync(stream.fileno())
    torch.save({}, directory / "common.pt")  # what is not sharded: nothing
    (directory / "metadata.json").write_text(json.dumps(_FORMAT))
