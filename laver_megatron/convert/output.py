"""Building an output directory: beside its final name, and renamed when it is whole; nothing is left of a failure."""

import fnmatch
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from laver_megatron.checkpoint.directory import MANIFEST_FILE, RUN_FILE, is_converted
from laver_megatron.config.directories import kernel_file_system
from laver_megatron.convert.export.description import REMOTE_CODE
from laver_megatron.hf.files import CONFIG_FILE, SMALL_FILES
from laver_megatron.runtime.files import put_in_place, sync_directory, sync_file
from laver_megatron.runtime.ranks import on_rank_0

# All that may lie in a directory that --overwrite replaces.
_HUGGING_FACE_FILES = (
    "*.safetensors", "*.safetensors.index.json", *SMALL_FILES, REMOTE_CODE.name, "README.md", "LICENSE*",
    ".gitattributes",
)  # fmt: skip
_MEGATRON_FILES = ("*.distcp", ".metadata", "metadata.json", "common.pt", "hf", "encoder", RUN_FILE, MANIFEST_FILE)
Item = TypeVar("Item")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Target:
    """An output directory to be made.

    Attributes:
        path: as the user named it.
        overwrite: whether it may take the place of another.
        num_bytes: what will be written, compared with the free space.
        inputs: the directories that are read meanwhile.
    """

    path: Path
    overwrite: bool
    num_bytes: int
    inputs: Sequence[Path]

    @cached_property
    def final(self) -> Path:
        # Once: the working directory may move along with what is replaced.
        return Path(os.path.abspath(self.path))

    @property
    def temporary(self) -> Path:
        return self.final.with_name(f".{self.final.name}.incomplete")


@contextmanager
def output_directory(target: Target) -> Iterator[Path]:
    """A directory to fill, on all ranks the same; it gets its final name when the block ends without an error, and
    is removed otherwise with the parents made for it, also on Ctrl-C, SIGTERM and when the terminal is closed.

    Raises:
        ValueError: see `check_target`, or the temporary directory is there already.
    """
    made: list[Path] = []  # by this rank, outermost first
    interrupted = tidying = False

    def stop(number: int, frame: object) -> None:
        nonlocal interrupted
        if not (interrupted or tidying):  # torchrun passes on what the terminal has sent already
            interrupted = True
            raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        on_rank_0("begin", lambda: _begin(target, made))
        yield target.temporary
        tidying = True  # a moment, and not to be left half done
        on_rank_0("put the output in place", lambda: _finish(target))
    except BaseException:
        tidying = True
        _remove(target, made)
        raise
    finally:
        for number, handler in before.items():
            # The next signal is not to kill a program that the first has sent on its way out.
            signal.signal(number, signal.SIG_IGN if interrupted else handler)


def check_target(target: Target) -> None:
    """Refuses, without touching anything, a target that exists and may not be overwritten, that is one of the inputs
    or lies in or around one, that cannot be made, or that the disk has no room for.

    Raises:
        ValueError: which of these.
    """
    final, real = target.final, target.final.resolve()
    for path in (path.resolve() for path in target.inputs):
        if real == path or real in path.parents or path in real.parents:
            raise ValueError(f"{final} is, or lies in or around, {path}, which is read; choose another directory")
    if final.exists() or final.is_symlink():
        if not target.overwrite:
            raise ValueError(f"{final} exists; choose another directory, or replace it with --overwrite")
        if reason := _reason_not_to_replace(final):
            raise ValueError(f"{final} {reason}: --overwrite does not replace it; remove it yourself")
    nearest = final.parent
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    dangling = next((path for path in final.parents if path.is_symlink() and not path.exists()), None)
    if dangling:
        raise ValueError(f"{final} cannot be made: {dangling} is a link to nowhere")
    if kind := kernel_file_system(nearest):
        raise ValueError(f"{final} cannot be made: {nearest} belongs to the kernel's {kind}")
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"{final} cannot be made: {nearest} is not a directory that you may write to")
    free = shutil.disk_usage(nearest).free
    if target.num_bytes > free:
        raise ValueError(
            f"{final} needs {target.num_bytes / 1e9:.2f} GB, but the disk of {nearest} has {free / 1e9:.2f} GB left"
        )


def _reason_not_to_replace(path: Path) -> str:
    """What keeps a path from being replaced; empty for an empty directory, and for one that holds converted weights
    and nothing else."""
    if path.is_symlink() or not path.is_dir():
        return "is not a directory of weights"
    working_directory = Path.cwd().resolve()
    if path.resolve() in (working_directory, *working_directory.parents):
        return "is, or lies around, the working directory"
    names = sorted(entry.name for entry in path.iterdir())
    if (path / MANIFEST_FILE).is_file():
        if not is_converted(path):
            return "is not a converted checkpoint (a run may resume from it)"
        known: tuple[str, ...] = _MEGATRON_FILES
    elif not names or (path / CONFIG_FILE).is_file():
        known = _HUGGING_FACE_FILES
    else:
        return "is not a directory of weights"
    others = [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in known)]
    return f"holds other things than weights ({', '.join(others[:3])})" if others else ""


def _begin(target: Target, made: list[Path]) -> None:
    check_target(target)
    for parent in reversed([path for path in target.temporary.parents if not path.exists()]):
        parent.mkdir(exist_ok=True)
        made.append(parent)
    try:
        target.temporary.mkdir()
        made.append(target.temporary)
    except FileExistsError:
        raise ValueError(
            f"{target.temporary} exists: another conversion is writing it, or one was killed; if none is running, "
            "remove it"
        ) from None


def _remove(target: Target, made: Sequence[Path]) -> None:
    """What `_begin` made; of the parents only those in which nobody else has put anything."""
    for path in reversed(made):
        if path == target.temporary:
            shutil.rmtree(path, ignore_errors=True)
            if path.exists():
                print(f"{path} could not be removed; remove it yourself", file=sys.stderr)
        elif path.exists() and not any(path.iterdir()):
            path.rmdir()


def _finish(target: Target) -> None:
    for path in target.temporary.rglob("*"):
        (sync_directory if path.is_dir() else sync_file)(path)
    sync_directory(target.temporary)
    if target.final.exists() and not target.overwrite:
        raise ValueError(f"{target.final} has come to exist meanwhile; choose another directory, or give --overwrite")
    put_in_place(target.temporary, target.final)


def groups_of_bytes(items: Iterable[Item], num_bytes: Callable[[Item], int], max_bytes: float) -> list[list[Item]]:
    """Divides items, in their order, into groups of at most `max_bytes`, or of one larger item."""
    groups: list[list[Item]] = [[]]
    size = 0
    for item in items:
        if groups[-1] and size + num_bytes(item) > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += num_bytes(item)
    return groups


def run_tasks(tasks: Sequence[Callable[[], None]], num_threads: int) -> None:
    """Runs all tasks on threads; the first failure, or Ctrl-C, drops those not yet begun and is raised."""
    with ThreadPoolExecutor(num_threads) as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
