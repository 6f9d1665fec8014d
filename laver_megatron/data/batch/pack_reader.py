"""Packs by number: made in worker processes, ahead of the calls that ask for them.

Letters: I sample ids.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

import numpy as np
import torch

from laver_megatron.data.batch.data_spec import DataSpec
from laver_megatron.data.batch.pack_maker import PackBuffer, PackContent, PackMaker, join_packs
from laver_megatron.data.batch.packing import PackBatch
from laver_megatron.data.batch.shared_buffers import SharedBuffers
from laver_megatron.data.index.counts import SampleCounts, count_samples
from laver_megatron.data.index.faults import Fault, FaultLog
from laver_megatron.data.index.opening import open_indexes
from laver_megatron.data.index.shard_index import ShardIndex, flat_nonzero
from laver_megatron.data.plan.plan import PackPlan
from laver_megatron.data.plan.sizes import SampleSizes
from laver_megatron.data.plan.visual_budget import propose_visual_budget
from laver_megatron.data.read.sample_encoder import SampleEncoder
from laver_megatron.data.read.sample_files import open_local
from laver_megatron.encoders import ImagePreprocessor
from laver_megatron.runtime.processes import WorkerPool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_PACKS_A_WORKER = 2  # that are under way or wait to be read, at least


class PackReader:
    """Reads packs of a plan, the same for any number of workers and in any order.

    Args:
        num_workers: processes that make packs; with 0 the caller makes them, and none in advance.
        faults: known so far. Samples that prove bad when they are read are added, each once; their slots stay padding,
            and the rest of their pack stays as planned.
        max_bad_fraction: share of all samples that may be bad, see `check_bad`.
        pixel_dtype: in which pixels are made and handed over, float32 or bfloat16.

    Attributes:
        num_bad_samples: how often a sample was left as padding.
    """

    def __init__(
        self,
        maker: PackMaker,
        plan: PackPlan,
        num_workers: int = 0,
        faults: FaultLog | None = None,
        max_bad_fraction: float = 0.01,
        pixel_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.maker, self.plan, self.max_bad_fraction = maker, plan, max_bad_fraction
        self.faults = FaultLog(logger) if faults is None else faults
        self.num_bad_samples = 0
        self._bad_ids: set[int] = set()
        num_pixels = plan.visual_seq_length * maker.preprocessor.pixels_per_token
        self._pixel_dtype = pixel_dtype
        self._buffers = SharedBuffers(PackBuffer.num_bytes(maker.seq_length, num_pixels, pixel_dtype))
        self._workers = WorkerPool(self._make, num_workers) if num_workers > 0 else None
        self._num_ahead = _PACKS_A_WORKER * num_workers
        self._under_way: dict[int, tuple[int, Future[PackContent]]] = {}  # pack: its buffer, and what will be in it
        self._lent: list[int] = []  # buffers that hold what was read last
        self._last_first_pack: int | None = None

    def read(self, first_pack: int, num_packs: int, micro_batch_size: int) -> list[PackBatch]:
        """Packs `first_pack` to `first_pack + num_packs` as micro-batches of `micro_batch_size`, in order. Their pixels
        are valid until the next call, which reuses their memory.

        Meanwhile the packs of the likely next calls are made: as far ahead of this call as this call is of the previous
        one, which is the global batch for any number of data-parallel ranks.

        Raises:
            ValueError: an image's features do not match its tokens, a sample is not as long as planned, or a worker was
                killed.
            OSError: a shard cannot be opened or read.
        """
        assert num_packs % micro_batch_size == 0, (num_packs, micro_batch_size)
        numbers = range(first_pack, first_pack + num_packs)
        while self._lent:
            self._buffers.give_back(self._lent.pop())
        contents = self._make_now(numbers) if self._workers is None else self._read_ahead(numbers, self._workers)
        for content in contents:
            self._count_bad(content)
        packs = [self._buffer(number) for number in self._lent]
        cuts = [slice(start, start + micro_batch_size) for start in range(0, num_packs, micro_batch_size)]
        return [join_packs(packs[cut], contents[cut]) for cut in cuts]

    @property
    def visual_seq_length(self) -> int:
        """Visual tokens that a pack can hold: as given, or as proposed from the data."""
        return self.plan.visual_seq_length

    @property
    def fingerprint(self) -> str:
        """Changes whenever any pack could: a position counts packs and means nothing on other data. It does not depend
        on where the data lies or how it was named."""
        parts = [self.plan.fingerprint(), *(index.fingerprint for index in self.maker.indexes)]
        return hashlib.sha256("/".join(parts).encode()).hexdigest()[:16]

    def check_bad(self, num_bad: int, num_read: int, found: Mapping[Fault, int]) -> None:
        """Checks the `num_bad` bad samples among the `num_read` that all readers of a run have read: as a share of an
        epoch, or of all that was read if that is more. (Samples known to be bad beforehand are not planned.)

        Raises:
            ValueError: too many, with the table of the faults that the readers have `found`.
        """
        self.faults.check(self.max_bad_fraction, max(self.plan.num_samples, num_read), num_bad, found)

    def close(self) -> None:
        """Ends the workers and drops what they are making."""
        if self._workers is not None:
            self._workers.close()
        self._buffers.close()

    def _make(self, buffer: int, sample_ids: list[int], num_tokens: list[int]) -> PackContent:
        return self.maker.make(sample_ids, num_tokens, self._buffer(buffer))

    def _buffer(self, number: int) -> PackBuffer:
        return PackBuffer(self._buffers.memory(number), self.maker.seq_length, self._pixel_dtype)

    def _task(self, number: int) -> tuple[int, list[int], list[int]]:
        """The arguments of `_make` for a pack."""
        sample_ids = list(self.plan.pack(number))
        return self._buffers.take(), sample_ids, self.plan.sizes(sample_ids)[0].tolist()

    def _make_now(self, numbers: range) -> list[PackContent]:
        contents = []
        for number in numbers:
            task = self._task(number)
            self._lent.append(task[0])
            contents.append(self._make(*task))
        return contents

    def _read_ahead(self, numbers: range, workers: WorkerPool) -> list[PackContent]:
        last, self._last_first_pack = self._last_first_pack, numbers.start
        stride = len(numbers) if last is None or last >= numbers.start else numbers.start - last
        num_calls = max(1, -(-self._num_ahead // len(numbers)))
        ahead = [number + call * stride for call in range(1, num_calls + 1) for number in numbers]
        for number in set(self._under_way).difference(numbers, ahead):  # guessed wrongly
            self._drop(*self._under_way.pop(number))
        for number in (*numbers, *ahead):  # workers take them in this order
            if number not in self._under_way:
                task = self._task(number)
                self._under_way[number] = task[0], workers.submit(*task)
        contents = []
        for number in numbers:
            buffer, future = self._under_way.pop(number)
            self._lent.append(buffer)
            contents.append(workers.result(future))
        return contents

    def _drop(self, buffer: int, future: Future[PackContent]) -> None:
        future.cancel()
        # A worker that has begun goes on writing: the buffer is free when it is done.
        future.add_done_callback(lambda _: self._buffers.give_back(buffer))

    def _count_bad(self, content: PackContent) -> None:
        self.num_bad_samples += len(content.bad)
        for bad in content.bad:
            if bad.sample_id not in self._bad_ids:
                self._bad_ids.add(bad.sample_id)
                self.faults.add(bad.fault, bad.shard, bad.key, f"it stays padding: {bad.detail}")


def open_reader(spec: DataSpec, tokenizer: PreTrainedTokenizerBase, preprocessor: ImagePreprocessor) -> PackReader:
    """Opens the data, counts every sample's tokens, plans, and reports in one line what there is to train on.

    Raises:
        ValueError: missing or damaged data; too many bad samples; a tokenizer that is not Qwen2.5's; no sample that
            fits; nothing to learn from.
    """
    num_workers = max(spec.num_workers, 1)
    encoder = SampleEncoder(tokenizer)
    indexes = open_indexes(spec.paths, num_workers, spec.cache)
    open_shard = open_local if spec.cache is None else spec.cache.open
    faults = FaultLog(logger)
    _add_faults(faults, indexes)
    spare = None if spec.cache is None else spec.cache.folder
    counts = [
        count_samples(index, tokenizer, preprocessor, num_workers, spec.limits, open_shard, faults, spare)
        for index in indexes
    ]
    maker = PackMaker(indexes, encoder, preprocessor, spec.seq_length, spec.limits, open_shard)
    faults.check(spec.max_bad_fraction, maker.num_samples)
    weights = [1.0] * len(indexes) if spec.weights is None else spec.weights
    sources = [
        SampleSizes(part.tokens_I, part.visual_I, index.shard_I, weight)
        for index, part, weight in zip(indexes, counts, weights, strict=True)
    ]
    visual_seq_length = spec.visual_seq_length or propose_visual_budget(
        sources, spec.seq_length, spec.visual_multiple_of
    )
    plan = PackPlan(sources, spec.seq_length, visual_seq_length, spec.seed, spec.window)
    _log_contents(plan, counts, faults, spec.needs_images)
    return PackReader(maker, plan, spec.num_workers, faults, spec.max_bad_fraction, spec.pixel_dtype)


def _add_faults(log: FaultLog, indexes: Sequence[ShardIndex]) -> None:
    """Adds the faults that indexing found, logged with shard and key."""
    for index in indexes:
        rows_I = flat_nonzero(index.fault_I)
        log.add_rows(rows_I, index.fault_I[rows_I], index.name)
    for index in indexes:
        log.counts.update({Fault(name): count for name, count in index.left_out.items()})


def _log_contents(plan: PackPlan, counts: Sequence[SampleCounts], faults: FaultLog, needs_images: bool) -> None:
    """Logs what there is to train on.

    Raises:
        ValueError: nothing to learn from.
    """
    # Of the samples that take part: images, labels, tokens, visual tokens, turns that were dropped, samples they miss.
    totals = np.zeros(6, np.int64)
    for rows, part in zip(plan.rows, counts, strict=True):
        columns = part.images_I, part.labels_I, part.tokens_I, part.visual_I, part.dropped_I
        for rows_N in rows.chunks():
            totals[:5] += [column_I[rows_N].sum(dtype=np.int64) for column_I in columns]
            totals[5] += np.count_nonzero(part.dropped_I[rows_N])
    images, labels, tokens, visual, dropped, num_shortened = totals.tolist()
    if dropped:
        logger.info("%d samples lose their last %d turns: they were too long", num_shortened, dropped)
    skipped = Counter({str(fault): count for fault, count in faults.counts.items()}) + plan.skipped
    logger.info(
        "data: %d samples, %d images, %d tokens (%d visual), %s%d packs in the first epoch; skipped: %s",
        plan.num_fitting,
        images,
        tokens,
        visual,
        "" if plan.num_windows == 1 else "about ",  # one window is packed now, the others when they are needed
        plan.estimate_num_packs(),
        ", ".join(f"{count} ({reason})" for reason, count in skipped.items()) or "none",
    )
    if not labels:
        raise ValueError(
            f"none of the {plan.num_fitting} samples that fit has an answer to learn from (an assistant's turn)"
        )
    if needs_images and not images:
        raise ValueError(
            f"none of the {plan.num_fitting} samples that fit has an image, so LaVer has nothing to reconstruct; "
            "raise --seq-length or --visual-seq-length, look at the data, or train with --no-laver"
        )
