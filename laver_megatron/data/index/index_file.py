"""Writing, reading and checking the Parquet file of an index (shard_index.py describes its columns)."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from laver_megatron.data.index import mapped
from laver_megatron.data.index.faults import FAULT_NAMES
from laver_megatron.data.index.mapped import Columns, Lengths, Recipe, map_columns
from laver_megatron.data.index.shard_index import Shard, ShardIndex, string_bytes
from laver_megatron.runtime.files import replacing

INDEX_NAME = "index.parquet"
PROGRESS_NAME = ".progress"  # in a folder of shards that is still being made
_METADATA_KEY = b"laver_index"
_VERSION = 2  # the first one judged records by other rules
_ROWS_A_GROUP = 1 << 17
_HOW = {"compression": "zstd", "write_page_checksum": True}
NUMBER_OF_FAULT = {str(name): code for code, name in enumerate(FAULT_NAMES)}
# As they are mapped: type, length, and the name in the file of what is as it is there.
_COLUMNS: dict[str, tuple[type[np.generic], str, str]] = {
    "shard_I": (np.int32, "I", ""),
    "key_start": (np.int64, "I + 1", ""),
    "letters": (np.uint8, "letters", ""),
    "text_offset_I": (np.int64, "I", "text_offset"),
    "text_size_I": (np.int64, "I", "text_size"),
    "image_start_I": (np.int64, "I + 1", ""),
    "image_offset_P": (np.int64, "P", "image_offsets"),
    "image_size_P": (np.int32, "P", "image_sizes_bytes"),
    "image_extension_P": (np.int16, "P", ""),
    "image_width_P": (np.int32, "P", "image_widths"),
    "image_height_P": (np.int32, "P", "image_heights"),
    "checksum_I": (np.uint64, "I", "checksum"),
    "fault_I": (np.int8, "I", ""),
    "extensions": (np.uint8, "E", ""),
}
_AGAIN = "index the shards again with tools/index_shards.py --overwrite"


def is_url(path: str) -> bool:
    """Whether a shard is named by a URL (`https://...`, `pipe:...`) and not by a path; `file:` names a path."""
    scheme, colon, _ = path.partition(":")
    return bool(colon) and len(scheme) > 1 and scheme.isalnum() and scheme.lower() != "file"


def local_path(path: str) -> str:
    """The path that `file:///a/b%20c`, `file:a/b` or a plain path names.

    Raises:
        ValueError: `file://host/...`, which is a file of another machine.
    """
    if not path.lower().startswith("file:"):
        return path
    parts = urlsplit(path)
    if parts.netloc not in ("", "localhost"):
        raise ValueError(f"{path} names a file of the machine {parts.netloc}; write file:///PATH, or the path alone")
    return unquote(parts.path)


def write_index(index: ShardIndex, path: str | Path) -> None:
    """Writes an index, atomically. Shards are named relative to its folder where both lie below the same top-level
    folder, so that data and indexes can be moved together."""
    path = Path(path).absolute()
    names = [_stored_path(shard.path, path.parent) for shard in index.shards]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{twice[0]} stands {names.count(twice[0])} times in the index: name every shard once")
    metadata = {
        "version": _VERSION,
        "shards": [
            {"path": name, "num_bytes": shard.num_bytes, "num_samples": shard.num_samples}
            for name, shard in zip(names, index.shards, strict=True)
        ],
        "left_out": dict(index.left_out),
        "ignored": dict(index.ignored),
        "other_keys": dict(index.other_keys),
        "fingerprint": index.fingerprint,
    }
    schema = _table(index, names, slice(0, 0)).schema.with_metadata({_METADATA_KEY: json.dumps(metadata).encode()})
    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema, **_HOW) as writer:
        for begin in range(0, len(index), _ROWS_A_GROUP) or (0,):
            part = slice(begin, min(begin + _ROWS_A_GROUP, len(index)))
            writer.write_table(_table(index, names, part).cast(schema), row_group_size=_ROWS_A_GROUP)


def write_table(table: pa.Table, path: Path) -> None:
    """Writes a Parquet file, atomically."""
    with replacing(path) as temporary:
        pq.write_table(table, temporary, row_group_size=_ROWS_A_GROUP, **_HOW)


def read_table(path: Path) -> pa.Table:
    """Reads a Parquet file and verifies its checksums.

    Raises:
        ValueError: the file does not exist or is damaged.
    """
    with open_parquet(path) as file, _reading(path):
        return file.read()


@contextmanager
def open_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """A Parquet file whose checksums are verified as it is read, which `batches` does.

    Raises:
        ValueError: the file does not exist, or is damaged.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    with _reading(path):
        # Not mapped: a file that is replaced meanwhile would be read half old, half new.
        file = pq.ParquetFile(path, page_checksum_verification=True, memory_map=False, pre_buffer=False)
    with file:
        yield file


@contextmanager
def _reading(path: Path | str) -> Iterator[None]:
    """Around what reads a Parquet file: Arrow raises OSError for damage, too."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet ({str(error).strip()})") from error


def batches(file: pq.ParquetFile, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The rows of some columns, part by part.

    Raises:
        ValueError: the file is damaged.
    """
    with _reading("it"):
        yield from file.iter_batches(_ROWS_A_GROUP, columns=columns)
    pa.default_memory_pool().release_unused()


def read_index(path: str | Path, url: str | None = None, spare: Path | None = None) -> ShardIndex:
    """Reads an index, or maps a large one; paths of shards become absolute.

    Args:
        url: where the file was copied from, if it is a copy: its shards are beside the original.
        spare: a folder for the columns of a large one, if the file's own cannot be written to.

    Raises:
        ValueError: no such file, another kind of file, or one that is damaged; with the remedy.
    """
    path = Path(path).absolute()
    try:
        with open_parquet(path) as file:
            metadata = json.loads((file.schema_arrow.metadata or {}).get(_METADATA_KEY, b"{}"))
            if metadata.get("version") != _VERSION:
                raise ValueError(f"it is no index of version {_VERSION} (it says {metadata.get('version', 'nothing')})")
            content = _Content(file, metadata, path, url)
            columns = None
            if file.metadata.num_rows >= mapped.SMALLEST:
                columns = map_columns(path, f"index {FAULT_NAMES}", content.expected(), content.recipe, spare)
            if columns is None:
                index = content.index(content.read())
                content.check(index)
            else:
                index = content.index(columns)
                index.__dict__["fingerprint"] = metadata["fingerprint"]  # compared when they were written
        return index
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the index {path} cannot be used: {error}; {_AGAIN}") from error


def check_index(index: ShardIndex) -> None:
    """Compares an index with its local shards; remote shards are compared when they are fetched.

    Raises:
        ValueError: shards that are missing or have another size, all of them in one message.
    """
    problems = []
    for shard in index.shards:
        if is_url(shard.path):
            continue
        try:
            num_bytes = os.stat(shard.path).st_size
        except OSError as error:
            problems.append(f"{shard.path}: {error.strerror}")
            continue
        if num_bytes != shard.num_bytes:
            problems.append(f"{shard.path} has {num_bytes} bytes, but {shard.num_bytes} in the index")
    if problems:
        shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
        where = f"the index {index.path}" if index.path else "the index"
        raise ValueError(f"{where} does not match its shards: {shown}; {_AGAIN}")


def _stored_path(path: str, folder: Path) -> str:
    if is_url(path):
        return path
    absolute = os.path.abspath(path)
    if os.path.commonpath([absolute, folder]) == os.path.abspath(os.sep):
        return absolute
    return os.path.relpath(absolute, folder)


def _table(index: ShardIndex, names: list[str], rows: slice) -> pa.Table:
    starts_I = index.image_start_I[rows.start : rows.stop + 1]
    pictures_P = slice(int(starts_I[0]), int(starts_I[-1]))
    starts = pa.array((starts_I - starts_I[0]).astype(np.int32))

    def pictures(values: np.ndarray | pa.Array) -> pa.ListArray:
        return pa.ListArray.from_arrays(starts, pa.array(values) if isinstance(values, np.ndarray) else values)

    names_E = pa.array(index.extensions, pa.string())
    extensions = pa.DictionaryArray.from_arrays(pa.array(index.image_extension_P[pictures_P]), names_E)
    return pa.table(
        {
            "shard": pa.DictionaryArray.from_arrays(pa.array(index.shard_I[rows]), pa.array(names, pa.string())),
            "key": index.keys[rows].cast(pa.string()),
            "text_offset": index.text_offset_I[rows],
            "text_size": index.text_size_I[rows],
            "image_offsets": pictures(index.image_offset_P[pictures_P]),
            "image_sizes_bytes": pictures(index.image_size_P[pictures_P]),
            "image_extensions": pictures(extensions.cast(pa.string())),
            "image_widths": pictures(index.image_width_P[pictures_P]),
            "image_heights": pictures(index.image_height_P[pictures_P]),
            "checksum": index.checksum_I[rows],
            "fault": pa.DictionaryArray.from_arrays(pa.array(index.fault_I[rows]), pa.array(FAULT_NAMES, pa.string())),
        }
    )


class _Content:
    """What an index file holds, read at once or in parts."""

    def __init__(self, file: pq.ParquetFile, metadata: dict, path: Path, url: str | None) -> None:
        self._file, self._metadata, self._path, self._url = file, metadata, path, url
        self._number_of_shard = {entry["path"]: number for number, entry in enumerate(metadata["shards"])}
        self._num_samples = file.metadata.num_rows
        self._number_of_extension: dict[str, int] = {}  # in the order in which they come

    def read(self) -> Columns:
        """All columns, in memory."""
        parts = list(self._parts())
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return {**columns, "extensions": self._extension_names()}

    def expected(self) -> Lengths:
        """Its columns, with the lengths that are known before anything is read."""
        known = {"I": self._num_samples, "I + 1": self._num_samples + 1}
        return {name: (dtype, known.get(length)) for name, (dtype, length, _) in _COLUMNS.items()}

    def recipe(self) -> Recipe:
        """How its columns are mapped; after a first pass, which finds out how long they are."""
        num_pictures = num_letters = 0
        for batch in batches(self._file, ["key", "image_extensions"]):
            num_letters += pc.sum(pc.binary_length(batch.column("key"))).as_py() or 0
            num_pictures += len(self._extension_numbers(batch))
        names = self._extension_names()
        lengths = {
            "I": self._num_samples,
            "P": num_pictures,
            "I + 1": self._num_samples + 1,
            "letters": num_letters,
            "E": len(names),
        }

        def parts() -> Iterator[Columns]:
            yield {"extensions": names}
            yield from self._parts()

        return Recipe(
            columns={name: (dtype, lengths[length]) for name, (dtype, length, _) in _COLUMNS.items()},
            parts=parts,
            check=lambda columns: self.check(self.index(columns)),
        )

    def check(self, index: ShardIndex) -> None:
        """Raises ValueError if an index is not the one that was written."""
        if index.fingerprint != self._metadata["fingerprint"]:
            raise ValueError(
                f"it is damaged: its content has the hash {index.fingerprint}, but it was written with "
                f"{self._metadata['fingerprint']}"
            )

    def index(self, columns: Columns) -> ShardIndex:
        """The index over these columns."""
        columns = dict(columns)
        key_start, letters, names = (columns.pop(name) for name in ("key_start", "letters", "extensions"))
        return ShardIndex(
            shards=tuple(
                Shard(_absolute(entry["path"], self._path.parent, self._url), entry["num_bytes"], entry["num_samples"])
                for entry in self._metadata["shards"]
            ),
            extensions=tuple(json.loads(names.tobytes())),
            keys=pa.LargeStringArray.from_buffers(self._num_samples, pa.py_buffer(key_start), pa.py_buffer(letters)),
            **columns,
            left_out=Counter(self._metadata["left_out"]),
            ignored=Counter(self._metadata["ignored"]),
            other_keys=Counter(self._metadata["other_keys"]),
            path=self._path,
        )

    def _parts(self) -> Iterator[Columns]:
        """The columns, but for the names of extensions."""
        zero = np.zeros(1, np.int64)
        first = {name: np.empty(0, dtype) for name, (dtype, _, _) in _COLUMNS.items() if name != "extensions"}
        yield first | {"key_start": zero, "image_start_I": zero}
        num_letters = num_pictures = 0
        for batch in batches(self._file):
            keys = batch.column("key").cast(pa.large_string())
            key_end, image_end = (
                np.cumsum(lengths.to_numpy(zero_copy_only=False), dtype=np.int64)
                for lengths in (pc.binary_length(keys), batch.column("image_widths").value_lengths())
            )
            yield {
                "key_start": num_letters + key_end,
                "letters": np.frombuffer(string_bytes(keys), np.uint8),
                "image_start_I": num_pictures + image_end,
                "shard_I": codes(batch.column("shard"), self._number_of_shard).astype(np.int32),
                "fault_I": codes(batch.column("fault"), NUMBER_OF_FAULT).astype(np.int8),
                "image_extension_P": self._extension_numbers(batch),
                **{name: _numbers(batch.column(it[2]), it[0]) for name, it in _COLUMNS.items() if it[2]},
            }
            num_letters, num_pictures = num_letters + int(key_end[-1]), num_pictures + int(image_end[-1])

    def _extension_numbers(self, batch: pa.RecordBatch) -> np.ndarray:
        found = batch.column("image_extensions").flatten().dictionary_encode()
        for name in found.dictionary.to_pylist():
            self._number_of_extension.setdefault(name, len(self._number_of_extension))
        return codes(found, self._number_of_extension).astype(np.int16)

    def _extension_names(self) -> np.ndarray:
        return np.frombuffer(json.dumps(list(self._number_of_extension)).encode(), np.uint8)


def _numbers(column: pa.Array, dtype: type[np.generic]) -> np.ndarray:
    values = column.flatten() if isinstance(column, pa.ListArray) else column
    return values.to_numpy(zero_copy_only=False).astype(dtype, copy=False)


def codes(values: pa.Array, number_of: Mapping[str, int]) -> np.ndarray:
    """Numbers of a column of strings.

    Raises:
        ValueError: a value that is none of the names.
    """
    encoded = values if isinstance(values, pa.DictionaryArray) else values.dictionary_encode()
    used = set(np.unique(encoded.indices.to_numpy(zero_copy_only=False)).tolist())
    found = encoded.dictionary.to_pylist()
    unknown = [value for number, value in enumerate(found) if number in used and value not in number_of]
    if unknown:
        raise ValueError(f"it names {unknown[0]!r}, which is none of {', '.join(map(repr, list(number_of)[:20]))}")
    table = np.array([number_of.get(value, 0) for value in found], np.int64)
    return table[encoded.indices.to_numpy(zero_copy_only=False)] if len(encoded) else np.zeros(0, np.int64)


def _absolute(stored: str, folder: Path, url: str | None) -> str:
    if is_url(stored):
        return stored
    # Not urljoin, which knows no s3: and the like.
    return os.path.normpath(folder / stored) if url is None else f"{url.rpartition('/')[0]}/{stored}"
