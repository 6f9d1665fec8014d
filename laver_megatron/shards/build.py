"""From sources to a folder of shards: cuts the samples into slices, and makes each slice's shards in worker processes.

A slice's shards depend on nothing but the slice, so any number of workers, in any order, writes the same bytes.
"""

import hashlib
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from laver_megatron.data.index.faults import FaultLog, SampleFault
from laver_megatron.data.read.record_keys import add_keys
from laver_megatron.runtime.processes import each_in_processes
from laver_megatron.shards.assemble import SampleMaker, load_tokenizer
from laver_megatron.shards.find import open_source
from laver_megatron.shards.ledger import Ledger, record_slice
from laver_megatron.shards.record_source import Found, NoSample, RecordSource, Unwanted
from laver_megatron.shards.report import MakeReport
from laver_megatron.shards.shard_writer import SliceWriter

logger = logging.getLogger(__name__)

OnSamples = Callable[[int], object]  # samples since the last call

_VERSION = 3  # of what is written for given sources and settings
_EARLY_SAMPLES = 10_000  # before so many, only faults that are too many for so many end the work


class UsageError(ValueError):
    """What the user asked for cannot be started; nothing has been written."""


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turns errors raised within, before the work begins, into UsageError."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error


@dataclass(frozen=True)
class MakeSettings:
    """What to make of what.

    Attributes:
        sources: files, or folders of them.
        output: the folder of the shards.
        format_name, images, min_ratings: see `open_source`.
        samples_per_shard, max_shard_bytes: a shard ends at whichever comes first; a record that packs several samples
            counts as one.
        num_workers: processes; 0: the caller does the work.
        max_bad_fraction: share of the samples that may be unusable.
        decode_images: decode every picture to its end.
        images_in_answers: `<image>` in an answer stands for a picture.
        tokenizer: a directory, to count text tokens with.
        mode: `new`, `overwrite` or `resume`.
    """

    sources: Sequence[Path]
    output: Path
    format_name: str | None = None
    images: Path | None = None
    min_ratings: dict[str, float] = field(default_factory=dict)
    samples_per_shard: int = 10_000
    max_shard_bytes: int = 1_000_000_000
    num_workers: int = 0
    max_bad_fraction: float = 0.01
    decode_images: bool = False
    images_in_answers: bool = False
    tokenizer: Path | None = None
    mode: str = "new"

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1 or self.max_shard_bytes < 1 or self.num_workers < 0:
            raise ValueError("--samples-per-shard and --max-shard-bytes are at least 1, --num-workers at least 0")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"--max-bad-fraction is between 0 and 1, not {self.max_bad_fraction}")


def make_shards(settings: MakeSettings) -> MakeReport:
    """Makes the shards, and reports what became of the samples.

    Raises:
        UsageError: sources or settings with which nothing can be started.
        ValueError: unreadable sources, or more unusable samples than allowed; finished shards stay for another try with
            mode `resume`.
    """
    output = settings.output.absolute()
    with usage_errors():
        source = open_source(settings.sources, settings.format_name, settings.images, settings.min_ratings)
        _check_apart(settings.sources, source, output)
        samples = SampleMaker(settings.decode_images, load_tokenizer(settings.tokenizer), settings.images_in_answers)
        ledger = Ledger(output, _fingerprint(settings, source), settings.mode)
    with ledger:
        report = ledger.made(lambda: _stamps(settings, source))
        if report is not None:
            logger.info("%s is complete already", settings.output)
            return report
        work = _Work(settings, ledger, SliceMaker(source, samples, output, settings.max_shard_bytes))
        with tqdm(desc="making shards", unit="sample", disable=not sys.stderr.isatty()) as work.bar:
            work.run()
        work.log.check(settings.max_bad_fraction, work.report.num_seen)
        ledger.finish(work.report, work.num_slices)
        return work.report


def _check_apart(entries: Sequence[Path], source: RecordSource, output: Path) -> None:
    folders = {path.resolve().parent for path in source.paths} | {e.resolve() for e in entries if e.is_dir()}
    if any(output.resolve() == folder for folder in folders):
        raise ValueError(f"--output {output} is where the sources lie; choose another folder")
    if any(entry.is_dir() and output.resolve().is_relative_to(entry.resolve()) for entry in entries):
        raise ValueError(f"--output {output} lies within --source; choose a folder beside it, or name its files")


@dataclass(frozen=True)
class Slice:
    """A run of records. first: number of its first record among all."""

    number: int
    first: int
    references: Sequence[Any]


@dataclass(frozen=True)
class SliceMaker:
    """Makes slices of one source into shards in one folder."""

    source: RecordSource
    samples: SampleMaker
    output: Path
    max_shard_bytes: int

    def make(self, piece: Slice, on_progress: OnSamples) -> MakeReport:
        """Writes a slice's shards and notes them as finished."""
        report = MakeReport()
        stamp = self.source.stamp(piece.references)  # before they are read: what changes meanwhile is noticed
        with SliceWriter(self.output, f"shard-{piece.number:06d}", self.max_shard_bytes) as writer:
            for number, founds in enumerate(self.source.load(piece.references), piece.first):
                for part, found in enumerate(founds):
                    key = f"{number:09d}-{part:03d}" if len(founds) > 1 else f"{number:09d}"
                    self._add(found, key, writer, report, on_progress)
        record_slice(self.output, piece.number, writer.indexes, report, stamp)
        return report

    def _add(self, found: Found, key: str, writer: SliceWriter, report: MakeReport, on_progress: OnSamples) -> None:
        if isinstance(found, NoSample):
            add_keys(report.ignored, Counter(found.ignored))
            return
        if isinstance(found, Unwanted):
            report.num_unwanted += 1
            report.num_dropped_turns += found.num_turns
            return
        try:
            if isinstance(found, SampleFault):
                raise found
            sample = self.samples.make(found, key, report)
        except SampleFault as fault:
            report.add_fault(fault, key)
            return
        writer.write(sample)
        on_progress(1)


class _Work:
    """Work in progress: its counts so far and its progress bar."""

    bar: tqdm

    def __init__(self, settings: MakeSettings, ledger: Ledger, maker: SliceMaker) -> None:
        self.settings, self.ledger, self.maker = settings, ledger, maker
        self.report, self.log = MakeReport(), FaultLog(logger)
        self.num_slices = 0

    def run(self) -> None:
        """Makes all slices that are not there yet."""
        # Threads of Arrow's do not survive a fork.
        remedy = "go on with --resume and fewer --num-workers"
        made = each_in_processes(
            self.maker.make, self._missing_slices(), self.settings.num_workers, self.bar.update, method="spawn",
            remedy=remedy,
        )  # fmt: skip
        for _, report in made:
            self._take(report)

    def _missing_slices(self) -> Iterator[Slice]:
        """Slices of the source that are not finished; those that are, are added to the report."""
        source = self.maker.source
        for piece in _slices(self.settings, source):
            self.num_slices += 1
            report = self.ledger.finished(piece.number, partial(source.stamp, piece.references))
            if report is None:
                yield piece
            else:
                self._take(report)

    def _take(self, report: MakeReport) -> None:
        self.report.add(report)
        num_bytes = self.report.num_image_bytes + self.report.num_text_bytes
        self.bar.set_postfix_str(f"{num_bytes / 1e6:,.0f} MB", refresh=False)
        for fault, count in report.faults.items():
            examples = report.examples.get(fault, [])
            for key, message in examples:
                self.log.add(fault, str(self.settings.output), key, message)
            if count > len(examples):
                self.log.add(fault, str(self.settings.output), "...", "further ones", count - len(examples))
        limit, num_bad, num_seen = self.settings.max_bad_fraction, self.report.faults.total(), self.report.num_seen
        if num_seen >= _EARLY_SAMPLES or num_bad > limit * _EARLY_SAMPLES:
            self.log.check(limit, num_seen)


def _slices(settings: MakeSettings, source: RecordSource) -> Iterator[Slice]:
    references = source.references()
    parts = iter(lambda: list(islice(references, settings.samples_per_shard)), [])
    for number, members in enumerate(parts):
        yield Slice(number, number * settings.samples_per_shard, members)


def _stamps(settings: MakeSettings, source: RecordSource) -> Iterator[str]:
    if source.has_files_apart:
        yield from (source.stamp(piece.references) for piece in _slices(settings, source))


def _fingerprint(settings: MakeSettings, source: RecordSource) -> str:
    """Hash of what determines the shards' bytes: the sources' files, the format's settings, and how shards are cut."""
    files = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in source.paths]
    decisive = {
        "version": _VERSION,
        "format": type(source).__name__,
        "source": source.settings(),
        "files": files,
        "samples_per_shard": settings.samples_per_shard,
        "max_shard_bytes": settings.max_shard_bytes,
        "decode_images": settings.decode_images,
        "images_in_answers": settings.images_in_answers,
        "tokenizer": str(settings.tokenizer.resolve()) if settings.tokenizer else None,
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
