"""The .jsonl files of a run directory: one strict JSON object an iteration, iterations rising."""

import contextlib
import errno
import json
import math
import os
import warnings
from collections import deque
from pathlib import Path
from typing import Any

from laver_megatron.runtime.files import write_text


def json_line(record: dict[str, Any]) -> str:
    """One line of strict JSON; a number that is not finite becomes null."""
    strict = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }
    return json.dumps(strict, allow_nan=False) + "\n"


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file of ours, in file order. A torn last line (a crash while writing) is left out
    quietly, a bad line elsewhere with a warning that names it."""
    lines = Path(path).read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record["iteration"], int):
                raise TypeError("iteration")
        except (ValueError, TypeError, KeyError):
            if number < len(lines):  # the last piece has no newline after it: torn
                warnings.warn(f"{path}, line {number} is not a record and is left out: {line[:60]!r}", stacklevel=2)
            continue
        records.append(record)
    return records


def drop_after(path: Path, iteration: int) -> None:
    """Keep only the records up to this iteration, atomically. Iteration 0 starts a new file and keeps the old one
    as `<name>.previous.jsonl`: a run directory used twice should not cost the first run its numbers."""
    if not path.exists() or path.stat().st_size == 0:
        return
    if iteration == 0:
        os.replace(path, path.with_name(f"{path.stem}.previous{path.suffix}"))
        return
    kept = [record for record in read_records(path) if record["iteration"] <= iteration]
    write_text(path, "".join(json_line(record) for record in kept))


def truncate_after(path: Path, iteration: int) -> None:
    """Cuts a file before its first record after this iteration, in place: a full disk has no room for another file."""
    end = 0
    with path.open("rb+") as file:
        for line in file:
            try:
                is_kept = json.loads(line)["iteration"] <= iteration
            except (ValueError, TypeError, KeyError):
                is_kept = line.endswith(b"\n")  # no record, and left out when the file is read
            if not is_kept:
                break
            end += len(line)
        file.truncate(end)


class JsonLines:
    """Appends lines to a file, each whole or not at all. Lines that cannot be written wait and go first next time.

    Args:
        max_waiting: of more lines than this the oldest are lost.

    Attributes:
        num_lost: how many were.
    """

    def __init__(self, path: Path, max_waiting: int = 100_000) -> None:
        self.path, self.num_lost = path, 0
        self._waiting: deque[bytes] = deque()
        self._max_waiting = max_waiting
        self._file: int | None = None
        self._size = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def append(self, line: str) -> None:
        """Adds a line.

        Raises:
            OSError: it waits, and with it those that waited before.
        """
        self._waiting.append(line.encode())
        while len(self._waiting) > self._max_waiting:
            self._waiting.popleft()
            self.num_lost += 1
        self.flush()

    def flush(self) -> None:
        """Writes what waits.

        Raises:
            OSError: some of it still does.
        """
        if self._file is None:
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self._size = os.fstat(self._file).st_size
        while self._waiting:
            self._write(self._file, self._waiting[0])
            self._waiting.popleft()

    def _write(self, file: int, line: bytes) -> None:
        done = 0
        try:
            while done < len(line):
                written = os.pwrite(file, line[done:], self._size + done)
                if not written:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                done += written
        except OSError:
            with contextlib.suppress(OSError):  # a piece that stays is written over
                os.ftruncate(file, self._size)
            raise
        self._size += len(line)

    def close(self) -> None:
        """Writes what waits, and closes the file either way.

        Raises:
            OSError: lines are lost.
        """
        try:
            self.flush()
        finally:
            if self._file is not None:
                os.close(self._file)
                self._file = None


def validation_losses(run_dir: Path) -> dict[int, float]:
    """The losses of a run's validations, by iteration; those that are not finite are left out."""
    path = run_dir / "validation.jsonl"
    records = read_records(path) if path.is_file() else []
    return {record["iteration"]: record["loss"] for record in records if isinstance(record.get("loss"), (int, float))}
