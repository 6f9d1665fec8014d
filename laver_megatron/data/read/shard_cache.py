"""Copies of remote shards in a folder of bounded size, which all processes share.

The least recently used copy is removed first. A process that has it open can go on reading: the system keeps a removed
file until it is closed.

Files of one URL: HASH.copy, the whole shard; HASH.part, what has arrived of it; HASH.room, an empty file as long as
the shard, which reserves its room; HASH.copy.lock.
"""

import logging
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import xxhash
from filelock import BaseFileLock, FileLock, Timeout

from laver_megatron.data.index.index_file import is_url
from laver_megatron.data.index.shard_index import Shard, ShardIndex
from laver_megatron.data.read.fetching import PIPE, SCHEMES, MissingPackageError, RefusedError, fetch_into, scheme_of
from laver_megatron.runtime.files import open_file

logger = logging.getLogger(__name__)

_ATTEMPTS = 8
_LONGEST_PAUSE_SECONDS = 60  # with as many attempts: an outage of some three minutes is waited for
_WAIT_SECONDS = 0.2
_REMEDY = "look at the server and the network; a run that ends here goes on from its last checkpoint"
_REMEDY_REFUSED = "look at the URL, and whether it may be read from here (signed URLs expire)"
_REMEDY_SIZE = "if it has been replaced, index it again with tools/index_shards.py --overwrite"


class ShardCache:
    """Local copies of remote shards.

    Args:
        folder: created when it is first needed; several runs may share it.
        max_bytes: total size of the copies.
        allow_pipe: whether `pipe:COMMAND` may run its command in a shell.
    """

    def __init__(self, folder: str | Path, max_bytes: int, allow_pipe: bool = False) -> None:
        self.folder, self.max_bytes, self.allow_pipe = Path(folder), max_bytes, allow_pipe

    def check(self, index: ShardIndex) -> None:
        """Checks, without fetching, whether all shards of an index can be had.

        Raises:
            ValueError: a URL that is not allowed or of an unknown scheme; a shard that is larger than the cache.
        """
        self.check_urls([shard.path for shard in index.shards])
        for shard in index.shards:
            if is_url(shard.path):
                self._check_size(shard)

    def check_urls(self, paths: Sequence[str]) -> None:
        """Checks those paths that are URLs. Raises ValueError for one that is not allowed or of an unknown scheme."""
        for path in paths:
            if is_url(path):
                self._check_url(path)

    def open(self, shard: Shard, wrong: int | None = None) -> int:
        """A file descriptor to read a shard from: of itself if it is local, else of its copy, which is fetched if
        necessary.

        Args:
            wrong: a descriptor of a copy that does not match the index: it is fetched again, unless another process has
                done so.

        Raises:
            ValueError: it cannot be fetched, or its size differs from the index.
            OSError: a local shard, or the folder, cannot be used.
        """
        if not is_url(shard.path):
            return open_file(shard.path)
        if wrong is not None:
            self._drop(shard, wrong)
        while True:
            path = self.fetch(shard.path, shard.num_bytes)
            try:
                return open_file(path)
            except FileNotFoundError:  # another process made room in between
                continue

    def open_once(self, path: str) -> int:
        """A file descriptor to read a shard from that is in no index yet. No copy of a remote one is kept.

        Raises:
            ValueError, OSError: as `open`.
        """
        if not is_url(path):
            return open_file(path)
        while True:
            copy = self.fetch(path)
            try:
                file = open_file(copy)
            except FileNotFoundError:  # another process made room in between
                continue
            copy.unlink(missing_ok=True)
            return file

    def fetch(self, url: str, num_bytes: int | None = None) -> Path:
        """The path of a copy, which other processes may remove at any time to make room.

        Args:
            num_bytes: its size; if unknown, it is always fetched.

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
                part, room = path.with_suffix(".part"), path.with_suffix(".room")
                room.unlink(missing_ok=True)  # from a process that was killed
                part.unlink(missing_ok=True)
                try:
                    self._make_room(room, num_bytes or 0)
                    self._download(url, part, num_bytes)
                    os.replace(part, path)
                finally:
                    for file in (part, room):
                        file.unlink(missing_ok=True)
        return path

    def _drop(self, shard: Shard, wrong: int) -> None:
        path = self.folder / self._name(shard.path)
        with self._lock(path.name), suppress(FileNotFoundError):  # which another process made room with
            if os.path.samestat(path.stat(), os.fstat(wrong)):
                path.unlink(missing_ok=True)

    def _is_whole(self, path: Path, num_bytes: int | None) -> bool:
        try:
            if num_bytes is None or path.stat().st_size != num_bytes:
                return False
            os.utime(path)  # used now
        except FileNotFoundError:
            return False
        return True

    def _download(self, url: str, part: Path, num_bytes: int | None) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                found = fetch_into(url, part, num_bytes)
            except RefusedError as error:
                raise ValueError(f"{url} cannot be fetched: {error}; {_REMEDY_REFUSED}") from error
            except MissingPackageError as error:
                raise ValueError(f"{url} cannot be fetched: {error}") from error
            except (OSError, ValueError) as error:
                problem, remedy = str(error), _REMEDY
            else:
                if num_bytes is None or found == num_bytes:
                    return
                counted = f"more than {num_bytes}" if found > num_bytes else str(found)
                problem, remedy = f"it has {counted} bytes, but {num_bytes} in the index", _REMEDY_SIZE
            if attempt < _ATTEMPTS:
                pause = min(2**attempt - 1, _LONGEST_PAUSE_SECONDS)
                logger.warning(
                    "%s cannot be fetched: %s; once more in %d s (%d of %d)", url, problem, pause, attempt, _ATTEMPTS
                )
                time.sleep(pause)
        raise ValueError(f"{url} cannot be fetched: {problem} (tried {_ATTEMPTS} times); {remedy}")

    def _make_room(self, room: Path, num_bytes: int) -> None:
        """Reserves `num_bytes` with the file `room`, and removes old copies for them."""
        while True:
            with self._lock("room"):
                free = self.max_bytes - num_bytes
                entries = self._entries()
                sizes = {stem: max(status.st_size for status, _ in files) for stem, files in entries.items()}
                total = sum(sizes.values())
                for stem, files in sorted(entries.items(), key=lambda entry: entry[1][-1][0].st_mtime):
                    is_copy = all(path.suffix == ".copy" for _, path in files)
                    if total > free and (is_copy or self._is_abandoned(stem)) and _removed([p for _, p in files]):
                        total -= sizes[stem]
                if total <= free:
                    with open(room, "wb") as file:
                        file.truncate(num_bytes)
                    return
            time.sleep(_WAIT_SECONDS)  # for what others are fetching: then it can go

    def _entries(self) -> dict[str, list[tuple[os.stat_result, Path]]]:
        """The files of each URL. Others rename and remove them meanwhile, without taking our lock."""
        entries: dict[str, list[tuple[os.stat_result, Path]]] = {}
        for suffix in (".room", ".part", ".copy"):  # in this order: a part that has become a copy is found there
            for path in self._files(suffix):
                with suppress(FileNotFoundError):
                    status = path.stat()
                    entries.setdefault(path.stem, []).append((status, path))
        return entries

    def _files(self, suffix: str) -> list[Path]:
        return [path for path in self.folder.iterdir() if path.suffix == suffix]

    def _is_abandoned(self, stem: str) -> bool:
        """Whether the process that was fetching this is gone."""
        try:
            with self._lock(f"{stem}.copy", timeout=0):
                return True
        except Timeout:
            return False

    def _lock(self, name: str, timeout: float = -1) -> BaseFileLock:
        return FileLock(self.folder / f"{name}.lock", timeout=timeout)

    def _name(self, url: str) -> str:
        return f"{xxhash.xxh3_128_hexdigest(url.encode())}.copy"

    def _check_url(self, url: str) -> None:
        scheme = scheme_of(url)
        if scheme == PIPE and not self.allow_pipe:
            raise ValueError(f"{url} would run a command in a shell; allow it with --allow-pipe if you trust the list")
        known = sorted({PIPE, *SCHEMES})
        if scheme not in known:
            raise ValueError(f"{url}: {scheme}: is not known; known are {', '.join(f'{name}:' for name in known)}")

    def _check_size(self, shard: Shard) -> None:
        if shard.num_bytes > self.max_bytes:
            raise ValueError(
                f"{shard.path} has {shard.num_bytes} bytes, more than the {self.max_bytes} that copies may take; "
                "raise --shard-cache-gb"
            )


def _removed(paths: Sequence[Path]) -> bool:
    """Removes files; whether their room is free then. A part that is gone may have become a copy."""
    for path in paths:
        try:
            path.unlink()
        except FileNotFoundError:
            if path.suffix != ".copy":
                return False
    return True
