"""manifest.json: size and checksum of every file of a checkpoint. Megatron-Core loads damaged values without a word.

Where it is read it is held against the directory: a file that it does not list is one that nobody checked.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from laver_megatron.checkpoint.directory import MANIFEST_FILE, RUN_FILE
from laver_megatron.runtime.files import is_within, read_object, sync_directory, write_text
from laver_megatron.runtime.terminal import printable

Entry = tuple[int, str]  # bytes, checksum (XXH3, 128 bits) with its name before it
ALGORITHM = "xxh3_128:"
_NEEDED = (".metadata", RUN_FILE, "hf/config.json")  # of every checkpoint, converted ones and old ones among them


def checksum(path: Path) -> str:
    import xxhash  # here: a launcher and a planner look at checkpoints without the packages that a run needs

    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return ALGORITHM + digest.hexdigest()


def describe(path: Path) -> Entry:
    return path.stat().st_size, checksum(path)


def files_of(directory: Path) -> list[Path]:
    """Every file of a checkpoint in a fixed order, the manifest itself excepted."""
    return sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / MANIFEST_FILE)


def write_manifest(directory: Path, entries: dict[str, Entry]) -> None:
    """entries: by path within the directory. Flushed to disk."""
    write_text(directory / MANIFEST_FILE, json.dumps(dict(sorted(entries.items())), indent=1))
    sync_directory(directory)


def read_manifest(directory: Path) -> dict[str, Entry]:
    """The entries by path within the directory: of all files that are there, and of no others outside.

    Raises:
        ValueError: there is no manifest, none that can be read, or one that lists too little or what lies elsewhere.
    """
    path = directory / MANIFEST_FILE
    if not path.is_file():
        raise ValueError(f"{directory} has no {MANIFEST_FILE}: it is not a complete checkpoint of this program")
    entries = {name: _entry(path, name, said) for name, said in read_object(path).items()}
    there = [str(file.relative_to(directory)) for file in files_of(directory)]
    unlisted = [name for name in dict.fromkeys((*_NEEDED, *there)) if name not in entries]
    if unlisted:
        more = f" and {len(unlisted) - 1} more" if len(unlisted) > 1 else ""
        raise ValueError(
            f"{path} does not list {printable(unlisted[0])}{more}, so that nothing says whether it is what was "
            "written; copy the checkpoint again"
        )
    return entries


def _entry(path: Path, name: str, said: Any) -> Entry:
    """What a manifest says of a file, once it is known to be a size and a checksum of a file of this checkpoint."""
    match said:
        case [int(size), str(digest)] if is_within(path.parent, name):
            if digest.startswith(ALGORITHM):
                return size, digest
            raise ValueError(
                f"{path} has a checksum of another kind than {ALGORITHM} for {printable(name)}; write the checkpoint "
                "anew"
            )
        case [int(), str()]:
            raise ValueError(
                f"{path} names {printable(name)}, which lies outside the checkpoint; nothing of it was read. Do not "
                "use this checkpoint unless you know who made it"
            )
    raise ValueError(f"{path} is damaged: what it says of {printable(name)} is not a size and a checksum")


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
        shown = printable(str(file))
        if not file.is_file():
            raise ValueError(f"{shown} is missing from the checkpoint")
        if file.stat().st_size != size:
            raise ValueError(f"{shown} has {file.stat().st_size} bytes, the manifest says {size}")
        if whole(name) and checksum(file) != digest:
            raise ValueError(f"{shown} is damaged: its checksum differs from the manifest's")
