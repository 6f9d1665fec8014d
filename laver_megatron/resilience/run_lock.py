"""One run for each run directory: rank 0 holds RUN_DIR/run.lock from before anything is written until its end.

The file is locked (fcntl), which the system undoes when the process ends, however it ends, and which forked readers or
writers do not inherit, as they would filelock's locks. Where the file system does not carry locks to other machines,
its content decides: host, pid and job of the holder, and the file's time, which the holder renews.
"""

import errno
import fcntl
import json
import os
import socket
import stat
import sys
import tempfile
import threading
import time
from io import FileIO
from pathlib import Path
from typing import Any

import psutil

from laver_megatron.runtime.exit_status import WRONG_USE, end
from laver_megatron.runtime.terminal import printable

LOCK_FILE = "run.lock"
# A holder on another machine is taken to be gone after so long without a sign.
STALE_SECONDS = 120.0
_BEAT_SECONDS = 20.0
_LOOK_SECONDS = 0.2
_JOB = "SLURM_JOB_ID"
_MOST_BYTES = 4096  # of the file: its holder writes some two hundred
_TYPES: dict[str, Any] = {"host": str, "pid": int, "job_id": (str, type(None)), "began": float}


class RunLock:
    """The lock of a run directory, held until `release` or the end of the process.

    Raises:
        ValueError: the file is a link or no file, so that it is not ours to write.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / LOCK_FILE
        self._file = self._open()
        self._released = threading.Event()

    def acquire(self) -> None:
        """Takes the lock; one that its holder has left is taken over with a line.

        Raises:
            ValueError: another run holds it.
        """
        try:
            holder = self._free_from()
        except ValueError:
            time.sleep(_LOOK_SECONDS)  # a launcher that only looks has it for a moment
            holder = self._free_from()
        if holder:
            print(f"taking over {self._path.parent} from a run that is gone: {_in_words(holder)}", file=sys.stderr)
        self._sign()
        threading.Thread(target=self._keep_signing, name="run-lock", daemon=True).start()

    def check(self) -> None:
        """Takes nothing, and gives up the file.

        Raises:
            ValueError: another run holds the lock.
        """
        with self._file:
            self._free_from()

    def _free_from(self) -> dict[str, Any]:
        """Locks the file; returns the holder that is gone, empty if there was none.

        Raises:
            ValueError: another run holds it.
        """
        holder = self._holder()
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = bool(holder) and self._is_alive(holder)
        except OSError:
            held = True
        if held:
            raise ValueError(
                f"another run is using {self._path.parent}: {_in_words(holder)}; stop it, or give this one "
                f"another --run-dir (a holder on another machine counts as gone after {STALE_SECONDS:.0f} s without "
                "a sign)"
            )
        return holder

    def release(self) -> None:
        """Gives the directory to the next run."""
        self._released.set()
        self._file.truncate(0)
        self._file.close()

    def _open(self) -> FileIO:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            file = FileIO(os.open(self._path, flags, 0o644), "r+")
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise
            raise self._is_no_file() from error
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.close()
            raise self._is_no_file()
        return file

    def _is_no_file(self) -> ValueError:
        return ValueError(f"{self._path} is not a regular file, as the lock of a run must be: remove it")

    def _holder(self) -> dict[str, Any]:
        """What the file says; empty if nobody has it, or nobody that it names: its holder was killed while it wrote,
        or something else wrote into it."""
        try:
            found = json.loads(os.pread(self._file.fileno(), _MOST_BYTES, 0))
        except (ValueError, RecursionError):
            return {}
        is_holder = isinstance(found, dict) and all(isinstance(found.get(name), kind) for name, kind in _TYPES.items())
        return found if is_holder and 0 < found["pid"] < 2**31 else {}

    def _is_alive(self, holder: dict[str, Any]) -> bool:
        """Of a holder whose lock this machine does not see."""
        if holder.get("host") == socket.gethostname():
            try:
                return abs(psutil.Process(holder["pid"]).create_time() - holder["began"]) < 1
            except psutil.Error:
                return False
        if holder.get("job_id") is not None and holder.get("job_id") == os.environ.get(_JOB):
            return False  # the same job, started again elsewhere
        signed = os.fstat(self._file.fileno()).st_mtime
        with tempfile.TemporaryFile(dir=self._path.parent) as probe:  # the file system's clock, not this machine's
            now = os.fstat(probe.fileno()).st_mtime
        if signed > now:  # or it would count for as long as that lies ahead
            os.utime(self._file.fileno(), (now, now))
        return now - signed < STALE_SECONDS

    def _sign(self) -> None:
        content = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job_id": os.environ.get(_JOB),
            "began": psutil.Process().create_time(),
            "heartbeat": time.time(),
        }
        text = json.dumps(content).encode() + b"\n"
        self._file.seek(0)
        self._file.write(text)
        self._file.truncate(len(text))

    def _keep_signing(self) -> None:
        while not self._released.wait(_BEAT_SECONDS):
            try:
                self._sign()
            except (OSError, ValueError):  # a full disk, or released just now
                continue


def _in_words(holder: dict[str, Any]) -> str:
    if not holder:
        return "its process is not known yet"
    job = f", job {holder['job_id']}" if holder["job_id"] else ""
    return printable(f"process {holder['pid']} on {holder['host']}{job}")


def refuse_second(run_dir: Path) -> None:
    """Ends the launcher with WRONG_USE if another run has the directory, before it starts ranks that would find out."""
    if not os.path.lexists(run_dir / LOCK_FILE):
        return
    try:
        RunLock(run_dir).check()
    except ValueError as error:
        end(f"error: {error}", WRONG_USE)


def hold(run_dir: Path) -> RunLock | None:
    """The directory's lock, on rank 0; ends the process with WRONG_USE if another run has it, or its file
    is not ours."""
    if os.environ.get("RANK", "0") != "0":
        return None
    try:
        lock = RunLock(run_dir)
        lock.acquire()
    except ValueError as error:
        end(f"error: {error}", WRONG_USE)
    return lock
