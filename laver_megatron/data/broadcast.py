"""One reader per data-parallel replica: its packs' metadata to the whole model-parallel group, its pixels to
the first stage.

Both happen once a step, before the pipeline schedule starts: a broadcast inside a forward step would wait
for ranks that wait for that step's output.
"""

from dataclasses import fields

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from laver_megatron.data.packing import PackBatch

METADATA_FIELDS = tuple(f.name for f in fields(PackBatch) if f.name.endswith("_BS"))


def is_reader() -> bool:
    """Whether this rank reads data: the first tensor-parallel rank of the first stage of each replica."""
    return (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_pipeline_model_parallel_rank() == 0
    )


def share_metadata(
    packs: list[PackBatch] | None,
    masked: list[Tensor] | None,
    shape_MBS: tuple[int, int, int],
    device: torch.device,
) -> tuple[list[PackBatch], list[Tensor]]:
    """The reader's packs and masks, on the CPU of every rank of its model-parallel group (pixels and keys
    stay with the reader)."""
    group = parallel_state.get_model_parallel_group()
    num_micro, num_packs, seq_length = shape_MBS
    table = torch.empty(num_micro, len(METADATA_FIELDS) + 1, num_packs, seq_length, dtype=torch.int64)
    if packs is not None:
        assert masked is not None
        for micro, (pack, masked_BS) in enumerate(zip(packs, masked, strict=True)):
            table[micro] = torch.stack([getattr(pack, name) for name in METADATA_FIELDS] + [masked_BS.long()])
    if group.size() > 1:
        table = table.to(device)
        dist.broadcast(table, src=dist.get_global_rank(group, 0), group=group)
        table = table.cpu()
    if packs is None:
        packs = [
            PackBatch(**dict(zip(METADATA_FIELDS, part[:-1], strict=True)), pixels=[], keys=[])
            for part in table
        ]
    return packs, [part[-1] > 0 for part in table]


def share_pixels(packs: list[PackBatch], dtype: torch.dtype, device: torch.device) -> list[list[Tensor]]:
    """The images of each micro-batch in order, on every tensor-parallel rank of the first stage; sizes may
    differ. Call on the first stage only."""
    group = parallel_state.get_tensor_model_parallel_group()
    src = dist.get_global_rank(group, 0)
    # An image index counts within its pack.
    num_images = [int((pack.image_BS.amax(1) + 1).sum()) for pack in packs]
    if sum(num_images) == 0:
        return [[] for _ in packs]
    images = [image.to(device, dtype) for pack in packs for images in pack.pixels for image in images]
    if group.rank() == 0 and len(images) != sum(num_images):
        keys = [key for pack in packs for keys in pack.keys for key in keys]
        raise ValueError(
            f"{sum(num_images)} images have tokens but {len(images)} have pixels, in samples {keys}"
        )
    if group.size() > 1:
        sizes = torch.empty(sum(num_images), 3, dtype=torch.int64, device=device)
        if group.rank() == 0:
            sizes = torch.tensor([list(image.shape) for image in images], dtype=torch.int64, device=device)
        dist.broadcast(sizes, src=src, group=group)
        flat = torch.empty(int(sizes.prod(1).sum()), dtype=dtype, device=device)
        if group.rank() == 0:
            flat = torch.cat([image.flatten() for image in images])
        dist.broadcast(flat, src=src, group=group)
        parts = flat.split(sizes.prod(1).tolist())
        images = [part.view(*size) for part, size in zip(parts, sizes.tolist(), strict=True)]
    return [list(part) for part in _split(images, num_images)]


def _split(items: list[Tensor], counts: list[int]) -> list[list[Tensor]]:
    parts, start = [], 0
    for count in counts:
        parts.append(items[start : start + count])
        start += count
    return parts
