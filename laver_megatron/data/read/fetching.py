"""Fetches what URLs name, by webdataset's openers, and watches them: whoever stalls, trickles or answers with an error
is given up, with the reason, and never waited for without end.
"""

import os
import re
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import BinaryIO
from urllib.parse import urlparse

import psutil

_CHUNK_BYTES = 1 << 20
_CONNECT_SECONDS = 30
# Less than so much in so long is no transfer: 10 kB/s.
_PATIENCE_SECONDS, _LEAST_BYTES = 60, 600_000
_STATUS = re.compile(r"returned error: (\d{3})")
_MAY_PASS = (408, 425, 429)  # of the answers 4xx


class RefusedError(ValueError):
    """The server answers that it will not give this: asking again is of no use."""


class MissingProgramError(ValueError):
    """The program that fetches such URLs is not installed: trying again is of no use."""


def fetch_into(url: str, target: BinaryIO, num_bytes: int | None) -> int:
    """Writes what a URL names to a file, to its end or to the first byte above `num_bytes`; the number of bytes.

    Raises:
        RefusedError: the server says no.
        MissingProgramError: curl, aws, gsutil or the like is missing.
        OSError: it cannot be reached, sends less than 10 kB/s over a minute, breaks off, or says that it failed.
    """
    with tempfile.TemporaryFile() as messages:
        try:
            source = open_url(url, messages)
        except FileNotFoundError as error:
            program = str(error.filename)
            if os.sep in program or shutil.which(program):
                raise
            raise MissingProgramError(
                f"there is no {program} here; install it, and see that it is on the PATH"
            ) from error
        try:
            found = _copy(source, target, num_bytes)
            if num_bytes is None or found <= num_bytes:
                _finish(source)
        except OSError as error:
            messages.seek(0)
            said = messages.read(10_000).decode(errors="replace").strip()
            status = _STATUS.search(said)
            if status and status[1].startswith("4") and int(status[1]) not in _MAY_PASS:
                raise RefusedError(f"the server answers {status[1]}") from error
            raise OSError(said or str(error)) from error
        finally:
            _end(source)
    return found


def open_url(url: str, messages: BinaryIO) -> BinaryIO:
    """A stream of what a URL names, by webdataset's openers, and by `aws s3 cp` for s3:, which it leaves to others.
    messages: a file for what curl and aws have to say."""
    from webdataset.gopen import Pipe, gopen, gopen_curl, gopen_schemes, rewrite_url  # takes torch along: seconds

    url = rewrite_url(url)
    scheme = urlparse(url).scheme
    if gopen_schemes.get(scheme) is gopen_curl:
        # webdataset's own command asks again for a minute without a word, and never gives up a transfer that stalls.
        command = ["curl", "--fail", "--silent", "--show-error", "--location", "--globoff"]
        command += ["--connect-timeout", str(_CONNECT_SECONDS), "--speed-time", str(_PATIENCE_SECONDS)]
        command += ["--speed-limit", str(_LEAST_BYTES // _PATIENCE_SECONDS), url]
    elif scheme == "s3" and "s3" not in gopen_schemes:
        command = ["aws", "s3", "cp", "--only-show-errors", url, "-"]
    else:
        return gopen(url, "rb")
    return Pipe(command, mode="rb", bufsize=0, stderr=messages)


def _copy(source: BinaryIO, target: BinaryIO, num_bytes: int | None) -> int:
    found = 0
    for chunk in _chunks(source):
        if num_bytes is not None:
            chunk = chunk[: num_bytes + 1 - found]
        target.write(chunk)
        found += len(chunk)
        if num_bytes is not None and found > num_bytes:
            break
    target.truncate()
    return found


def _chunks(source: BinaryIO) -> Iterator[bytes]:
    """What a stream brings. Only what a process sends is watched; files and fsspec's streams have their own limits."""
    if not _is_process(source):
        while chunk := source.read(_CHUNK_BYTES):
            yield chunk
        return
    descriptor = source.stream.fileno()  # type: ignore[attr-defined]
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    began, found = time.monotonic(), 0
    while True:
        seconds_left = began + _PATIENCE_SECONDS - time.monotonic()
        if seconds_left <= 0:
            if found < _LEAST_BYTES:
                raise OSError(f"it stalls: {found} bytes in {_PATIENCE_SECONDS} s")
            began, found = time.monotonic(), 0
        elif poll.poll(seconds_left * 1000):
            chunk = os.read(descriptor, _CHUNK_BYTES)
            if not chunk:
                return
            found += len(chunk)
            yield chunk


def _finish(source: BinaryIO) -> None:
    """Has a process that sent everything end.

    Raises:
        OSError: it failed, or does not end.
    """
    if not _is_process(source):
        return
    try:
        status = source.proc.wait(_PATIENCE_SECONDS)  # type: ignore[attr-defined]
    except subprocess.TimeoutExpired as error:
        raise OSError(f"its command does not end within {_PATIENCE_SECONDS} s") from error
    if status not in source.ignore_status:  # type: ignore[attr-defined]
        raise OSError(f"its command failed with exit code {status}")


def _end(source: BinaryIO) -> None:
    """Closes a stream; a process behind it is killed, with all that it started, if it has not ended."""
    if not _is_process(source):
        source.close()
        return
    process: subprocess.Popen = source.proc  # type: ignore[attr-defined]
    if process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    child.kill()
        process.kill()
    with suppress(OSError):  # how it ended has been judged
        source.close()


def _is_process(source: BinaryIO) -> bool:
    from webdataset.gopen import Pipe

    return isinstance(source, Pipe)
