"""Buffers that processes share, allocated once and reused.

Fresh pages cost more than the copy into them: for a picture, a tenth of the time of decoding and resizing it.
"""

import mmap
import os
import tempfile
from collections import deque

import torch
from torch import Tensor

_FIRST_BLOCK = 8


class SharedBuffers:
    """Buffers of `num_bytes` each, by number; this process and all that it forks see the same memory.

    They are parts of one unnamed file in memory (in a temporary folder where the system has no such files). The file
    grows as buffers are taken, also after a fork; pages that nobody writes take no memory. It is mapped in blocks of
    doubling size, because each mapping takes one of the few files that a process may have open."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = -(-max(num_bytes, 1) // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        self._file = _nameless_file()
        self._num_buffers = 0
        self._free: deque[int] = deque()  # its methods are atomic: workers' results arrive in another thread
        self._mapped: dict[int, Tensor] = {}  # blocks by their first buffer, uint8 [buffers, bytes of each]

    def take(self) -> int:
        """The number of a buffer that belongs to the caller until `give_back`; its content is what it was last.

        Raises:
            OSError: there is no memory for another one.
        """
        assert self._file >= 0, "closed"
        try:
            return self._free.pop()  # the last one to come back: the caches may still know it
        except IndexError:
            number = self._num_buffers
            start, size = _block_of(number)
            if number == start:
                os.ftruncate(self._file, (start + size) * self._num_bytes)
            self._num_buffers += 1
            return number

    def give_back(self, number: int) -> None:
        """Makes the buffer available again."""
        self._free.append(number)

    def memory(self, number: int) -> Tensor:
        """A buffer's bytes, uint8 `[num_bytes]` (rounded up to whole pages); in any of the processes."""
        start, size = _block_of(number)
        if start not in self._mapped:
            memory = mmap.mmap(self._file, size * self._num_bytes, offset=start * self._num_bytes)
            self._mapped[start] = torch.frombuffer(memory, dtype=torch.uint8).view(size, self._num_bytes)
        return self._mapped[start][number - start]

    def close(self) -> None:
        """Allows no more buffers; what is mapped stays valid."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _block_of(number: int) -> tuple[int, int]:
    """(first buffer, number of buffers) of the block that a buffer lies in: 8, 8, 16, 32, ..."""
    start, size = 0, _FIRST_BLOCK
    while number >= start + size:
        start += size
        size = start
    return start, size


def _nameless_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("laver_megatron")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
