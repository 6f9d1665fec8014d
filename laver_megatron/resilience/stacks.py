"""Where threads stand: in a few words for a heartbeat, and whole into a file of `run_dir/faults/`."""

import faulthandler
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NamedTuple, TextIO

DIRECTORY = "faults"
# A main thread whose innermost Python frame is in one of these waits: for other ranks, or for the device, which may
# itself wait for other ranks. The optimizer and train.py have values of the device copied to the host.
_WAITING = (
    "/torch/distributed/",
    "/torch/cuda/",
    "/megatron/core/pipeline_parallel/p2p_communication.py",
    "/megatron/core/tensor_parallel/mappings.py",
    "/megatron/core/tensor_parallel/layers.py",
    "/megatron/core/distributed/",
    "/megatron/core/optimizer/",
    "/laver_megatron/train.py",
)


class Place(NamedTuple):
    """Where the main thread stands. waits: for others, as far as its Python frames tell."""

    text: str
    waits: bool


def main_thread_place() -> Place:
    """The innermost frame of the main thread, and the innermost of this package if that is another."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return Place("nowhere: it has ended", False)
    inner: FrameType | None = frame
    while inner is not None and "/laver_megatron/" not in inner.f_code.co_filename:
        inner = inner.f_back
    text = _name(frame) if inner is None or inner is frame else f"{_name(frame)}, called by {_name(inner)}"
    return Place(text, is_waiting(frame))


def is_waiting(frame: FrameType) -> bool:
    """Whether a thread whose innermost frame this is waits for other ranks or for the device."""
    return any(part in frame.f_code.co_filename for part in _WAITING)


def _name(frame: FrameType) -> str:
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"


class StackFile:
    """The file for this rank's stacks. It is opened before there is a fault, when a file system may still answer, and
    removed at the end if nothing was written. Until `open` it is not there: stacks then go to stderr.

    Python's own timer writes all stacks into it when `arm` is not called again in time. That needs neither this
    process's threads nor its GIL, which a C extension may hold. They stay there until `clear`: a process that goes on
    may do so only because it is being ended (a signal ends a system call), and its stacks are what is asked for.
    """

    def __init__(self, run_dir: Path, rank: int) -> None:
        name = f"rank_{rank:04d}_{time.strftime('%Y%m%d_%H%M%S')}_{os.getpid()}.txt"
        self.path, self.opened = run_dir / DIRECTORY / name, time.time()
        self._file: TextIO | None = None
        self._rank = rank

    @property
    def is_open(self) -> bool:
        return self._file is not None

    def open(self) -> None:
        """Opens the file, and removes empty ones that processes of this rank have left when they were killed."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for left in self.path.parent.glob(f"rank_{self._rank:04d}_*.txt"):
            if left.stat().st_size == 0:
                left.unlink(missing_ok=True)
        self._file = self.path.open("w", encoding="utf-8")

    def arm(self, seconds: float) -> None:
        """Has the stacks written unless this is called again within so many seconds."""
        if self._file is not None:
            faulthandler.dump_traceback_later(seconds, file=self._file)

    def clear(self) -> None:
        """Removes what the timer has written: the process went on, and nobody has given a verdict."""
        if self._file is not None and self._file.tell():
            self._file.seek(0)
            self._file.truncate()

    def write(self, reason: str) -> None:
        """Writes the stacks of all threads."""
        faulthandler.cancel_dump_traceback_later()
        file = self._file or sys.stderr
        title = f"rank {self._rank}, process {os.getpid()} on {socket.gethostname()}"
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {title}: {reason}\n\n")
        file.flush()
        faulthandler.dump_traceback(file=file, all_threads=True)

    def close(self) -> None:
        """Removes the file if it is empty, and the directory if it was the last."""
        faulthandler.cancel_dump_traceback_later()
        if self._file is None:
            return
        with suppress(OSError):
            self._file.close()
            if self.path.stat().st_size == 0:
                self.path.unlink()
                self.path.parent.rmdir()
