"""Reads samples from shards by the index: one open file a shard, checksums, local copies of remote shards."""

import os
from collections import OrderedDict
from collections.abc import Callable

import xxhash

from laver_megatron.data.faults import Fault, SampleFault
from laver_megatron.data.index import Shard, ShardSample
from laver_megatron.data.members import Member

_OPEN_FILES = 64


def open_local(shard: Shard) -> int:
    """A file descriptor of a local shard. Raises OSError."""
    return os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC)


class SampleFiles:
    """Open shards, the most recently used ones; reading is safe in forked processes.

    open_shard: gives a file descriptor of a shard; `ShardCache.open` fetches remote ones.
    """

    def __init__(self, open_shard: Callable[[Shard], int] = open_local) -> None:
        self._open_shard = open_shard
        self._files: OrderedDict[str, int] = OrderedDict()

    def read(self, shard: Shard, sample: ShardSample) -> list[bytes]:
        """The bytes of a sample's .json and of its pictures in order.

        Raises:
            SampleFault: they are not what was indexed.
            OSError: the shard cannot be opened or read.
        """
        digest = xxhash.xxh3_64()
        contents = []
        for member in sample.members:
            content = self.read_member(shard, member)
            digest.update(content)
            contents.append(content)
        if digest.intdigest() != sample.checksum:
            raise SampleFault(
                Fault.damaged_shard,
                f"the bytes have the checksum {digest.intdigest():016x}, but {sample.checksum:016x} in the index: the "
                "shard has changed since it was indexed",
            )
        return contents

    def read_member(self, shard: Shard, member: Member) -> bytes:
        """The bytes of one file of a sample, unchecked.

        Raises:
            SampleFault: the shard ends before them.
            OSError: the shard cannot be opened or read.
        """
        content = os.pread(self._file(shard), member.size, member.offset)
        if len(content) != member.size:
            raise SampleFault(
                Fault.damaged_shard,
                f".{member.extension} has {member.size} bytes in the index but {len(content)} could be read: the "
                "shard has changed since it was indexed",
            )
        return content

    def close(self) -> None:
        """Closes all files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _file(self, shard: Shard) -> int:
        file = self._files.get(shard.path)
        if file is None:
            file = self._files[shard.path] = self._open_shard(shard)
            if len(self._files) > _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(shard.path)
        return file
