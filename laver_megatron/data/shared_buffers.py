"""Buffers that processes share, made once and used again and again.

The pages of fresh memory cost more than what is copied into them: a picture's are a tenth of the time that decoding and
resizing it takes.
"""

import mmap
import os
import tempfile
from collections import deque

import torch
from torch import Tensor


class SharedBuffers:
    """Buffers of `num_bytes` each, by number; this process and all that it forks see the same.

    They are parts of one file that has no name and lives in memory (where the system has none such, in a temporary
    folder). It grows as buffers are taken, also after a fork; pages that nobody writes to take no memory.
    """

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = -(-max(num_bytes, 1) // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        self._file = _nameless_file()
        self._num_buffers = 0
        self._free: deque[int] = deque()  # its methods are atomic: workers' results arrive in another thread
        self._mapped: dict[int, Tensor] = {}

    def take(self) -> int:
        """The number of a buffer that is this caller's until `give_back`; it holds what it held last.

        Raises:
            OSError: there is no memory for another one.
        """
        try:
            return self._free.pop()  # the last one to come back: the caches may still know it
        except IndexError:
            self._num_buffers += 1
            os.ftruncate(self._file, self._num_buffers * self._num_bytes)
            return self._num_buffers - 1

    def give_back(self, number: int) -> None:
        """Lets the buffer be taken again."""
        self._free.append(number)

    def memory(self, number: int) -> Tensor:
        """A buffer's bytes, uint8 `[num_bytes]` (rounded up to whole pages); in any of the processes."""
        if number not in self._mapped:
            memory = mmap.mmap(self._file, self._num_bytes, offset=number * self._num_bytes)
            self._mapped[number] = torch.frombuffer(memory, dtype=torch.uint8)
        return self._mapped[number]

    def close(self) -> None:
        """Lets no more be taken or mapped; what is mapped stays valid."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _nameless_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("laver_megatron")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
