"""Small files and directories that are whole or not there, and errors that name them."""

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file to; it takes the place of `path` when the block ends without an error and
    the file is on the disk. Else `path` stays as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync_file(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file that is there whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON object, indented by two, that is there whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def check_place(path: Path, flag: str) -> None:
    """Whether a file or a new directory can be made there, asked before the work that goes into it.

    Raises:
        ValueError: a directory is in the way, or that around it is not there or may not be written to.
    """
    parent = path.absolute().parent
    if path.is_dir():
        raise ValueError(f"{flag} {path} is a directory that is there already; name another path")
    if not parent.is_dir():
        raise ValueError(f"{flag} {path}: {parent} is no directory; make it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{flag} {path}: {parent} may not be written to; name another path")


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory beside `path` to fill; it becomes `path`, which must not exist, when the block ends without an error.

    Raises:
        OSError: `path` has come to exist, or cannot be made.
    """
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.absolute().parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def put_in_place(temporary: Path, final: Path) -> None:
    """Gives a directory that is whole its final name, in the place of one that has it, which goes last."""
    replaced = final.with_name(f".{final.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    try:
        if final.exists():
            os.replace(final, replaced)
        os.replace(temporary, final)
    except BaseException:
        if replaced.exists() and not final.exists():
            os.replace(replaced, final)
        raise
    sync_directory(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object; copy it again")
    return content


def is_within(directory: Path, name: str) -> bool:
    """Whether a name that a file of others says is that of something in a directory: neither absolute nor with `..`,
    nor through a link that leads out of it, nor one that no file can have."""
    if os.path.isabs(name) or ".." in Path(name).parts:
        return False
    try:
        return Path(os.path.realpath(directory / name)).is_relative_to(os.path.realpath(directory))
    except (OSError, ValueError):
        return False


def read_small(path: Path, most_bytes: int) -> bytes:
    """The content of a small file that anybody may have put there; never waits for a pipe, nor reads a device.

    Raises:
        ValueError: it is no regular file, or larger.
        OSError: it cannot be read.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError(f"{path} is not a regular file")
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"{path} is larger than {most_bytes} bytes")
    return content


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Adds the file to errors of writing it, which do not name it."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def open_file(path: str | Path) -> int:
    """A descriptor to read a file from, which programs that this one starts do not inherit."""
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def sync_file(path: Path) -> None:
    """Flushes a file's content to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Flushes a directory's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
