"""One reader per data-parallel replica: sends packs' metadata to the model-parallel group, and pixels to the ranks of
the first stage that encode them.

Both happen once a step, before the pipeline schedule starts: a broadcast inside a forward step would wait for ranks
that wait for that step's output.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from laver_megatron.data.batch.division import divide_images
from laver_megatron.data.batch.packing import PACK_TENSORS, PackBatch
from laver_megatron.flops.encoder import BY_TOKENS, ImageCost
from laver_megatron.runtime.transfer import on_device


def is_reader() -> bool:
    """Whether this rank reads data: the first tensor-parallel rank of the first stage of each replica."""
    return (
        parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.get_pipeline_model_parallel_rank() == 0
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
    table = torch.empty(num_micro, len(PACK_TENSORS) + 1, num_packs, seq_length, dtype=torch.int64)
    if packs is not None:
        assert masked is not None
        for micro, (pack, masked_BS) in enumerate(zip(packs, masked, strict=True)):
            table[micro] = torch.stack([getattr(pack, name) for name in PACK_TENSORS] + [masked_BS.long()])
    if group.size() > 1:
        table = table.to(device)
        dist.broadcast(table, src=dist.get_global_rank(group, 0), group=group)
        table = table.cpu()
    if packs is None:
        packs = [PackBatch(**dict(zip(PACK_TENSORS, part[:-1], strict=True)), pixels=[], keys=[]) for part in table]
    return packs, [part[-1] > 0 for part in table]


def scatter_pixels(
    packs: list[PackBatch], dtype: torch.dtype, device: torch.device, cost: ImageCost = BY_TOKENS
) -> list[list[Tensor]]:
    """For each micro-batch the images that this tensor-parallel rank of the first stage encodes, in order; sizes may
    differ. Call on the first stage only. cost: of the stage's encoder, by which images are divided."""
    group = parallel_state.get_tensor_model_parallel_group()
    num_tokens = [image_num_tokens(pack) for pack in packs]
    if not any(num_tokens):
        return [[] for _ in packs]
    divisions = [divide_images(of_pack, group.size(), cost) for of_pack in num_tokens]
    images = [[on_device(image, device, dtype) for images in pack.pixels for image in images] for pack in packs]
    if group.rank() == 0:
        _check_pixels(packs, num_tokens, images)
    if group.size() == 1:
        return images
    sizes = _share_sizes(images, sum(map(len, num_tokens)), device, group)
    starts = [sum(map(len, num_tokens[:number])) for number in range(len(packs))]
    if group.rank() == 0:
        sent: list[tuple[Any, Tensor]] = []  # with what is sent, which must live so long
        for rank in range(1, group.size()):
            parts = [of_pack[i].flatten() for of_pack, d in zip(images, divisions, strict=True) for i in d[rank]]
            if parts:
                flat = torch.cat(parts)
                sent.append((dist.isend(flat, dist.get_global_rank(group, rank), group=group), flat))
        for work, _ in sent:
            work.wait()
        return [[of_pack[i] for i in d[0]] for of_pack, d in zip(images, divisions, strict=True)]
    own_sizes = [[sizes[start + i] for i in d[group.rank()]] for start, d in zip(starts, divisions, strict=True)]
    lengths = [math.prod(size) for of_pack in own_sizes for size in of_pack]
    flat = torch.empty(sum(lengths), dtype=dtype, device=device)
    if lengths:
        dist.recv(flat, src=dist.get_global_rank(group, 0), group=group)
    parts = iter(flat.split(lengths))
    return [[next(parts).view(*size) for size in of_pack] for of_pack in own_sizes]


def _check_pixels(packs: list[PackBatch], num_tokens: list[list[int]], images: list[list[Tensor]]) -> None:
    expected, found = sum(map(len, num_tokens)), sum(map(len, images))
    if expected != found:
        keys = [key for pack in packs for keys in pack.keys for key in keys]
        raise ValueError(f"{expected} images have tokens but {found} have pixels, in samples {keys}")


def _share_sizes(
    images: list[list[Tensor]], num_images: int, device: torch.device, group: dist.ProcessGroup
) -> list[list[int]]:
    """(colours, height, width) of all images, on all ranks of the group."""
    sizes = torch.empty(num_images, 3, dtype=torch.int64, device=device)
    if group.rank() == 0:
        sizes = torch.tensor([list(i.shape) for of_pack in images for i in of_pack], dtype=torch.int64, device=device)
    dist.broadcast(sizes, src=dist.get_global_rank(group, 0), group=group)
    return sizes.tolist()


def image_num_tokens(packs: PackBatch) -> list[int]:
    """Visual tokens of every image of a micro-batch, in order."""
    counts = [torch.bincount(image_S[image_S >= 0]) for image_S in packs.image_BS]
    return torch.cat(counts).tolist()
