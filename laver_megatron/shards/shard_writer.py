"""Writes the shards of one slice of the samples: tars that appear under their names only when they are whole.

The same samples give the same bytes: every header has the same owner, permissions and time.
"""

import os
import tarfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

import xxhash

from laver_megatron.data.index.members import Member
from laver_megatron.data.index.shard_index import IndexRows, ShardIndex
from laver_megatron.runtime.files import named_errors
from laver_megatron.shards.assemble import Sample

if TYPE_CHECKING:
    from webdataset import TarWriter

PARTIAL = ".partial"  # suffix of an unfinished shard


def _padded(num_bytes: int, to: int = tarfile.BLOCKSIZE) -> int:
    return -(-num_bytes // to) * to


class SliceWriter:
    """Writes `NAME-00.tar`, and `NAME-01.tar`, ... whenever the next sample would make a shard larger than `max_bytes`
    (a sample that is larger on its own gets a shard of its own). Without samples there is no shard.

    Attributes:
        indexes: one for each shard that is whole; all of them after `close`.
    """

    def __init__(self, folder: Path, name: str, max_bytes: int) -> None:
        self._folder, self._name, self._max_bytes = folder, name, max_bytes
        self._file: BinaryIO | None = None
        self._tar: TarWriter
        self._path = folder
        self._num_bytes = 0  # without what closes the tar
        self._rows = IndexRows()
        self.indexes: list[ShardIndex] = []

    def write(self, sample: Sample) -> None:
        """Adds a sample."""
        contents = [("json", sample.text), *zip(sample.extensions, (p.content for p in sample.pictures), strict=True)]
        num_bytes = sum(tarfile.BLOCKSIZE + _padded(len(content)) for _, content in contents)
        if self._file is not None and self._closed_size(self._num_bytes + num_bytes) > self._max_bytes:
            self.close()
        if self._file is None:
            self._open()
        digest = xxhash.xxh3_64()
        members = []
        for extension, content in contents:
            # One file at a time: TarWriter sorts those of a sample, and the text comes first here.
            self._tar.write({"__key__": sample.key, extension: content})
            members.append(Member(extension, self._num_bytes + tarfile.BLOCKSIZE, len(content)))
            self._num_bytes += tarfile.BLOCKSIZE + _padded(len(content))
            digest.update(content)
        for member, picture in zip(members[1:], sample.pictures, strict=True):
            self._rows.add_picture(member, (picture.width, picture.height))
        self._rows.add(sample.key, members[0], digest.intdigest())

    def close(self) -> None:
        """Finishes the current shard: its bytes are on the disk before it gets its name."""
        if self._file is None:
            return
        file, self._file = self._file, None
        with named_errors(self._path), file:
            self._tar.close()
            file.flush()
            os.fsync(file.fileno())
        os.rename(_partial(self._path), self._path)
        self.indexes.append(self._rows.finish(str(self._path), self._closed_size(self._num_bytes)))

    @staticmethod
    def _closed_size(num_bytes: int) -> int:
        """The size of a tar: two blocks of zeros close it, and it is filled up to whole records of 20 blocks."""
        return _padded(num_bytes + 2 * tarfile.BLOCKSIZE, tarfile.RECORDSIZE)

    def _open(self) -> None:
        from webdataset import TarWriter  # imports torch, which takes seconds

        self._path = self._folder / f"{self._name}-{len(self.indexes):02d}.tar"
        self._file = open(_partial(self._path), "wb", buffering=1 << 20)  # noqa: SIM115  # closed by close and __exit__
        self._tar = TarWriter(self._file, user="", group="", mode=0o644, mtime=0, encoder=False)
        self._num_bytes = 0
        self._rows = IndexRows()

    def __enter__(self) -> "SliceWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        elif self._file is not None:
            with suppress(OSError), self._file:
                self._tar.close()


def _partial(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL)
