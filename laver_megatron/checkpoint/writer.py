"""One rank's files of a checkpoint, written by a thread of this process: in the background from a copy, or at once.

Megatron-Core plans which rank writes what; its own writers are processes that are forked beside CUDA's and Gloo's
threads and answer through another process. When one of them is killed nobody hears of it. A thread dies with its rank
alone, and needs no queue between processes.
"""

import errno
import io
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xxhash

from laver_megatron.checkpoint.manifest import ALGORITHM, Entry, describe
from laver_megatron.runtime.engine import PlannedSave
from laver_megatron.runtime.files import sync_file

# How long the end of a failing run waits for a thread that has been told to stop, which it does between tensors.
_STOP_SECONDS = 30.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Abandoned(Exception):
    """The run ends, and nobody wants the files any more."""


class RankWriter:
    """Writes what this rank has of a checkpoint.

    Args:
        planned: what Megatron-Core gives this rank to write.
        background: write in a thread, from a copy that is made now.
        small_files: writes further files that belong to this rank, and returns their paths.

    Attributes:
        entries, places: once written, its files' sizes and checksums, and where in them tensors and objects are.
    """

    def __init__(
        self, planned: PlannedSave, directory: Path, *, background: bool, small_files: Callable[[], list[Path]]
    ) -> None:
        self.planned, self.directory = planned, directory
        self.entries: dict[str, Entry] = {}
        self.places: list = []
        self._small_files = small_files
        self._error: BaseException | None = None
        self._is_abandoned = threading.Event()
        self._thread: threading.Thread | None = None
        self._buckets = self._stage(background)
        self.num_bytes = sum(tensor.nbytes for *_, (_, tensors) in self._buckets for _, tensor in tensors)
        self._is_background = background

    def start(self) -> None:
        """Writes, and returns at once if that happens in the background."""
        if self._is_background:
            self._thread = threading.Thread(target=self._write_all, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._write_all()

    @property
    def is_written(self) -> bool:
        """Whether this rank has nothing more to write, be it because it failed."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self, seconds: float) -> bool:
        """`is_written`, after so many seconds at most."""
        if self._thread is not None:
            self._thread.join(seconds)
        return self.is_written

    def raise_error(self) -> None:
        """Raises what went wrong while writing: OSError naming the file, and the space that is needed and free."""
        if self._error is not None:
            raise self._error

    def abandon(self) -> None:
        """Ends the thread soon, wherever it is. What it wrote stays a temporary directory."""
        self._is_abandoned.set()
        if self._thread is not None:
            self._thread.join(_STOP_SECONDS)

    def _stage(self, background: bool) -> list:
        """What is to be written, on the CPU; copied, where it is the memory that the run trains on."""
        buckets = self.planned.writer.preload_tensors(self.planned.writer.write_buckets)
        if not background or torch.cuda.is_available():  # from a GPU it has just been copied
            return buckets
        return [
            (path, key, (objects, [(item, tensor.clone()) for item, tensor in tensors]))
            for path, key, (objects, tensors) in buckets
        ]

    def _write_all(self) -> None:
        try:
            for bucket in self._buckets:
                self.places += self._write(*bucket)
            for name, content in self.planned.files.items():
                with _HashedFile(self.directory / name) as file:
                    file.write(content)
                    self._end(file)
            for path in self._small_files():
                sync_file(path)
                self.entries[str(path.relative_to(self.directory))] = describe(path)
        except BaseException as error:  # a thread has nobody to raise it to
            self._error = self._with_space(error) if isinstance(error, OSError) else error
        finally:
            self._buckets = []

    def _write(self, path: str, key: str, content: tuple[list, list]) -> list:
        """Writes a file, flushed to the disk. Returns where each of its tensors and objects is."""
        from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item

        objects, tensors = content
        places = []
        with _HashedFile(Path(path)) as file:
            for item, value in (*objects, *tensors):
                if self._is_abandoned.is_set():
                    raise Abandoned
                try:
                    transforms = self.planned.writer.transforms
                    places.append(_write_item(transforms, file, value, item, key, SerializationFormat.TORCH_SAVE))
                except RuntimeError as error:
                    # On a full disk torch closes the archive and stumbles over its length, which hides why.
                    raise file.error or error from None
            self._end(file)
        return places

    def _end(self, file: "_HashedFile") -> None:
        file.sync()
        digest = ALGORITHM + file.digest.hexdigest()
        self.entries[str(file.path.relative_to(self.directory))] = file.tell(), digest

    def _with_space(self, error: OSError) -> OSError:
        path = error.filename or str(self.directory)
        if error.errno not in _FULL:
            return OSError(error.errno, error.strerror or str(error), path)
        return OSError(error.errno, f"{error.strerror}; {needed(self.num_bytes, self.directory)}", path)


def needed(num_bytes: int, directory: Path) -> str:
    """What a write needs and the file system has, and what to do."""
    free = shutil.disk_usage(directory).free
    return (
        f"{num_bytes / 1e9:.3f} GB are to be written there and {free / 1e9:.3f} GB are free (a quota may allow less); "
        "remove old checkpoints, or keep fewer with --keep-last (an old one is deleted only when the new one is whole)"
    )


class _HashedFile(io.IOBase):
    """A file that is written from its beginning to its end, and checksummed on the way."""

    def __init__(self, path: Path) -> None:
        self.path, self.digest = path, xxhash.xxh3_128()
        self.error: OSError | None = None
        self._file = path.open("wb", buffering=0)
        self._length = 0

    def close(self) -> None:
        self._file.close()
        super().close()

    def write(self, content: Any) -> int:
        left = memoryview(content).cast("B")
        total = len(left)
        self.digest.update(left)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self.error = OSError(error.errno, error.strerror, str(self.path))
            raise self.error from None
        self._length += total
        return total

    def tell(self) -> int:
        return self._length

    def flush(self) -> None:
        pass  # nothing is buffered

    def sync(self) -> None:
        os.fsync(self._file.fileno())
