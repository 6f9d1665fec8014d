"""Remote shards: copies in a folder of bounded size, fetched by webdataset's openers, shared by all processes.

What is used least recently goes first. A copy that goes while someone reads it stays readable to them: the system
keeps a removed file until it is closed.
"""

import logging
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlparse

import xxhash
from filelock import BaseFileLock, FileLock, Timeout

from laver_megatron.data.index.index_file import is_url
from laver_megatron.data.index.shard_index import Shard, ShardIndex
from laver_megatron.data.read.fetching import MissingProgramError, RefusedError, fetch_into

logger = logging.getLogger(__name__)

_ATTEMPTS = 8
_LONGEST_PAUSE_SECONDS = 60  # with as many attempts: an outage of some three minutes is waited for
_WAIT_SECONDS = 0.2
_REMEDY = "look at the server and the network; a run that ends here goes on from its last checkpoint"
_REMEDY_REFUSED = "look at the URL, and whether it may be read from here (signed URLs expire)"
_REMEDY_SIZE = "if it has been replaced, index it again with tools/index_shards.py --overwrite"


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
        self.check_urls([shard.path for shard in index.shards])
        for shard in index.shards:
            if is_url(shard.path):
                self._check_size(shard)

    def check_urls(self, paths: Sequence[str]) -> None:
        """Looks at those paths that are URLs. Raises ValueError for one that is not allowed or of an unknown kind."""
        for path in paths:
            if is_url(path):
                self._check_url(path)

    def open(self, shard: Shard, wrong: int | None = None) -> int:
        """A file descriptor to read a shard from: itself if it is local, else its copy, which is fetched if need be.

        wrong: a descriptor of a copy that does not hold what the index says: it is fetched anew, unless another process
        has done so.

        Raises:
            ValueError: it cannot be fetched, or has another size than in the index.
            OSError: a local shard, or the folder, cannot be used.
        """
        if not is_url(shard.path):
            return os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC)
        if wrong is not None:
            self._drop(shard, wrong)
        while True:
            path = self.fetch(shard.path, shard.num_bytes)
            try:
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:  # another process made room in between
                continue

    def open_once(self, path: str) -> int:
        """A file descriptor to read a shard from that is in no index yet. Of a remote one no copy is kept.

        Raises: as `open` does.
        """
        if not is_url(path):
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        while True:
            copy = self.fetch(path)
            try:
                file = os.open(copy, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:  # another process made room in between
                continue
            copy.unlink(missing_ok=True)
            return file

    def fetch(self, url: str, num_bytes: int | None = None) -> Path:
        """The path of a copy, which others may remove at any time to make room. num_bytes: its size; if it is not
        known, the copy is fetched anew.

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
                with open(part, "r+b") as target:
                    found = fetch_into(url, target, num_bytes)
            except RefusedError as error:
                raise ValueError(f"{url} cannot be fetched: {error}; {_REMEDY_REFUSED}") from error
            except MissingProgramError as error:
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

    def _make_room(self, part: Path, num_bytes: int) -> None:
        """Reserves room: `part` has its final size from the start, so that others count it."""
        while True:
            with self._lock("room"):
                free = self.max_bytes - num_bytes
                files = self._files()
                total = sum(status.st_size for status, _ in files)
                for status, entry in sorted(files, key=lambda file: file[0].st_mtime):
                    if total > free and (entry.suffix == ".copy" or self._is_abandoned(entry)):
                        try:
                            entry.unlink()
                        except FileNotFoundError:
                            if entry.suffix == ".part":  # it may have become a copy: the next turn will see
                                continue
                        total -= status.st_size
                if total <= free:
                    with open(part, "wb") as file:
                        file.truncate(num_bytes)
                    return
            time.sleep(_WAIT_SECONDS)  # for what others are fetching: then it can go

    def _files(self) -> list[tuple[os.stat_result, Path]]:
        """Copies and what is being fetched, each once. Others rename and remove them meanwhile, in no lock of ours."""
        files = {}
        for suffix in (".part", ".copy"):  # in this order: a part that is a copy by now is found among those
            for entry in self._copies(suffix):
                with suppress(FileNotFoundError):
                    files[entry.stem] = entry.stat(), entry
        return list(files.values())

    def _copies(self, suffix: str) -> list[Path]:
        return [path for path in self.folder.iterdir() if path.suffix == suffix]

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


def expand_urls(names: Sequence[str]) -> list[str]:
    """Names with `{00000..00099}` written out, as webdataset does it."""
    from braceexpand import braceexpand

    return [name for pattern in names for name in braceexpand(pattern)]
