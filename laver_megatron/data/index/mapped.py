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
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

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


def map_columns(source: Path, version: str, recipe: Callable[[], Recipe], spare: Path | None) -> Columns | None:
    """The columns of a Parquet file, mapped; made first if that has not been done or the source has changed.

    Args:
        version: of what they hold, besides the source: they are made anew if it differs.
        recipe: asked for if they have to be made.
        spare: a folder for them if the source's cannot be written to.

    Returns:
        The columns, read-only; None, with a warning, where they can be written nowhere.

    Raises:
        ValueError: the source is damaged.
    """
    identity = _identity(source, version)
    places = [source.with_suffix(_SUFFIX)]
    if spare is not None:
        places.append(spare / f"{xxhash.xxh3_128_hexdigest(identity.encode())}{_SUFFIX}")
    for path in places:
        if (columns := _kept(path, identity)) is not None:
            return columns
    for path in places:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Several readers start together: one makes them, the others wait.
            with FileLock(path.with_name(f".{path.name}.lock")):
                if (columns := _kept(path, identity)) is None:
                    logger.info("%s: writing its columns to %s, which all readers of a node share", source, path)
                    _write(path, identity, recipe())
                    columns = _read(path, identity)
                return columns
        except OSError as error:
            logger.warning("%s cannot be written: %s", path, error)
    logger.warning(
        "%s is held in memory by each reader; start once where its folder can be written to, or name a folder with "
        "--shard-cache, so that the readers of a node share it",
        source,
    )
    return None


def _identity(source: Path, version: str) -> str:
    """The source and how it is read. Its footer has the size and the range of every part of every column."""
    with source.open("rb") as file:
        num_bytes = file.seek(0, os.SEEK_END)
        file.seek(max(num_bytes - 8, 0))
        footer_bytes = min(int.from_bytes(file.read(4), "little") + 8, num_bytes)
        file.seek(num_bytes - footer_bytes)
        footer = xxhash.xxh3_128_hexdigest(file.read(footer_bytes))
    return json.dumps({"mapped": _VERSION, "of": version, "source": [num_bytes, footer]})


def _kept(path: Path, identity: str) -> Columns | None:
    """The columns in a file; None if there is none, or it is of another source or damaged."""
    if not path.is_file():
        return None
    try:
        return _read(path, identity)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s cannot be used (%s); it is made anew", path, error)
        return None


def _read(path: Path, identity: str) -> Columns:
    """Maps a file and verifies its checksums.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is of another source, or damaged.
    """
    with path.open("rb") as file:
        num_bytes = os.fstat(file.fileno()).st_size
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > num_bytes - 8:
            raise ValueError("it is damaged: it ends in its header")
        header = json.loads(file.read(header_bytes))
        metadata = header.pop("__metadata__")
        if metadata["identity"] != identity:
            raise ValueError("it was made from another file, or by another version of laver_megatron")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    columns = {}
    checksums = json.loads(metadata["checksums"])
    for name, entry in header.items():
        begin, end = (8 + header_bytes + place for place in entry["data_offsets"])
        if end > num_bytes:
            raise ValueError(f"it is damaged: it has {num_bytes} bytes, of which {name} needs {end}")
        dtype = np.dtype(_TYPES[entry["dtype"]])
        columns[name] = np.frombuffer(mapped, dtype, entry["shape"][0], begin) if end > begin else np.empty(0, dtype)
        if xxhash.xxh3_64_hexdigest(columns[name].data) != checksums[name]:
            raise ValueError(f"it is damaged: the column {name} does not have its checksum")
    return columns


def _write(path: Path, identity: str, recipe: Recipe) -> None:
    """Writes the columns part by part, atomically. Raises ValueError if the source is damaged."""
    order = list(_TYPES)
    types = {name: _NAMES[np.dtype(dtype)] for name, (dtype, _) in recipe.columns.items()}
    names = sorted(types, key=lambda name: order.index(types[name]))  # so that each is aligned
    begins, end = {}, 0
    for name in names:
        begins[name] = end
        end += recipe.columns[name][1] * np.dtype(_TYPES[types[name]]).itemsize
    digests = {name: xxhash.xxh3_64() for name in names}
    header = {
        name: {"dtype": types[name], "shape": [recipe.columns[name][1]], "data_offsets": [begins[name], stop]}
        for name, stop in zip(names, [*(begins[name] for name in names[1:]), end], strict=True)
    }
    with replacing(path) as temporary:
        with temporary.open("wb") as file:
            data_begin = _write_header(file, header, identity, digests)
            file.truncate(data_begin + end)
            for part in recipe.parts():
                for name, values_I in part.items():
                    content = np.ascontiguousarray(values_I, _TYPES[types[name]]).data.cast("B")
                    digests[name].update(content)
                    file.seek(data_begin + begins[name])
                    file.write(content)
                    begins[name] += len(content)
            _write_header(file, header, identity, digests)
        assert all(begins[name] == header[name]["data_offsets"][1] for name in names), (begins, header)
        recipe.check(_read(temporary, identity))


def _write_header(file: BinaryIO, header: dict, identity: str, digests: Mapping[str, xxhash.xxh3_64]) -> int:
    """Writes the header, always of the same length, and returns where the columns begin."""
    checksums = json.dumps({name: digest.hexdigest() for name, digest in digests.items()})
    content = json.dumps({"__metadata__": {"identity": identity, "checksums": checksums}, **header}).encode()
    content += b" " * (-len(content) % _ALIGNMENT)
    file.seek(0)
    file.write(len(content).to_bytes(8, "little") + content)
    return 8 + len(content)
