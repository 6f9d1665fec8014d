"""Parquet files with the pictures inside, as FineVision and LLaVA-OneVision-Data are published.

FineVision: `images` (list of {bytes, path}), `texts` (list of {user, assistant}), `source`, and for every turn of
`texts` ratings from 1 to 5. LLaVA-OneVision-Data: `id`, `image` ({bytes, path}), `conversations`, `data_source`.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from laver_megatron.data.index.faults import Fault, SampleFault
from laver_megatron.data.index.members import MAX_PICTURE_BYTES
from laver_megatron.data.read.record_keys import REFUSED_KEYS, USED_KEYS, is_nothing, named_pictures
from laver_megatron.shards.record_source import Found, FoundSample, RecordSource, Unwanted, identity, origin

# What may be asked for, and the column that answers it.
RATINGS = {
    "relevance": "relevance_ratings",
    "image_correspondence": "image_correspondence_ratings",
    "visual_dependency": "visual_dependency_ratings",
    "formatting": "formatting_ratings",
}
_CONVERSATIONS = ("conversations", "messages")
_BATCH_ROWS = 32  # rows held at once: a picture can have megabytes

Reference = tuple[int, int, int]  # number of the file, of the row group, of the row in it


class ParquetSource(RecordSource):
    """Parquet files in FineVision's or LLaVA-OneVision-Data's columns.

    Args:
        min_ratings: {a key of RATINGS: minimum}; a turn that is rated lower, or not at all, is dropped.

    Raises:
        ValueError: a file has neither set of columns, or lacks a rating that is asked for.
    """

    def __init__(self, paths: Sequence[Path], min_ratings: Mapping[str, float]) -> None:
        self.paths = paths
        self.min_ratings = dict(min_ratings)
        self._wanted = {"texts", *USED_KEYS, *REFUSED_KEYS, *(RATINGS[key] for key in min_ratings)}
        for path in paths:
            self._check(path)

    def references(self) -> Iterator[Reference]:
        for number, path in enumerate(self.paths):
            metadata = parquet.read_metadata(path)
            for group in range(metadata.num_row_groups):
                for row in range(metadata.row_group(group).num_rows):
                    yield number, group, row

    def load(self, references: Sequence[Reference]) -> Iterator[list[Found]]:
        for (number, group), members in groupby(references, key=lambda reference: reference[:2]):
            unread = tuple(sorted(_filled_columns(self.paths[number], group) - self._wanted))
            rows = [row for *_, row in members]
            assert rows == list(range(rows[0], rows[-1] + 1)), "references are runs of rows"
            for row, values in zip(rows, self._rows(self.paths[number], group, rows[0], len(rows)), strict=True):
                name = f"{self.paths[number].name}: row {row} of row group {group}"
                try:
                    yield [self._sample(values, unread, name)]
                except SampleFault as fault:
                    yield [fault]

    def settings(self) -> dict[str, object]:
        return {"min_ratings": self.min_ratings}

    def _check(self, path: Path) -> None:
        try:
            names = set(parquet.read_schema(path).names)
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"{path} is not a readable Parquet file: {error}") from error
        if "texts" not in names and not names.intersection(_CONVERSATIONS):
            raise ValueError(
                f"{path} has the columns {', '.join(sorted(names))}; expected `images` and `texts` (FineVision) or "
                "`image` and `conversations` (LLaVA-OneVision-Data)"
            )
        missing = [key for key in self.min_ratings if RATINGS[key] not in names]
        if missing:
            options = ", ".join(f"--min-{key.replace('_', '-')}" for key in missing)
            raise ValueError(f"{path} has no column {RATINGS[missing[0]]}; leave out {options}")

    def _rows(self, path: Path, group: int, first: int, count: int) -> Iterator[dict[str, Any]]:
        """Rows of a row group as dictionaries, a few in memory at a time."""
        with parquet.ParquetFile(path, buffer_size=1 << 20) as file:
            columns = [name for name in file.schema_arrow.names if name in self._wanted]
            position = 0
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False):
                start, stop = max(first - position, 0), min(first + count - position, len(batch))
                if start < stop:
                    yield from batch.slice(start, stop - start).to_pylist()
                position += len(batch)
                if position >= first + count:
                    return

    def _sample(self, values: dict[str, Any], unread: tuple[str, ...], name: str) -> Found:
        document = {key: value for key, value in values.items() if key in USED_KEYS or key in REFUSED_KEYS}
        num_dropped = 0
        if values.get("texts"):
            turns = self._wanted_turns(values)
            num_dropped = len(values["texts"]) - len(turns) // 2
            if not turns:
                return Unwanted(num_dropped)
            beside = tuple(f"{key} beside texts" for key in _CONVERSATIONS if not is_nothing(values.get(key)))
            document, unread = {**document, "conversations": turns, "messages": None}, unread + beside
        pictures = tuple(_picture(cell, name) for cell in named_pictures(document, name))
        return FoundSample(name, identity(values), document, pictures, origin(values), num_dropped, unread)

    def _wanted_turns(self, values: dict[str, Any]) -> list[dict[str, Any]]:
        """FineVision's turns as messages, without those rated below what is asked for."""
        turns = []
        for number, text in enumerate(values["texts"]):
            ratings = [(_rating(values[RATINGS[key]], number), least) for key, least in self.min_ratings.items()]
            if all(rating is not None and rating >= least for rating, least in ratings):
                marks = dict(text or {})  # what else it says is the answer's
                turns.append({"role": "user", "content": marks.pop("user", None)})
                answer = marks.pop("assistant", None)
                turns.append({**marks, "role": "assistant", "content": answer})
        return turns


def _filled_columns(path: Path, group: int) -> set[str]:
    """Columns that are not null throughout a row group, as far as the file's statistics say."""
    footer = parquet.read_metadata(path)
    metadata, schema = footer.row_group(group), footer.schema.to_arrow_schema()
    names = set()
    for column in (metadata.column(number) for number in range(metadata.num_columns)):
        statistics = column.statistics
        is_null = statistics is not None and statistics.has_null_count and statistics.null_count == metadata.num_rows
        names |= set() if is_null else {column.path_in_schema.partition(".")[0]}
    return {name for name in names if not pyarrow.types.is_null(schema.field(name).type)}


def _rating(ratings: list[float | None] | None, number: int) -> float | None:
    return ratings[number] if ratings is not None and number < len(ratings) else None


def _picture(cell: object, name: str) -> bytes:
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(content, bytes) or not content:
        raise SampleFault(Fault.unreadable_image, f"{name}: a picture without bytes; only pictures inside are read")
    if len(content) > MAX_PICTURE_BYTES:
        message = f"{name}: a picture of {len(content):,} bytes; at most {MAX_PICTURE_BYTES:,} are read"
        raise SampleFault(Fault.image_too_large, message)
    return content
