"""Remote shards: copies in a folder of bounded size, fetched by webdataset's openers, shared by all processes.

What is used least recently goes first. A copy that goes while someone reads it stays readable to them: the system
keeps a removed file until it is closed.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlparse

import xxhash
from filelock import BaseFileLock, FileLock, Timeout

from laver_megatron.data.index import Shard, ShardIndex
from laver_megatron.data.index_file import is_url

_ATTEMPTS = 8
_LONGEST_PAUSE_SECONDS = 60  # with as many attempts: an outage of some three minutes is waited for
_CHUNK_BYTES = 1 << 20
_WAIT_SECONDS = 0.2


class ShardCache:
    """Local copies of shards that are named by URLs.

    folder: made when it is first needed; several runs may share it. max_bytes: what the copies may take together.
    allow_pipe: whether `pipe:COMMAND` may run its command in a shell.
    """

    def __init__(self, folder: str | Path, max_bytes: int, allow_pipe: bool = False) -> None:
        self.folder, self.max_bytes, self.allow_pipe = Path(folder), max_bytes, allow_pipe

    def check(self, index: ShardIndex) -> None:
        """Looks, without fetching, whether all shards of an index can be had.

        Raises:
            ValueError: a URL that is not allowed or of an unknown kind; a shard that is larger than the cache.
        """
        for shard in index.shards:
            if is_url(shard.path):
                self._check_url(shard.path)
                self._check_size(shard)

    def open(self, shard: Shard) -> int:
        """A file descriptor to read a shard from: itself if it is local, else its copy, which is fetched if need be.

        Raises:
            ValueError: it cannot be fetched, or has another size than in the index.
            OSError: a local shard, or the folder, cannot be used.
        """
        if not is_url(shard.path):
            return os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC)
        while True:
            path = self.fetch(shard.path, shard.num_bytes)
            try:
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:  # another process made room in between
                continue

    def fetch(self, url: str, num_bytes: int | None = None) -> Path:
        """The path of a copy. num_bytes: its size; if it is not known, the copy is fetched anew.

        Raises:
            ValueError: it cannot be fetched, or has another size.
        """
        self._check_url(url)
        path = self.folder / self._name(url)
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._is_whole(path, num_bytes):
            return path
        with self._lock(path.name):
            if not self._is_whole(path, num_bytes):
                part = self._part(path.name)
                part.unlink(missing_ok=True)  # from a process that was killed
                try:
                    self._make_room(part, num_bytes or 0)
                    self._download(url, part, num_bytes)
                    os.replace(part, path)
                finally:
                    part.unlink(missing_ok=True)
        return path

    def _is_whole(self, path: Path, num_bytes: int | None) -> bool:
        try:
            if num_bytes is None or path.stat().st_size != num_bytes:
                return False
            os.utime(path)  # used now
        except FileNotFoundError:
            return False
        return True

    def _download(self, url: str, part: Path, num_bytes: int | None) -> None:
        problem = ""
        for attempt in range(_ATTEMPTS):
            time.sleep(min(2**attempt - 1, _LONGEST_PAUSE_SECONDS))
            try:
                with open_url(url) as source, open(part, "r+b") as target:
                    found = _copy(source, target, num_bytes)
            except (OSError, ValueError) as error:
                problem = str(error)
                continue
            if num_bytes is None or found == num_bytes:
                return
            counted = f"more than {num_bytes}" if found > num_bytes else str(found)
            problem = f"it has {counted} bytes, but {num_bytes} in the index"
        raise ValueError(f"{url} cannot be fetched: {problem} (tried {_ATTEMPTS} times)")

    def _make_room(self, part: Path, num_bytes: int) -> None:
        """Reserves room: `part` has its final size from the start, so that others count it."""
        while True:
            with self._lock("room"):
                free = self.max_bytes - num_bytes
                files = [(entry.stat(), entry) for entry in self._copies(".copy") + self._copies(".part")]
                total = sum(status.st_size for status, _ in files)
                for status, entry in sorted(files, key=lambda file: file[0].st_mtime):
                    if total > free and (entry.suffix == ".copy" or self._is_abandoned(entry)):
                        entry.unlink(missing_ok=True)
                        total -= status.st_size
                if total <= free:
                    with open(part, "wb") as file:
                        file.truncate(num_bytes)
                    return
            time.sleep(_WAIT_SECONDS)  # for what others are fetching: then it can go

    def _copies(self, suffix: str) -> list[Path]:
        return [path for path in self.folder.iterdir() if path.suffix == suffix and path.exists()]

    def _is_abandoned(self, part: Path) -> bool:
        """Whether whoever was fetching this is gone."""
        try:
            with self._lock(part.with_suffix(".copy").name, timeout=0):
                return True
        except Timeout:
            return False

    def _lock(self, name: str, timeout: float = -1) -> BaseFileLock:
        return FileLock(self.folder / f"{name}.lock", timeout=timeout)

    def _part(self, name: str) -> Path:
        return (self.folder / name).with_suffix(".part")

    def _name(self, url: str) -> str:
        return f"{xxhash.xxh3_128_hexdigest(url.encode())}.copy"

    def _check_url(self, url: str) -> None:
        from webdataset.gopen import gopen_schemes, rewrite_url

        scheme = urlparse(rewrite_url(url)).scheme  # GOPEN_REWRITE could make a command of it
        if scheme == "pipe" and not (self.allow_pipe and url.startswith("pipe:")):
            raise ValueError(f"{url} would run a command in a shell; allow it with --allow-pipe if you trust the list")
        known = sorted({"file", "s3", *gopen_schemes} - {"__default__"})
        if scheme not in known:
            raise ValueError(f"{url}: {scheme}: is not known; known are {', '.join(f'{name}:' for name in known)}")

    def _check_size(self, shard: Shard) -> None:
        if shard.num_bytes > self.max_bytes:
            raise ValueError(
                f"{shard.path} has {shard.num_bytes} bytes, more than the {self.max_bytes} that copies may take; "
                "raise --shard-cache-gb"
            )


def _copy(source: BinaryIO, target: BinaryIO, num_bytes: int | None) -> int:
    """Copies to the end, or to the first byte too many; the number of bytes."""
    found = 0
    while num_bytes is None or found <= num_bytes:
        wanted = _CHUNK_BYTES if num_bytes is None else min(_CHUNK_BYTES, num_bytes + 1 - found)
        chunk = source.read(wanted)
        if not chunk:
            break
        target.write(chunk)
        found += len(chunk)
    target.truncate()
    return found


def open_url(url: str) -> BinaryIO:
    """A stream of what a URL names, by webdataset's openers, and by `aws s3 cp` for s3:, which it leaves to others."""
    from webdataset.gopen import Pipe, gopen, gopen_schemes, rewrite_url  # takes torch along, which takes seconds

    url = rewrite_url(url)
    if urlparse(url).scheme == "s3" and "s3" not in gopen_schemes:
        return Pipe(["aws", "s3", "cp", url, "-"], mode="rb", bufsize=8192)
    return gopen(url, "rb")


def expand_urls(names: Sequence[str]) -> list[str]:
    """Names with `{00000..00099}` written out, as webdataset does it."""
    from braceexpand import braceexpand

    return [name for pattern in names for name in braceexpand(pattern)]
