"""Makes the shards of one slice of the samples; runs in worker processes."""

import signal
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laver_megatron.data.batch.processes import end_with_parent
from laver_megatron.data.index.faults import SampleFault
from laver_megatron.data.read.record_keys import add_keys
from laver_megatron.shards.assemble import SampleMaker
from laver_megatron.shards.found import Found, NoSample, Source, Unwanted
from laver_megatron.shards.ledger import record_slice
from laver_megatron.shards.report import Report
from laver_megatron.shards.shard_writer import SliceWriter

Progress = Callable[[int, int], object]  # samples and bytes since it was called last


@dataclass(frozen=True)
class Slice:
    """A run of records. first: number of its first record among all."""

    number: int
    first: int
    references: Sequence[Any]


@dataclass(frozen=True)
class SliceMaker:
    """Makes slices of one source into shards in one folder."""

    source: Source
    samples: SampleMaker
    output: Path
    max_shard_bytes: int

    def make(self, piece: Slice, progress: Progress) -> Report:
        """Writes a slice's shards and notes them as finished."""
        report = Report()
        stamp = self.source.stamp(piece.references)  # before they are read: what changes meanwhile is noticed
        with SliceWriter(self.output, f"shard-{piece.number:06d}", self.max_shard_bytes) as writer:
            for number, founds in enumerate(self.source.load(piece.references), piece.first):
                for part, found in enumerate(founds):
                    key = f"{number:09d}-{part:03d}" if len(founds) > 1 else f"{number:09d}"
                    self._add(found, key, writer, report, progress)
        record_slice(self.output, piece.number, writer.indexes, report, stamp)
        return report

    def _add(self, found: Found, key: str, writer: SliceWriter, report: Report, progress: Progress) -> None:
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
        progress(1, sum(len(content) for _, content in sample.members))


_maker: SliceMaker
_counters: Any  # [samples, bytes] that all workers have written


def start_worker(maker: SliceMaker, counters: Any, parent: int) -> None:
    """Called once in every worker process; parent: the one that it ends with."""
    end_with_parent(parent)
    global _maker, _counters
    _maker, _counters = maker, counters
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers


def make_in_worker(piece: Slice) -> Report:
    """A slice made in a worker process."""
    return _maker.make(piece, _count)


def _count(num_samples: int, num_bytes: int) -> None:
    with _counters.get_lock():
        _counters[0] += num_samples
        _counters[1] += num_bytes
