"""The global batch of one step on one rank: which packs, which masks, which pixels, and the counts of all.

Letters: M micro-batches, B packs of a micro-batch, S tokens of a pack.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.profiler import record_function

from laver_megatron.config.fields import Config
from laver_megatron.data.batch.broadcast import scatter_pixels, share_metadata
from laver_megatron.data.batch.pack_reader import PackReader
from laver_megatron.data.batch.packing import PackBatch
from laver_megatron.data.index.faults import FAULTS, Fault
from laver_megatron.data.plan.plan import PlanMark
from laver_megatron.flops.encoder import BY_TOKENS, ImageCost
from laver_megatron.objective.language import IGNORE_LABEL
from laver_megatron.objective.masking import mask_visual_tokens
from laver_megatron.runtime.ranks import RaisedByAll


@dataclass(frozen=True)
class GlobalCounts:
    """What a global batch holds over all data-parallel ranks, padding excluded.

    Attributes:
        labels: tokens with a label.
        masked: tokens hidden from the reconstruction stream.
        samples, bad_samples: samples that were read; samples that were planned and proved bad.
        language_span_area: (query, key) pairs attended to in the language stream.
        image_span_area: the same within images.
        image_window_area: the same within the encoder's windows; 0 if it has none.
    """

    labels: int
    masked: int
    images: int
    visual_tokens: int
    tokens: int
    samples: int
    bad_samples: int
    language_span_area: int
    image_span_area: int
    image_window_area: int


@dataclass(frozen=True)
class GlobalBatch:
    """This rank's share of a step. pixels: per micro-batch, on the first pipeline stage only."""

    packs: list[PackBatch]
    masked: list[Tensor]
    pixels: list[list[Tensor]] | None
    counts: GlobalCounts


def count(
    packs: list[PackBatch],
    masked: list[Tensor],
    areas: Callable[[PackBatch], tuple[int, int, int]],
    device: torch.device,
    faults: Counter[Fault] | None = None,
) -> tuple[GlobalCounts, Counter[Fault]]:
    """Counts this rank's packs and sums over the data-parallel group, once a step, before the schedule runs.

    Args:
        faults: what this rank's reader has found since the last call; summed along with the counts.
    """
    num_counts = len(fields(GlobalCounts))
    local = torch.zeros(num_counts + len(FAULTS), dtype=torch.int64)
    if faults:
        local[num_counts:] = torch.tensor([faults[fault] for fault in FAULTS])
    for pack, masked_BS in zip(packs, masked, strict=True):
        local[:num_counts] += torch.tensor(
            [
                (pack.labels_BS != IGNORE_LABEL).sum(),
                masked_BS.sum(),
                (pack.image_BS.amax(1) + 1).sum(),
                (pack.image_BS >= 0).sum(),
                (pack.document_BS >= 0).sum(),
                (pack.document_BS.amax(1) + 1).sum(),
                num_bad_samples(pack),
                *areas(pack),
            ]
        )
    local = local.to(device)
    dist.all_reduce(local, group=parallel_state.get_data_parallel_group())
    totals = local.tolist()
    return GlobalCounts(*totals[:num_counts]), +Counter(dict(zip(FAULTS, totals[num_counts:], strict=True)))


def num_bad_samples(packs: PackBatch) -> int:
    """Samples whose slots are padding because they proved bad."""
    bad_BS = (packs.document_BS < 0) & (packs.sample_id_BS >= 0)
    return sum(len(sample_id_S[bad_S].unique()) for sample_id_S, bad_S in zip(packs.sample_id_BS, bad_BS, strict=True))


class BatchSource:
    """Turns a position (packs consumed so far) into the global batch there, the same for every layout."""

    def __init__(
        self,
        config: Config,
        reader: PackReader | None,
        areas: Callable[[PackBatch], tuple[int, int, int]],
        dtype: torch.dtype,
        device: torch.device,
        image_cost: ImageCost = BY_TOKENS,
    ) -> None:
        self.config, self.reader, self.areas, self.dtype, self.device = config, reader, areas, dtype, device
        self.image_cost = image_cost
        # Rank 0 reads; what it reads is told to all, so that all can compare it with a checkpoint's.
        self.fingerprint = str(_from_rank_0(None if reader is None else reader.fingerprint))
        if reader is not None and reader.fingerprint != self.fingerprint:
            raise ValueError(
                f"this rank's data have the fingerprint {reader.fingerprint}, those of rank 0 {self.fingerprint}: the "
                "indexes or shards under --data-path are not the same on all nodes"
            )
        self.num_samples = self.num_bad_samples = 0  # read so far, on all ranks, since the run began
        self._num_bad_checked = 0
        self._reported_faults = Counter[Fault]() if reader is None else Counter(reader.faults.counts)
        self.faults = Counter[Fault]()  # what all readers have found since this start; on ranks that read
        self.wait_seconds = 0.0  # for the reader, in the last batch; 0 on ranks that do not read
        self.packs_per_rank = config.data.global_batch_size // parallel_state.get_data_parallel_world_size()

    def mark(self, first_pack: int) -> dict[str, Any]:
        """What `resume_from` needs to read from `first_pack` without planning what comes before. Collective."""
        return _from_rank_0(None if self.reader is None else asdict(self.reader.plan.mark(first_pack)))

    def resume_from(self, mark: dict[str, Any], num_good_samples: int = 0, num_bad_samples: int = 0) -> None:
        """Sets the position of an earlier run.

        Args:
            mark: of `mark`; without one, all packs before the position are planned again.
            num_good_samples, num_bad_samples: read before; they count towards the limit of bad samples.

        Raises:
            ValueError: the mark is damaged or belongs to other data.
        """
        self.num_samples, self.num_bad_samples = num_good_samples + num_bad_samples, num_bad_samples
        if self.reader is not None and mark:
            self.reader.plan.resume_from(PlanMark(**mark))

    def close(self) -> None:
        """Ends the reader's processes."""
        if self.reader is not None:
            self.reader.close()

    @record_function("data wait")
    def at(self, first_pack: int, *, mask_ratio: float, step: int) -> GlobalBatch:
        """The batch of packs `first_pack` to `first_pack + global_batch_size`, of which each data-parallel rank takes a
        contiguous part. Without LaVer nothing is masked.

        Raises:
            RaisedByAll: too many samples have proved bad, with the table of faults of all readers.
            ValueError, OSError: see `PackReader.read`; on one rank alone.
        """
        config = self.config
        packs = masked = None
        if self.reader is not None:
            start = first_pack + parallel_state.get_data_parallel_rank() * self.packs_per_rank
            started = time.perf_counter()
            packs = self.reader.read(start, self.packs_per_rank, config.data.micro_batch_size)
            self.wait_seconds = time.perf_counter() - started
            masked = [mask_pack(pack, config, mask_ratio, step) for pack in packs]
        num_micro = self.packs_per_rank // config.data.micro_batch_size
        shape = (num_micro, config.data.micro_batch_size, config.data.seq_length)
        packs, masked = share_metadata(packs, masked, shape, self.device)
        pixels = None
        if parallel_state.is_pipeline_first_stage(ignore_virtual=True):
            pixels = scatter_pixels(packs, self.dtype, self.device, self.image_cost)
        counts, faults = count(packs, masked, self.areas, self.device, self._new_faults())
        self.num_samples += counts.samples + counts.bad_samples
        self.num_bad_samples += counts.bad_samples
        self.faults += faults
        if self.num_bad_samples > self._num_bad_checked:  # the same on all ranks
            self._num_bad_checked = self.num_bad_samples
            if problem := _from_rank_0(self._bad_samples_problem()):
                raise RaisedByAll(problem)
        return GlobalBatch(packs, masked, pixels, counts)

    def _bad_samples_problem(self) -> str:
        """That too many samples are bad, on ranks that read; empty elsewhere."""
        if self.reader is not None:
            try:
                self.reader.check_bad(self.num_bad_samples, self.num_samples, self.faults)
            except ValueError as error:
                return str(error)
        return ""

    def _new_faults(self) -> Counter[Fault] | None:
        """What this rank's reader has found since the last call."""
        if self.reader is None:
            return None
        found = self.reader.faults.counts - self._reported_faults
        self._reported_faults += found
        return found


def _from_rank_0(value: Any) -> Any:
    told = [value]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def mask_pack(pack: PackBatch, config: Config, mask_ratio: float, step: int) -> Tensor:
    """The visual tokens to hide from the student's reconstruction stream, bool `[B, S]`; none without LaVer."""
    if not config.objective.laver:
        return torch.zeros_like(pack.image_BS, dtype=torch.bool)
    return mask_visual_tokens(
        pack.image_BS,
        pack.sample_id_BS,
        pack.image_number_BS,
        mask_ratio=mask_ratio,
        sampling=config.objective.mask_sampling,
        seed=config.training.seed,
        step=step,
    )
