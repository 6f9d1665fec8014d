"""How many tokens each sample becomes: counted once for a tokenizer and an encoder, and stored beside the index.

Letters: I samples of one index.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from filelock import FileLock
from tqdm import tqdm

from laver_megatron.data.index import mapped
from laver_megatron.data.index.faults import FAULT_NAMES, Fault, FaultLog, SampleFault
from laver_megatron.data.index.index_file import NUMBER_OF_FAULT, batches, codes, is_url, open_parquet, write_table
from laver_megatron.data.index.mapped import Columns, Recipe, map_columns
from laver_megatron.data.index.shard_index import ShardIndex, flat_nonzero
from laver_megatron.data.read.conversations import parse_conversation
from laver_megatron.data.read.sample_encoder import SampleEncoder
from laver_megatron.data.read.sample_files import OpenShard, SampleFiles, open_local
from laver_megatron.encoders import ImagePreprocessor
from laver_megatron.objective.language import IGNORE_LABEL
from laver_megatron.runtime.processes import map_in_processes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Limits = tuple[int, int] | None  # tokens and visual tokens that longer samples are shortened to

_SAMPLES_A_TASK = 1000
_METADATA_KEY = b"laver_counts"
_VERSION = 3  # of what is counted, and how


@dataclass(frozen=True)
class SampleCounts:
    """What each sample becomes; int32 `[I]`.

    Attributes:
        tokens_I: tokens; 0 if the sample cannot be used.
        visual_I: visual tokens among them.
        images_I: images.
        labels_I: tokens with a label.
        dropped_I: turns removed because the sample was too long.
        fault_I: `Fault.code` as int8, 0 where usable; includes the faults of the index.
    """

    tokens_I: np.ndarray
    visual_I: np.ndarray
    images_I: np.ndarray
    labels_I: np.ndarray
    dropped_I: np.ndarray
    fault_I: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens_I)


_TYPES = {column.name: np.int8 if column.name == "fault_I" else np.int32 for column in fields(SampleCounts)}


def count_samples(
    index: ShardIndex,
    tokenizer: PreTrainedTokenizerBase,
    preprocessor: ImagePreprocessor,
    num_workers: int,
    limits: Limits = None,
    open_shard: OpenShard = open_local,
    log: FaultLog | None = None,
    spare: Path | None = None,
) -> SampleCounts:
    """The counts of an index, from the file beside it if they have been counted before.

    Without an index file, or in a folder that cannot be written to, everything is counted again each time.

    Args:
        limits: (tokens, visual tokens) to which `SampleEncoder.encode` shortens longer samples.
        log: receives the faults that the index does not have, with details if they are counted now.
        spare: a folder for the columns of a large index (mapped.py) if its own cannot be written to.

    Raises:
        ValueError: a tokenizer that is not Qwen2.5's; a worker process that was killed.
    """
    log = FaultLog(logger) if log is None else log
    counter = _Counter(index, SampleEncoder(tokenizer), preprocessor, limits, open_shard)
    if index.path is None:
        return _count(counter, num_workers, log)
    path = index.path.with_name(f"counts-{_settings_hash(index, tokenizer, preprocessor, limits)}.parquet")
    if (counts := _kept_counts(path, index, log, spare)) is not None:
        return counts
    try:
        # Several readers start together: one counts, the others wait.
        with FileLock(path.with_name(f".{path.name}.lock")):
            if (counts := _kept_counts(path, index, log, spare)) is not None:
                return counts
            counts = _count(counter, num_workers, log)
            # A shard that is being damaged or replaced is not remembered.
            if not ((counts.fault_I == Fault.damaged_shard.code) & (index.fault_I == 0)).any():
                write_counts(counts, path)
                counts = read_counts(path, len(index), spare)  # mapped, if there are many
    except OSError as error:
        logger.warning("the counts of %s cannot be kept beside it: %s", index.path, error)
        if counts is None:
            counts = _count(counter, num_workers, log)
    return counts


def _kept_counts(path: Path, index: ShardIndex, log: FaultLog, spare: Path | None) -> SampleCounts | None:
    """The stored counts; None if there are none or the file is damaged."""
    if not path.is_file():
        return None
    try:
        counts = read_counts(path, len(index), spare)
    except ValueError as error:
        logger.warning("%s", error)
        return None
    rows_I = flat_nonzero(counts.fault_I)
    rows_I = rows_I[index.fault_I[rows_I] == 0]
    log.add_rows(rows_I, counts.fault_I[rows_I], index.name)
    return counts


def _count(counter: _Counter, num_workers: int, log: FaultLog) -> SampleCounts:
    index = counter.index
    tasks = [range(start, min(start + _SAMPLES_A_TASK, len(index))) for start in range(0, len(index), _SAMPLES_A_TASK)]
    hidden = not sys.stderr.isatty()
    with tqdm(total=len(index), desc="counting tokens", unit="sample", disable=hidden, leave=False) as bar:
        parts = map_in_processes(counter.count, tasks, num_workers, bar.update)
    for _, faults in parts:
        for row, fault, detail in faults:
            log.add(fault, index.shards[index.shard_I[row]].path, index.key(row), detail)
    columns = np.concatenate([columns for columns, _ in parts]) if parts else np.zeros((0, 6), np.int32)
    tokens_I, visual_I, images_I, labels_I, dropped_I, fault_I = map(np.ascontiguousarray, columns.T)
    return SampleCounts(tokens_I, visual_I, images_I, labels_I, dropped_I, fault_I.astype(np.int8))


class _Counter:
    def __init__(
        self,
        index: ShardIndex,
        encoder: SampleEncoder,
        preprocessor: ImagePreprocessor,
        limits: Limits,
        open_shard: OpenShard,
    ) -> None:
        self.index, self._encoder, self._preprocessor, self._limits = index, encoder, preprocessor, limits
        self._files = SampleFiles(open_shard)

    def count(self, rows: range, progress: Callable[[int], object]) -> tuple[np.ndarray, list[tuple[int, Fault, str]]]:
        """int32 `[rows, 6]`: the columns of SampleCounts; and the faults that are found here (row, fault, detail)."""
        columns = np.zeros((len(rows), 6), np.int32)
        faults = []
        for place, row in enumerate(rows):
            code = self.index.fault_I[row]
            if code:
                columns[place, 5] = code
                continue
            try:
                columns[place, :5] = self._count_one(row)
            except SampleFault as error:
                columns[place, 5] = error.fault.code
                faults.append((row, error.fault, str(error)))
        progress(len(rows))
        return columns, faults

    def _count_one(self, row: int) -> tuple[int, int, int, int, int]:
        sample = self.index.sample(row)
        shard = self.index.shards[self.index.shard_I[row]]
        if is_url(shard.path):  # all of it: an old copy can hold another text at the same place
            content = self._files.read(shard, sample)[0]
        else:
            content = self._files.read_member(shard, sample.text)
        try:
            messages = parse_conversation(content, len(sample.images), sample.key).messages
        except SampleFault as error:  # when it was indexed it was sound
            raise SampleFault(Fault.damaged_shard, f"the shard has changed since it was indexed: {error}") from error
        grids = [self._preprocessor.grid(*size) for size in self.index.image_sizes(row)]
        try:
            encoded = self._encoder.encode(messages, grids, sample.key, self._limits)
        except ValueError as error:  # image tokens that do not match the images, whether spelt out or not
            raise SampleFault(Fault.image_count, str(error)) from error
        num_labels = int((encoded.labels_T != IGNORE_LABEL).sum())
        num_dropped = encoded.num_dropped_turns
        return len(encoded), encoded.num_visual_tokens, len(encoded.grids), num_labels, num_dropped


def _settings_hash(
    index: ShardIndex, tokenizer: PreTrainedTokenizerBase, preprocessor: ImagePreprocessor, limits: Limits
) -> str:
    """Identifies everything that the counts depend on."""
    digest = xxhash.xxh3_128()
    template = str(tokenizer.chat_template)
    tokens = tokenizer.backend_tokenizer.to_str()
    for part in (_VERSION, index.fingerprint, tokens, template, preprocessor.settings, limits):
        digest.update(f"{len(str(part))}:{part}".encode())
    return digest.hexdigest()[:16]


def write_counts(counts: SampleCounts, path: Path) -> None:
    """Writes counts, atomically."""
    columns = {field.name: pa.array(getattr(counts, field.name)) for field in fields(counts)}
    columns["fault_I"] = pa.DictionaryArray.from_arrays(columns["fault_I"], pa.array(FAULT_NAMES, pa.string()))
    table = pa.table({name.removesuffix("_I"): column for name, column in columns.items()})
    write_table(table.replace_schema_metadata({_METADATA_KEY: json.dumps({"version": _VERSION}).encode()}), path)


def read_counts(path: Path, num_samples: int, spare: Path | None = None) -> SampleCounts:
    """Counts from their file, mapped if there are many.

    Args:
        spare: a folder for the mapped columns if the file's own cannot be written to.

    Raises:
        ValueError: it is damaged, of another version, or of another number of samples.
    """
    try:
        with open_parquet(path) as file:
            metadata = json.loads((file.schema_arrow.metadata or {}).get(_METADATA_KEY, b"{}"))
            version = metadata.get("version", 2)  # which the first files of that version do not say
            if version != _VERSION:
                raise ValueError(f"they are of version {version}, not {_VERSION}")
            if file.metadata.num_rows != num_samples:
                raise ValueError(f"it has {file.metadata.num_rows} rows for {num_samples} samples")
            columns = None
            if num_samples >= mapped.SMALLEST:
                lengths = {name: (dtype, num_samples) for name, dtype in _TYPES.items()}
                recipe = Recipe(lengths, lambda: _parts(file))
                columns = map_columns(path, f"counts {FAULT_NAMES}", lengths, lambda: recipe, spare)
            if columns is None:
                parts = [{name: np.empty(0, dtype) for name, dtype in _TYPES.items()}, *_parts(file)]
                columns = {name: np.concatenate([part[name] for part in parts]) for name in _TYPES}
        return SampleCounts(**columns)
    except (ValueError, KeyError) as error:
        raise ValueError(f"the counts {path} cannot be used ({error}); the samples are counted again") from error


def _parts(file: pq.ParquetFile) -> Iterator[Columns]:
    for batch in batches(file):
        part = {
            name: batch.column(name.removesuffix("_I")).to_numpy(zero_copy_only=False).astype(dtype, copy=False)
            for name, dtype in _TYPES.items()
            if name != "fault_I"
        }
        yield {**part, "fault_I": codes(batch.column("fault"), NUMBER_OF_FAULT).astype(np.int8)}
