"""Copies what a URL names into a local file: by fsspec, or for `pipe:` by a shell command.

Every transfer is watched. One that stalls, trickles or fails ends with the reason; none is waited for indefinitely.
"""

import asyncio
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.callbacks import Callback
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper

PIPE = "pipe"
_CHUNK_BYTES = 1 << 20
_POLL_SECONDS = 0.2
_CONNECT_SECONDS = 30
# A transfer of less than this in this time has stalled: 10 kB/s.
_PATIENCE_SECONDS, _MIN_BYTES = 60, 600_000
_TRANSIENT = (408, 425, 429)  # of the 4xx answers


class RefusedError(ValueError):
    """The server will not serve this URL: asking again is of no use."""


class MissingPackageError(ValueError):
    """The package that reads such URLs is not installed: trying again is of no use."""


class _TooLong(Exception):
    """More bytes arrived than were expected."""


class _Stalled(OSError):
    """Too few bytes arrived in the last minute."""


def _no_options(url: str) -> dict[str, Any]:
    return {}


def _http_options(url: str) -> dict[str, Any]:
    from aiohttp import ClientTimeout

    # No limit on the whole transfer: it is watched here. Proxies come from the environment, as for curl.
    client = {"timeout": ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS), "trust_env": True}
    # A URL that is quoted already must reach the server as it is: signatures cover every character.
    return {"client_kwargs": client, "encoded": "%" in url}


# By scheme, the options of fsspec's file systems. Others can be read with `pipe:`.
SCHEMES: dict[str, Callable[[str], dict[str, Any]]] = {
    "gs": _no_options, "hf": _no_options, "http": _http_options, "https": _http_options, "s3": _no_options,
}  # fmt: skip


def scheme_of(url: str) -> str:
    """`https` of `https://...`, `pipe` of `pipe:...`."""
    return url.partition(":")[0].lower()


def fetch_into(url: str, path: Path, num_bytes: int | None) -> int:
    """Copies what a URL names into a file, which is replaced.

    Args:
        url: `pipe:COMMAND`, or of one of SCHEMES.
        num_bytes: the expected size; a longer transfer is cut short.

    Returns:
        The number of bytes that arrived; more than `num_bytes` if there are more.

    Raises:
        RefusedError: the server will not serve it.
        MissingPackageError: s3fs, gcsfs or the like is not installed.
        OSError: it cannot be reached, sends less than 10 kB/s for a minute, breaks off, or reports a failure.
    """
    transfer = _Transfer(num_bytes)
    path.unlink(missing_ok=True)  # an earlier attempt that is still ending must not write into this one
    try:
        if scheme_of(url) == PIPE:
            _run(url.partition(":")[2], path, transfer)
        else:
            _download(url, path, transfer)
    except _TooLong:
        return transfer.value
    return path.stat().st_size


class _Transfer(Callback):
    """Counts the bytes of a transfer, and tells when it has stalled. fsspec calls it from a thread of its own."""

    def __init__(self, limit: int | None) -> None:
        super().__init__()
        self._limit = limit
        self._began, self._before = time.monotonic(), 0

    def relative_update(self, inc: int = 1) -> None:
        """Counts bytes. Raises _TooLong when there are more than expected."""
        self.value += inc
        if self._limit is not None and self.value > self._limit:
            raise _TooLong

    def check(self) -> None:
        """Raises _Stalled if the transfer has."""
        if time.monotonic() - self._began < _PATIENCE_SECONDS:
            return
        arrived = self.value - self._before
        if arrived < _MIN_BYTES:
            raise _Stalled(f"it stalls: {arrived} bytes in {_PATIENCE_SECONDS} s")
        self._began, self._before = time.monotonic(), self.value


def _download(url: str, path: Path, transfer: _Transfer) -> None:
    files = _file_system(url)
    try:
        sync(files.loop, _watched, files, files._strip_protocol(url), path, transfer)
    except (_TooLong, _Stalled):
        raise
    except Exception as error:  # each library has exceptions of its own
        status = _status(error)
        if status and (status >= 500 or status in _TRANSIENT):
            raise OSError(f"the server answers {status}") from error
        if status and status >= 400:
            raise RefusedError(f"the server answers {status}") from error
        if transfer.size and transfer.value < transfer.size:
            missing = transfer.size - transfer.value
            raise OSError(f"transfer closed with {missing} bytes remaining to read") from error
        raise OSError(str(error) or str(error.__cause__ or type(error).__name__)) from error


def _file_system(url: str) -> AsyncFileSystem:
    scheme = scheme_of(url)
    try:
        files = fsspec.filesystem(scheme, skip_instance_cache=True, **SCHEMES[scheme](url))
    except ImportError as error:
        extra = f"; pip install 'laver_megatron[{scheme}]'" if scheme in ("s3", "gs") else ""
        raise MissingPackageError(f"{error}{extra}") from error
    return files if files.async_impl else AsyncFileSystemWrapper(files, asynchronous=False)


async def _watched(files: AsyncFileSystem, source: str, path: Path, transfer: _Transfer) -> None:
    task = asyncio.ensure_future(files._get_file(source, str(path), callback=transfer))
    while not task.done():
        await asyncio.wait({task}, timeout=_POLL_SECONDS)
        try:
            transfer.check()
        except _Stalled:
            task.cancel()
            await asyncio.wait({task}, timeout=_POLL_SECONDS)  # closes its file
            raise
    await task


def _status(error: Exception) -> int:
    """The HTTP status behind an exception, 0 if there is none."""
    for name in ("status", "code"):  # of aiohttp, of gcsfs
        if isinstance(status := getattr(error, name, None), int):
            return status
    if isinstance(error, FileNotFoundError | PermissionError) and error.filename is None:  # not of our own file
        return 404 if isinstance(error, FileNotFoundError) else 403
    return 0


def _run(command: str, path: Path, transfer: _Transfer) -> None:
    """Writes what a shell command prints."""
    with (
        open(path, "wb") as target,
        subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, start_new_session=True) as process,
    ):
        assert process.stdout is not None
        try:
            descriptor = process.stdout.fileno()
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            while True:
                transfer.check()
                if poll.poll(_POLL_SECONDS * 1000):
                    chunk = os.read(descriptor, _CHUNK_BYTES)
                    if not chunk:
                        break
                    target.write(chunk)
                    transfer.relative_update(len(chunk))
            status = process.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise OSError(f"its command does not end within {_PATIENCE_SECONDS} s") from error
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with all that it started
    if status:
        raise OSError(f"its command failed with exit code {status}")
