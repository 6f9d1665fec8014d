"""Columns of a large Parquet file in a file that is mapped, so that all processes of a node share its pages.

The file has the format of safetensors (a length, a JSON header, the columns), stands beside its source with the suffix
`.mapped`, and is made from it once: Parquet has to be decoded into memory, and Arrow's own file format cuts columns
into the parts in which they were written. It can be deleted at any time.

Letters: I numbers of a column.
"""

import json
import logging
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from filelock import FileLock

from laver_megatron.runtime.files import replacing

logger = logging.getLogger(__name__)

SMALLEST = 100_000  # samples, 10 MB of an index: smaller ones are read into memory
_SUFFIX = ".mapped"
_VERSION = 1
_TYPES = {"U64": "<u8", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U8": "|u1"}  # by falling size
_NAMES = {np.dtype(code): name for name, code in _TYPES.items()}
_ALIGNMENT = 8

Columns = dict[str, np.ndarray]
Lengths = Mapping[str, tuple[type[np.generic], int | None]]  # types and lengths by name; None: not known


@dataclass(frozen=True)
class Recipe:
    """How mapped columns are made.

    Attributes:
        columns: of each its type and length.
        parts: each some more of the columns, in order.
        check: raises ValueError if the columns that have been written are not what the source says.
    """

    columns: Mapping[str, tuple[type[np.generic], int]]
    parts: Callable[[], Iterator[Columns]]
    check: Callable[[Columns], None] = lambda columns: None


def map_columns(
    source: Path, version: str, expected: Lengths, recipe: Callable[[], Recipe], spare: Path | None
) -> Columns | None:
    """The columns of a Parquet file, mapped; made first if that has not been done or the source has changed.

    Args:
        version: of what they hold, besides the source: they are made again if it differs.
        expected: of each column its type, and its length where that is known without reading the source.
        recipe: asked for if they have to be made.
        spare: a folder for them if the source's cannot be written to, or has a file that cannot be read.

    Returns:
        The columns, read-only; None, with a warning, where they can be written nowhere.

    Raises:
        ValueError: the source is damaged.
    """
    identity = _identity(source, version)
    places = [source.with_suffix(_SUFFIX)]
    if spare is not None:
        places.append(spare / f"{xxhash.xxh3_128_hexdigest(identity.encode())}{_SUFFIX}")
    faults: dict[Path, str] = {}
    writable = []
    for path in places:
        try:
            return _read(path, identity, expected)
        except (FileNotFoundError, NotADirectoryError):
            writable.append(path)
        except OSError as error:  # somebody else's: it is not replaced, or each of two users would replace the other's
            faults[path] = f"cannot be read ({_reason(error)})"
        except ValueError as error:
            faults[path] = f"could not be used ({error})"
            writable.append(path)
    for path in writable:
        try:
            columns = _make(source, path, identity, expected, recipe)
        except OSError as error:
            faults[path] = "; ".join(filter(None, (faults.get(path), f"cannot be written ({_reason(error)})")))
            continue
        if faults:
            logger.warning("%s; the columns of %s are now in %s", _listed(faults), source, path)
        return columns
    logger.warning(
        "%s; %s is held in memory by each reader; start once where its folder can be written to, or name a folder with "
        "--shard-cache, so that the readers of a node share it",
        _listed(faults),
        source,
    )
    return None


def _make(source: Path, path: Path, identity: str, expected: Lengths, recipe: Callable[[], Recipe]) -> Columns:
    """Writes the columns to a file and maps it. Raises OSError if that is not possible there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several readers start together: one makes them, the others wait.
    with FileLock(path.with_name(f".{path.name}.lock")):
        with suppress(FileNotFoundError, ValueError):
            return _read(path, identity, expected)
        logger.info("%s: writing its columns to %s, which all readers of a node share", source, path)
        _write(path, identity, recipe())
        return _read(path, identity, expected)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _listed(faults: Mapping[Path, str]) -> str:
    return "; ".join(f"{path} {fault}" for path, fault in faults.items())


def _identity(source: Path, version: str) -> str:
    """The source and how it is read. Its footer has the size and the range of every part of every column."""
    with source.open("rb") as file:
        num_bytes = file.seek(0, os.SEEK_END)
        file.seek(max(num_bytes - 8, 0))
        footer_bytes = min(int.from_bytes(file.read(4), "little") + 8, num_bytes)
        file.seek(num_bytes - footer_bytes)
        footer = xxhash.xxh3_128_hexdigest(file.read(footer_bytes))
    return json.dumps({"mapped": _VERSION, "of": version, "source": [num_bytes, footer]})


def _read(path: Path, identity: str, expected: Lengths) -> Columns:
    """Maps a file and verifies its checksums.

    Raises:
        ValueError: it is of another source, or damaged.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        num_bytes = os.fstat(file.fileno()).st_size
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > num_bytes - 8:
            raise ValueError("it is damaged: it ends in its header")
        entries, checksums = _checked_header(file.read(header_bytes), identity, expected, num_bytes)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    columns = {}
    for name, entry in entries.items():
        begin, end = (8 + header_bytes + place for place in entry["data_offsets"])
        dtype = np.dtype(_TYPES[entry["dtype"]])
        columns[name] = np.frombuffer(mapped, dtype, entry["shape"][0], begin) if end > begin else np.empty(0, dtype)
        if xxhash.xxh3_64_hexdigest(columns[name].data) != checksums.get(name):
            raise ValueError(f"it is damaged: the column {name} does not have its checksum")
    return columns


def _checked_header(
    content: bytes, identity: str, expected: Lengths, num_bytes: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Where the columns lie and their checksums, from a header that is, to the last offset, one that `_write` writes.
    num_bytes: of the file.

    Raises:
        ValueError: it is of another source, or damaged.
    """
    match _from_json(content):
        case {"__metadata__": {"identity": found, "checksums": str(checksums)}, **entries}:
            if found != identity:
                raise ValueError("it was made from another file, or by another version of laver_megatron")
        case _:
            raise ValueError("it is damaged: its header lacks its source or its checksums")
    lengths = {}
    for name, entry in entries.items():
        match entry:
            case {"shape": [int(length)]} if length >= 0:
                lengths[name] = length
    asked = {name: lengths.get(name) if length is None else length for name, (_, length) in expected.items()}
    if asked == lengths:
        layout, data_bytes = _layout({name: (dtype, lengths[name]) for name, (dtype, _) in expected.items()})
        digests = _from_json(checksums.encode())
        if entries == layout and num_bytes == 8 + len(content) + data_bytes and isinstance(digests, dict):
            return layout, digests
    raise ValueError("it is damaged: its header does not describe the columns that it should hold")


def _from_json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError("it is damaged: its header is not JSON") from error


def _layout(columns: Mapping[str, tuple[type[np.generic], int]]) -> tuple[dict[str, Any], int]:
    """The header's entries of columns, one behind the other, and how many bytes they have."""
    order = list(_TYPES)
    types = {name: _NAMES[np.dtype(dtype)] for name, (dtype, _) in columns.items()}
    layout, end = {}, 0
    for name in sorted(types, key=lambda name: order.index(types[name])):  # so that each is aligned
        length = columns[name][1]
        begin, end = end, end + length * np.dtype(_TYPES[types[name]]).itemsize
        layout[name] = {"dtype": types[name], "shape": [length], "data_offsets": [begin, end]}
    return layout, end


def _write(path: Path, identity: str, recipe: Recipe) -> None:
    """Writes the columns part by part, atomically. Raises ValueError if the source is damaged."""
    header, end = _layout(recipe.columns)
    begins = {name: entry["data_offsets"][0] for name, entry in header.items()}
    digests = {name: xxhash.xxh3_64() for name in header}
    with replacing(path) as temporary:
        with temporary.open("wb") as file:
            data_begin = _write_header(file, header, identity, digests)
            file.truncate(data_begin + end)
            for part in recipe.parts():
                for name, values_I in part.items():
                    content = np.ascontiguousarray(values_I, _TYPES[header[name]["dtype"]]).data.cast("B")
                    digests[name].update(content)
                    file.seek(data_begin + begins[name])
                    file.write(content)
                    begins[name] += len(content)
            _write_header(file, header, identity, digests)
        assert all(begins[name] == header[name]["data_offsets"][1] for name in header), (begins, header)
        recipe.check(_read(temporary, identity, recipe.columns))


def _write_header(file: BinaryIO, header: dict, identity: str, digests: Mapping[str, xxhash.xxh3_64]) -> int:
    """Writes the header, always of the same length, and returns where the columns begin."""
    checksums = json.dumps({name: digest.hexdigest() for name, digest in digests.items()})
    content = json.dumps({"__metadata__": {"identity": identity, "checksums": checksums}, **header}).encode()
    content += b" " * (-len(content) % _ALIGNMENT)
    file.seek(0)
    file.write(len(content).to_bytes(8, "little") + content)
    return 8 + len(content)
