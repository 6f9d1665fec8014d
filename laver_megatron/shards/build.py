"""From sources to a folder of shards: cuts the samples into slices, and has worker processes make each slice's shards.

What a slice's shards hold depends on nothing but the slice, so that any number of workers, in any order, writes the
same bytes.
"""

import hashlib
import json
import logging
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from laver_megatron.data.index.faults import FaultLog
from laver_megatron.shards.assemble import SampleMaker, load_tokenizer
from laver_megatron.shards.find import open_source
from laver_megatron.shards.found import Source
from laver_megatron.shards.ledger import Ledger
from laver_megatron.shards.report import Report
from laver_megatron.shards.slices import Slice, SliceMaker, make_in_worker, start_worker

logger = logging.getLogger(__name__)

_VERSION = 2  # of what is written for given sources and settings
_POLL_SECONDS = 0.5
_SLICES_AHEAD = 2  # a worker, so that none waits while the sources are read
_EARLY_SAMPLES = 10_000  # before so many, only faults that are too many for so many end the work


class UsageError(ValueError):
    """What the user asked for cannot be begun: something must be asked for in another way."""


@contextmanager
def usage_errors() -> Iterator[None]:
    """Makes what goes wrong within, before the work begins, a UsageError."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error


@dataclass(frozen=True)
class MakeSettings:
    """What to make of what.

    sources: files, or folders of them. output: the folder of the shards. format_name, images, min_ratings: see
    open_source. samples_per_shard, max_shard_bytes: a shard ends at whichever comes first; records that pack several
    samples count as one. num_workers: processes; 0 works in the caller. max_bad_fraction: of the samples may be
    unusable. decode_images: decode every picture to its end. images_in_answers: `<image>` in an answer stands for a
    picture. tokenizer: a directory, to count text tokens with.
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


def make_shards(settings: MakeSettings) -> Report:
    """Makes the shards, and says what became of the samples.

    Raises:
        UsageError: sources or settings with which nothing can be begun.
        ValueError: unreadable sources, or more unusable samples than are allowed; finished shards stay for another
            try with mode `resume`.
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


def _check_apart(entries: Sequence[Path], source: Source, output: Path) -> None:
    folders = {path.resolve().parent for path in source.paths} | {e.resolve() for e in entries if e.is_dir()}
    if any(output.resolve() == folder for folder in folders):
        raise ValueError(f"--output {output} is where the sources lie; choose another folder")
    if any(entry.is_dir() and output.resolve().is_relative_to(entry.resolve()) for entry in entries):
        raise ValueError(f"--output {output} lies within --source; choose a folder beside it, or name its files")


class _Work:
    """The work under way: what has been reported, and what workers are busy with."""

    bar: tqdm

    def __init__(self, settings: MakeSettings, ledger: Ledger, maker: SliceMaker) -> None:
        self.settings, self.ledger, self.maker = settings, ledger, maker
        self.report, self.log = Report(), FaultLog(logger)
        self.num_slices = 0
        self._num_bytes = 0

    def run(self) -> None:
        """Makes all slices that are not there yet."""
        if self.settings.num_workers == 0:
            for piece in self._missing_slices():
                self._take(self.maker.make(piece, self._show))
            return
        context = multiprocessing.get_context("spawn")  # threads of Arrow's do not survive a fork
        counters = context.Array("q", 2)
        initial = (self.maker, counters, os.getpid())
        try:
            with ProcessPoolExecutor(self.settings.num_workers, context, start_worker, initial) as pool:
                try:
                    self._run_in(pool, counters)
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        except BrokenProcessPool as error:
            raise ValueError(
                f"one of {self.settings.num_workers} worker processes was killed (out of memory?); go on with --resume "
                "and fewer --num-workers"
            ) from error

    def _run_in(self, pool: ProcessPoolExecutor, counters: Any) -> None:
        waiting: set[Future[Report]] = set()
        shown = [0, 0]
        slices = self._missing_slices()
        while True:
            for piece in islice(slices, _SLICES_AHEAD * self.settings.num_workers - len(waiting)):
                waiting.add(pool.submit(make_in_worker, piece))
            if not waiting:
                return
            done, waiting = wait(waiting, _POLL_SECONDS, FIRST_COMPLETED)
            now = counters[:]
            self._show(now[0] - shown[0], now[1] - shown[1])
            shown = now
            for future in done:
                self._take(future.result())

    def _missing_slices(self) -> Iterator[Slice]:
        """Slices of the source, less those that were finished earlier, which are added to the report."""
        source = self.maker.source
        for piece in _slices(self.settings, source):
            self.num_slices += 1
            report = self.ledger.finished(piece.number, partial(source.stamp, piece.references))
            if report is None:
                yield piece
            else:
                self._take(report)

    def _take(self, report: Report) -> None:
        self.report.add(report)
        for fault, count in report.faults.items():
            examples = report.examples.get(fault, [])
            for key, message in examples:
                self.log.add(fault, str(self.settings.output), key, message)
            if count > len(examples):
                self.log.add(fault, str(self.settings.output), "...", "further ones", count - len(examples))
        limit, num_bad, num_seen = self.settings.max_bad_fraction, self.report.faults.total(), self.report.num_seen
        if num_seen >= _EARLY_SAMPLES or num_bad > limit * _EARLY_SAMPLES:
            self.log.check(limit, num_seen)

    def _show(self, num_samples: int, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        self.bar.set_postfix_str(f"{self._num_bytes / 1e6:,.0f} MB", refresh=False)
        self.bar.update(num_samples)


def _slices(settings: MakeSettings, source: Source) -> Iterator[Slice]:
    references = source.references()
    parts = iter(lambda: list(islice(references, settings.samples_per_shard)), [])
    for number, members in enumerate(parts):
        yield Slice(number, number * settings.samples_per_shard, members)


def _stamps(settings: MakeSettings, source: Source) -> Iterator[str]:
    if source.has_files_apart:
        yield from (source.stamp(piece.references) for piece in _slices(settings, source))


def _fingerprint(settings: MakeSettings, source: Source) -> str:
    """Hash of what decides the shards' bytes: the sources' files, the format's settings, and how shards are cut."""
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
