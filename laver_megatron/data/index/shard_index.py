"""The index of a set of shards: where each sample's bytes lie, how large its pictures are, and whether it can be used.

Letters: I samples, P pictures of all samples, one after the other.

An index is held in columns, about 100 bytes a sample, which are mapped if they are large (mapped.py). It is kept in one
Parquet file (`index.parquet` in a folder of shards) with one row a sample:

    shard            dictionary<string>  relative to the index file's folder, or absolute, or a URL
    key              string
    text_offset, text_size, checksum     of the .json; xxh3_64 of the bytes of the .json and then of each picture
    image_offsets, image_sizes_bytes, image_extensions, image_widths, image_heights
                     lists; widths and heights as seen (after EXIF rotation), 0 x 0 where they cannot be read
    fault            dictionary<string>  "" for a usable sample, else the name of a Fault
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from laver_megatron.data.index.faults import FAULT_NAMES, FAULTS, Fault
from laver_megatron.data.index.members import Member
from laver_megatron.data.read.record_keys import add_keys

# Columns whose values stay the same in every selection of samples.
_ROW_COLUMNS = ("text_offset_I", "text_size_I", "checksum_I", "fault_I")
_PICTURE_COLUMNS = ("image_offset_P", "image_size_P", "image_width_P", "image_height_P")
_PART = 1 << 20  # numbers that are looked at together: large indexes are never copied whole
_MAX_INT32 = (1 << 31) - 1  # in the column of sizes; pictures of so many bytes are never read


@dataclass(frozen=True, slots=True)
class Shard:
    """A tar. path: absolute, as it was named, or a URL; num_samples: its rows in the index."""

    path: str
    num_bytes: int
    num_samples: int

    @property
    def name(self) -> str:
        """The last part of the path, which stays the same when a folder of shards is moved."""
        return self.path.rstrip("/").rpartition("/")[2]


@dataclass(frozen=True, slots=True)
class ShardSample:
    """One sample of a shard. images: its pictures in order (`jpg`, or `0.jpg`, `1.jpg`, ... by number)."""

    shard: str
    key: str
    text: Member
    images: tuple[Member, ...]
    checksum: int
    fault: Fault | None

    @property
    def name(self) -> str:
        """Shard and key, for messages."""
        return f"{self.shard}: {self.key!r}"

    @property
    def members(self) -> tuple[Member, ...]:
        """All files in the order of the checksum."""
        return (self.text, *self.images)


@dataclass(frozen=True)
class ShardIndex:
    """Samples of shards, in order, as columns. Compared by `fingerprint`.

    Attributes:
        shard_I: number in `shards`.
        image_start_I: `[I + 1]`, where each sample's pictures start in the columns `_P`.
        image_extension_P: number in `extensions`.
        fault_I: `Fault.code`, 0 where usable.
        left_out: samples that have no row, by fault.
        ignored: files that belong to no sample, by extension.
        other_keys: unused keys of the records.
        path: of the index's file.
    """

    shards: tuple[Shard, ...]
    extensions: tuple[str, ...]
    shard_I: np.ndarray
    keys: pa.LargeStringArray
    text_offset_I: np.ndarray
    text_size_I: np.ndarray
    image_start_I: np.ndarray
    image_offset_P: np.ndarray
    image_size_P: np.ndarray
    image_extension_P: np.ndarray
    image_width_P: np.ndarray
    image_height_P: np.ndarray
    checksum_I: np.ndarray
    fault_I: np.ndarray
    left_out: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    other_keys: Counter[str] = field(default_factory=Counter)
    path: Path | None = None

    def __len__(self) -> int:
        return len(self.shard_I)

    @property
    def num_images_I(self) -> np.ndarray:
        """Pictures of each sample, int64."""
        return np.diff(self.image_start_I)

    def image_sizes(self, row: int) -> list[tuple[int, int]]:
        """(width, height) in pixels of each picture of a sample, upright."""
        part = self._pictures(row)
        return list(zip(self.image_width_P[part].tolist(), self.image_height_P[part].tolist(), strict=True))

    def sample(self, row: int) -> ShardSample:
        """Everything that reading a sample needs."""
        part = self._pictures(row)
        code = int(self.fault_I[row])
        columns = (self.image_extension_P[part], self.image_offset_P[part], self.image_size_P[part])
        return ShardSample(
            shard=self.shards[self.shard_I[row]].path,
            key=self.key(row),
            text=Member("json", int(self.text_offset_I[row]), int(self.text_size_I[row])),
            images=tuple(
                Member(self.extensions[extension], offset, size)
                for extension, offset, size in zip(*(column.tolist() for column in columns), strict=True)
            ),
            checksum=int(self.checksum_I[row]),
            fault=FAULTS[code - 1] if code else None,
        )

    @cached_property
    def is_by_shard(self) -> bool:
        """Whether the samples are in the order of the shards."""
        return all(bool(np.all(part[1:] >= part[:-1])) for part in _parts(self.shard_I, overlap=1))

    def name(self, row: int) -> tuple[str, str]:
        """(path of the shard, key) of a sample, for messages."""
        return self.shards[self.shard_I[row]].path, self.key(row)

    def key(self, row: int) -> str:
        """A sample's key: a name for messages, never a path."""
        return self.keys[row].as_py()

    @cached_property
    def faults(self) -> Counter[str]:
        """Rows that cannot be used, by fault."""
        counts = _count(self.fault_I, len(FAULT_NAMES)).tolist()
        return Counter({FAULTS[code - 1]: counts[code] for code in range(1, len(counts)) if counts[code]})

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that determines the order and content of the samples, but not of where they lie."""
        digest = xxhash.xxh3_128()
        for shard in self.shards:
            digest.update(f"{len(shard.name)}:{shard.name}".encode())
        # Which number an extension has, and whether unused ones are listed, depends on how the index came about.
        used = np.flatnonzero(_count(self.image_extension_P, len(self.extensions))).tolist()
        ranked = sorted(used, key=self.extensions.__getitem__)
        rank = np.zeros(len(self.extensions), np.int16)
        rank[ranked] = np.arange(len(ranked))
        digest.update("/".join(self.extensions[number] for number in ranked).encode())
        starts = _string_offsets(self.keys)
        columns: list[tuple[np.ndarray, type[np.generic], Callable[[np.ndarray], np.ndarray]]] = [
            (self.shard_I, np.int32, np.asarray),
            (starts, np.int64, np.diff),
            (self.text_size_I, np.int64, np.asarray),
            (self.image_start_I, np.int64, np.diff),
            (self.image_size_P, np.int32, np.asarray),
            (self.image_extension_P, np.int16, rank.__getitem__),
            (self.image_width_P, np.int32, np.asarray),
            (self.image_height_P, np.int32, np.asarray),
            (self.checksum_I, np.uint64, np.asarray),
        ]
        for column, dtype, values in columns:
            for part in _parts(column, overlap=int(values is np.diff)):
                digest.update(np.ascontiguousarray(values(part), dtype=dtype).data)
        for row in flat_nonzero(self.fault_I).tolist():  # by name: numbers of faults are nowhere kept
            digest.update(f"{row}:{FAULT_NAMES[self.fault_I[row]]}".encode())
        digest.update(string_bytes(self.keys))
        return digest.hexdigest()

    def _pictures(self, row: int) -> slice:
        return slice(int(self.image_start_I[row]), int(self.image_start_I[row + 1]))


class IndexRows:
    """The index of one shard as it grows: of each sample its pictures, then its row.

    Attributes:
        keys, faults: of the rows so far; faults as `Fault.code`.
    """

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.faults: list[int] = []
        self._texts: list[tuple[int, int, int]] = []  # offset, size, checksum
        self._starts = [0]  # of each sample's pictures, and the end of the last one's
        self._pictures: list[tuple[int, int, int, int, int]] = []  # offset, size, extension, width, height
        self._extensions: dict[str, int] = {}

    @property
    def num_pictures(self) -> int:
        """Pictures since the last row."""
        return len(self._pictures) - self._starts[-1]

    def add_picture(self, member: Member, size: tuple[int, int]) -> None:
        """A picture of the next row. size: (width, height) in pixels."""
        number = self._extensions.setdefault(member.extension, len(self._extensions))
        self._pictures.append((member.offset, min(member.size, _MAX_INT32), number, *size))

    def add(self, key: str, text: Member, checksum: int, fault: Fault | None = None) -> None:
        """A sample, whose pictures have been added."""
        self.keys.append(key)
        self.faults.append(0 if fault is None else fault.code)
        self._texts.append((text.offset, text.size, checksum))
        self._starts.append(len(self._pictures))

    def finish(self, path: str, num_bytes: int) -> ShardIndex:
        """The index of the shard, which has nothing else in it."""
        pictures = np.array(self._pictures, np.int64).reshape(-1, 5)
        offsets, sizes, checksums = zip(*self._texts, strict=True) if self._texts else ((), (), ())
        return ShardIndex(
            shards=(Shard(path, num_bytes, len(self.keys)),),
            extensions=tuple(self._extensions),
            shard_I=np.zeros(len(self.keys), np.int32),
            keys=pa.array(self.keys, pa.large_string()),
            text_offset_I=np.array(offsets, np.int64),
            text_size_I=np.array(sizes, np.int64),
            image_start_I=np.array(self._starts, np.int64),
            image_offset_P=pictures[:, 0].copy(),
            image_size_P=pictures[:, 1].astype(np.int32),
            image_extension_P=pictures[:, 2].astype(np.int16),
            image_width_P=pictures[:, 3].astype(np.int32),
            image_height_P=pictures[:, 4].astype(np.int32),
            checksum_I=np.array(checksums, np.uint64),
            fault_I=np.array(self.faults, np.int8),
        )


def concatenate(indexes: Sequence[ShardIndex]) -> ShardIndex:
    """One index after the other; a shard that is in several stays in each."""
    assert indexes
    extensions = tuple(dict.fromkeys(extension for index in indexes for extension in index.extensions))
    first_shards = np.cumsum([0] + [len(index.shards) for index in indexes])
    first_images = np.cumsum([0] + [len(index.image_offset_P) for index in indexes])
    renumbered_P, shard_I, starts = [], [], [np.zeros(1, np.int64)]
    for index, first_shard, first_image in zip(indexes, first_shards, first_images, strict=False):
        numbers = np.array([extensions.index(extension) for extension in index.extensions], np.int16)
        renumbered_P.append(numbers[index.image_extension_P])
        shard_I.append(index.shard_I + np.int32(first_shard))
        starts.append(index.image_start_I[1:] + first_image)

    other_keys: Counter[str] = Counter()
    for index in indexes:
        add_keys(other_keys, index.other_keys)

    def joined(name: str) -> Any:
        return np.concatenate([getattr(index, name) for index in indexes])

    return ShardIndex(
        shards=tuple(shard for index in indexes for shard in index.shards),
        extensions=extensions,
        shard_I=np.concatenate(shard_I),
        keys=pa.concat_arrays([index.keys for index in indexes]),
        image_start_I=np.concatenate(starts),
        image_extension_P=np.concatenate(renumbered_P),
        **{name: joined(name) for name in (*_ROW_COLUMNS, *_PICTURE_COLUMNS)},
        left_out=sum((index.left_out for index in indexes), Counter()),
        ignored=sum((index.ignored for index in indexes), Counter()),
        other_keys=other_keys,
    )


def successive(index: ShardIndex, first: int, last: int) -> ShardIndex:
    """The samples of the shards `first` to `last`, of an index in the order of its shards. Columns are views where that
    is possible, so that mapped ones stay so. Samples that were left out are no part of it."""
    rows = slice(*(sum(shard.num_samples for shard in index.shards[:end]) for end in (first, last + 1)))
    pictures = slice(int(index.image_start_I[rows.start]), int(index.image_start_I[rows.stop]))
    shard_I, image_start_I = index.shard_I[rows], index.image_start_I[rows.start : rows.stop + 1]
    return ShardIndex(
        shards=index.shards[first : last + 1],
        extensions=index.extensions,
        shard_I=shard_I - np.int32(first) if first else shard_I,
        keys=index.keys[rows],
        image_start_I=image_start_I - pictures.start if pictures.start else image_start_I,
        image_extension_P=index.image_extension_P[pictures],
        **{name: getattr(index, name)[rows] for name in _ROW_COLUMNS},
        **{name: getattr(index, name)[pictures] for name in _PICTURE_COLUMNS},
    )


def select(index: ShardIndex, rows_I: np.ndarray) -> ShardIndex:
    """The samples of these rows, in this order, over the shards that hold them. Samples that were left out of the index
    are no part of a selection."""
    rows_I = np.asarray(rows_I, np.int64)
    used, shard_I = np.unique(index.shard_I[rows_I], return_inverse=True)
    num_samples = np.bincount(shard_I, minlength=len(used)).tolist()
    shards = [index.shards[number] for number in used]
    num_images_I = index.num_images_I[rows_I]
    image_start_I = np.concatenate([np.zeros(1, np.int64), np.cumsum(num_images_I)])
    # Picture p of the selection is picture p - (its sample's start here) + (its sample's start there) of the index.
    shift_P = np.repeat(index.image_start_I[rows_I] - image_start_I[:-1], num_images_I)
    pictures_P = np.arange(image_start_I[-1]) + shift_P
    return ShardIndex(
        shards=tuple(Shard(s.path, s.num_bytes, count) for s, count in zip(shards, num_samples, strict=True)),
        extensions=index.extensions,
        shard_I=shard_I.astype(np.int32),
        keys=index.keys.take(pa.array(rows_I)),
        image_start_I=image_start_I,
        image_extension_P=index.image_extension_P[pictures_P],
        **{name: getattr(index, name)[rows_I] for name in _ROW_COLUMNS},
        **{name: getattr(index, name)[pictures_P] for name in _PICTURE_COLUMNS},
    )


def _string_offsets(keys: pa.LargeStringArray) -> np.ndarray:
    offsets = np.frombuffer(keys.buffers()[1], np.int64) if len(keys) else np.zeros(1, np.int64)
    return offsets[keys.offset : keys.offset + len(keys) + 1]


def string_bytes(keys: pa.LargeStringArray) -> memoryview:
    """The bytes of all strings, one after the other."""
    offsets, content = _string_offsets(keys), keys.buffers()[2] if len(keys) else None
    return memoryview(content)[offsets[0] : offsets[-1]] if content is not None else memoryview(b"")


def flat_nonzero(values_I: np.ndarray) -> np.ndarray:
    """As np.flatnonzero, with no more memory than the result takes."""
    found = [np.flatnonzero(part) + number * _PART for number, part in enumerate(_parts(values_I))]
    return np.concatenate([np.empty(0, np.int64), *found])


def _count(codes: np.ndarray, num_codes: int) -> np.ndarray:
    """How often each code comes."""
    return sum((np.bincount(part, minlength=num_codes) for part in _parts(codes)), np.zeros(num_codes, np.int64))


def _parts(values: np.ndarray, overlap: int = 0) -> Iterator[np.ndarray]:
    """Views of some values at a time. overlap: of the next part's, which each has at its end."""
    return (values[begin : begin + _PART + overlap] for begin in range(0, len(values) - overlap, _PART))
