"""Writes the shards of one slice of the samples: tars that appear under their names only when they are whole.

The same members give the same bytes: every header says the same owner, rights and time.
"""

import os
import tarfile
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from laver_megatron.data.index.shard_index import ShardIndex
from laver_megatron.runtime.files import named_errors
from laver_megatron.shards.assemble import Sample
from laver_megatron.shards.index_rows import IndexRows

_BLOCK = tarfile.BLOCKSIZE
_CLOSING = bytes(2 * _BLOCK)
_EMPTY_HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)
_NAME, _SIZE, _CHECKSUM = slice(0, 100), slice(124, 135), slice(148, 154)  # in a header; of the size its digits
PARTIAL = ".partial"  # what an unfinished shard's name ends with


def tar_header(name: str, num_bytes: int) -> bytes:
    """What tarfile writes for a file of this name and size, but faster: its own way is a sixth of all the work."""
    header, encoded, size = bytearray(_EMPTY_HEADER), name.encode("ascii"), b"%011o" % num_bytes
    assert len(encoded) <= _NAME.stop and len(size) == 11, "names are keys of ours, and pictures have a largest size"
    header[: len(encoded)], header[_SIZE], header[_CHECKSUM] = encoded, size, b" " * 6
    header[_CHECKSUM] = b"%06o" % (sum(header) - header[154] - header[155] + 2 * ord(" "))
    return bytes(header)


class SliceWriter:
    """Writes `NAME-00.tar`, and `NAME-01.tar`, ... whenever the next sample would make a shard larger than `max_bytes`
    (a sample that is larger on its own gets a shard on its own). Without samples there is no shard.

    indexes: one a shard, of those that are whole; of all after `close`.
    """

    def __init__(self, folder: Path, name: str, max_bytes: int) -> None:
        self._folder, self._name, self._max_bytes = folder, name, max_bytes
        self._file: BinaryIO | None = None
        self._path = folder
        self._num_bytes = 0
        self._rows = IndexRows()
        self.indexes: list[ShardIndex] = []

    def write(self, sample: Sample) -> None:
        """Adds a sample."""
        members = sample.members
        num_bytes = sum(_BLOCK + len(content) + -len(content) % _BLOCK for _, content in members)
        if self._file is not None and self._num_bytes + num_bytes + len(_CLOSING) > self._max_bytes:
            self.close()
        if self._file is None:
            self._open()
        assert self._file is not None
        offsets = []
        for name, content in members:
            self._file.write(tar_header(name, len(content)))
            self._file.write(content)
            self._file.write(bytes(-len(content) % _BLOCK))
            offsets.append(self._num_bytes + _BLOCK)
            self._num_bytes = offsets[-1] + len(content) + -len(content) % _BLOCK
        self._rows.add(sample, offsets)

    def close(self) -> None:
        """Finishes the current shard: its bytes are on the disk before it gets its name."""
        if self._file is None:
            return
        file, self._file = self._file, None
        with named_errors(self._path), file:
            file.write(_CLOSING)
            file.flush()
            os.fsync(file.fileno())
        os.rename(_partial(self._path), self._path)
        self.indexes.append(self._rows.finish(self._path, self._num_bytes + len(_CLOSING)))

    def _open(self) -> None:
        self._path = self._folder / f"{self._name}-{len(self.indexes):02d}.tar"
        self._file = open(_partial(self._path), "wb", buffering=1 << 20)  # noqa: SIM115  # closed by close and __exit__
        self._num_bytes = 0
        self._rows = IndexRows()

    def __enter__(self) -> "SliceWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        elif self._file is not None:
            self._file.close()


def _partial(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL)
