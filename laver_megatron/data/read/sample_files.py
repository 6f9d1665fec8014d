"""Reads samples from shards by the index: one open file for each shard, checksums, local copies of remote shards."""

import logging
import os
from collections import OrderedDict
from typing import Protocol

import xxhash

from laver_megatron.data.index.faults import Fault, SampleFault
from laver_megatron.data.index.index_file import is_url
from laver_megatron.data.index.members import Member
from laver_megatron.data.index.shard_index import Shard, ShardSample
from laver_megatron.runtime.files import open_file

logger = logging.getLogger(__name__)

_OPEN_FILES = 64


class OpenShard(Protocol):
    """Gives a file descriptor of a shard. wrong: one of a copy of it that does not match the index."""

    def __call__(self, shard: Shard, wrong: int | None = None) -> int: ...


def open_local(shard: Shard, wrong: int | None = None) -> int:
    """A file descriptor of a local shard, which has no copies. Raises OSError."""
    return open_file(shard.path)


class SampleFiles:
    """The most recently used shards, kept open; reading is safe in forked processes.

    open_shard: `ShardCache.open` fetches remote shards."""

    def __init__(self, open_shard: OpenShard = open_local) -> None:
        self._open_shard = open_shard
        self._files: OrderedDict[str, int] = OrderedDict()
        self._fetched_anew: set[str] = set()

    def read(self, shard: Shard, sample: ShardSample) -> list[bytes]:
        """The bytes of a sample's .json and of its pictures in order. A copy of a remote shard that does not match the
        index is fetched again, once.

        Raises:
            SampleFault: they are not what was indexed.
            ValueError: the shard cannot be fetched.
            OSError: the shard cannot be opened or read.
        """
        try:
            return self._read(shard, sample)
        except SampleFault as error:
            if not is_url(shard.path):
                raise
            fault = error
        if shard.path not in self._fetched_anew:
            self._fetched_anew.add(shard.path)
            logger.warning(
                "%s: %r is not in its copy as it was indexed (%s); the copy is fetched anew",
                shard.path, sample.key, fault,
            )  # fmt: skip
            self._fetch_anew(shard)
            try:
                return self._read(shard, sample)
            except SampleFault as error:
                fault = error
        raise SampleFault(fault.fault, f"{fault}; its copy has been fetched anew, and is no better") from fault

    def _read(self, shard: Shard, sample: ShardSample) -> list[bytes]:
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

    def _fetch_anew(self, shard: Shard) -> None:
        wrong = self._files.pop(shard.path)
        try:
            self._files[shard.path] = self._open_shard(shard, wrong)
        finally:
            os.close(wrong)

    def _file(self, shard: Shard) -> int:
        file = self._files.get(shard.path)
        if file is None:
            file = self._files[shard.path] = self._open_shard(shard)
            if len(self._files) > _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(shard.path)
        return file
