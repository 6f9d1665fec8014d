"""manifest.json: size and checksum of every file of a checkpoint. Megatron-Core loads damaged values without a word."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import xxhash

from laver_megatron.checkpoint.directory import MANIFEST_FILE
from laver_megatron.runtime.files import read_object, sync_directory, write_text

Entry = tuple[int, str]  # bytes, checksum (XXH3, 128 bits) with its name before it
ALGORITHM = "xxh3_128:"


def checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return ALGORITHM + digest.hexdigest()


def describe(path: Path) -> Entry:
    return path.stat().st_size, checksum(path)


def files_of(directory: Path) -> list[Path]:
    """Every file of a checkpoint in a fixed order, the manifest itself excepted."""
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST_FILE)


def write_manifest(directory: Path, entries: dict[str, Entry]) -> None:
    """entries: by path within the directory. Flushed to disk."""
    write_text(directory / MANIFEST_FILE, json.dumps(dict(sorted(entries.items())), indent=1))
    sync_directory(directory)


def read_manifest(directory: Path) -> dict[str, Entry]:
    """Raises ValueError if there is none, or none that can be read."""
    path = directory / MANIFEST_FILE
    if not path.is_file():
        raise ValueError(f"{directory} has no {MANIFEST_FILE}: it is not a complete checkpoint of this program")
    try:
        entries = {name: (int(size), str(digest)) for name, (size, digest) in read_object(path).items()}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    other = [name for name, (_, digest) in entries.items() if not digest.startswith(ALGORITHM)]
    if other:
        raise ValueError(
            f"{path} has a checksum of another kind than {ALGORITHM} for {other[0]}; write the checkpoint anew"
        )
    return entries


def is_small(name: str) -> bool:
    """Whether a file is read whole by a quick check: all but those of the tensors."""
    return not name.endswith(".distcp")


def check_files(
    directory: Path, entries: Iterable[tuple[str, Entry]], whole: Callable[[str], bool] = lambda name: True
) -> None:
    """Compares files with their entries; ValueError naming the first that differs. whole: which files are read; of the
    others only the size is compared."""
    for name, (size, digest) in entries:
        file = directory / name
        if not file.is_file():
            raise ValueError(f"{file} is missing from the checkpoint")
        if file.stat().st_size != size:
            raise ValueError(f"{file} has {file.stat().st_size} bytes, the manifest says {size}")
        if whole(name) and checksum(file) != digest:
            raise ValueError(f"{file} is damaged: its checksum differs from the manifest's")
