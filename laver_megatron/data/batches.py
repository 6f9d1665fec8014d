"""The global batch of one step on one rank: which packs, which masks, which pixels, and the counts of all.

Letters: M micro-batches, B packs of a micro-batch, S tokens of a pack.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from laver_megatron.config import Config
from laver_megatron.data.broadcast import share_metadata, share_pixels
from laver_megatron.data.loader import PackReader
from laver_megatron.data.packing import IGNORE_LABEL, PackBatch
from laver_megatron.objective.masking import mask_visual_tokens


@dataclass(frozen=True)
class GlobalCounts:
    """What a global batch holds over all data-parallel ranks, padding excluded. labels: tokens with a label;
    masked: tokens hidden from the reconstruction stream; the areas: (query, key) pairs attended to in the
    language stream and within images."""

    labels: int
    masked: int
    images: int
    visual_tokens: int
    tokens: int
    samples: int
    language_span_area: int
    image_span_area: int


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
    areas: Callable[[PackBatch], tuple[int, int]],
    device: torch.device,
) -> GlobalCounts:
    """Counts this rank's packs and sums over the data-parallel group, once a step, before the schedule runs."""
    local = torch.zeros(len(fields(GlobalCounts)), dtype=torch.int64)
    for pack, masked_BS in zip(packs, masked, strict=True):
        local += torch.tensor(
            [
                (pack.labels_BS != IGNORE_LABEL).sum(),
                masked_BS.sum(),
                (pack.image_BS.amax(1) + 1).sum(),
                (pack.image_BS >= 0).sum(),
                (pack.document_BS >= 0).sum(),
                (pack.document_BS.amax(1) + 1).sum(),
                *areas(pack),
            ]
        )
    local = local.to(device)
    dist.all_reduce(local, group=parallel_state.get_data_parallel_group())
    return GlobalCounts(*local.tolist())


class BatchSource:
    """Turns a position (packs consumed so far) into the global batch there, the same for every layout."""

    def __init__(
        self,
        config: Config,
        reader: PackReader | None,
        areas: Callable[[PackBatch], tuple[int, int]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.config, self.reader, self.areas, self.dtype, self.device = config, reader, areas, dtype, device
        # Rank 0 reads; what it reads is told to all, so that all can compare it with a checkpoint's.
        told = [None if reader is None else reader.fingerprint]
        dist.broadcast_object_list(told, src=0)
        self.fingerprint = str(told[0])
        self.packs_per_rank = config.global_batch_size // parallel_state.get_data_parallel_world_size()

    def at(self, first_pack: int, *, mask_ratio: float, step: int) -> GlobalBatch:
        """The batch of packs `first_pack` to `first_pack + global_batch_size`, of which each data-parallel
        rank takes a contiguous part. Without LaVer nothing is masked."""
        config = self.config
        packs = masked = None
        if self.reader is not None:
            start = first_pack + parallel_state.get_data_parallel_rank() * self.packs_per_rank
            packs = self.reader.read(start, self.packs_per_rank, config.micro_batch_size)
            masked = [self._mask(pack, mask_ratio, step) for pack in packs]
        num_micro = self.packs_per_rank // config.micro_batch_size
        shape = (num_micro, config.micro_batch_size, config.seq_length)
        packs, masked = share_metadata(packs, masked, shape, self.device)
        pixels = None
        if parallel_state.is_pipeline_first_stage(ignore_virtual=True):
            pixels = share_pixels(packs, self.dtype, self.device)
        return GlobalBatch(packs, masked, pixels, count(packs, masked, self.areas, self.device))

    def _mask(self, pack: PackBatch, mask_ratio: float, step: int) -> Tensor:
        if not self.config.laver:
            return torch.zeros_like(pack.image_BS, dtype=torch.bool)
        return mask_visual_tokens(
            pack.image_BS,
            pack.sample_id_BS,
            pack.image_number_BS,
            mask_ratio=mask_ratio,
            sampling=self.config.mask_sampling,
            seed=self.config.seed,
            step=step,
        )
