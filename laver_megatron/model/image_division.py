"""How the images of a micro-batch, divided over tensor-parallel ranks, become visual tokens that every rank has.

Letters: I images of a micro-batch, T their visual tokens in order, t those of one rank's images, H hidden size.

Encoder and connector hold the same weights on all tensor-parallel ranks; each rank runs them on its own images only, so
their gradients are parts of a sum over these ranks (`sum_partial_gradients`).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from laver_megatron.data.batch.division import Division, divide_images
from laver_megatron.flops.encoder import BY_TOKENS, ImageCost
from laver_megatron.runtime.transfer import on_device

_PARTIAL = "gradient_is_partial_over_tensor_parallel"


def own_images(
    images: Sequence[Tensor], num_tokens: Sequence[int], group: dist.ProcessGroup, cost: ImageCost = BY_TOKENS
) -> list[Tensor]:
    """Those of all images of a micro-batch that this rank encodes."""
    return [images[image] for image in divide_images(num_tokens, group.size(), cost)[group.rank()]]


def gather_visual_tokens(
    own_tH: Tensor, num_tokens: Sequence[int], group: dist.ProcessGroup, cost: ImageCost = BY_TOKENS
) -> Tensor:
    """All visual tokens in the order of the images, `[T, H]`, on every rank of the group. own_tH: those of this rank's
    images in order. Their gradient is this rank's part of the (everywhere same) gradient of the result. Collective."""
    if group.size() == 1 or not num_tokens:
        return own_tH
    division = divide_images(num_tokens, group.size(), cost)
    return _Gather.apply(own_tH, division, tuple(num_tokens), group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, own_tH: Tensor, division: Division, num_tokens: tuple[int, ...], group: dist.ProcessGroup
    ) -> Tensor:
        sizes = [sum(num_tokens[image] for image in images) for images in division]
        padded_tH = own_tH.new_zeros(max(sizes), own_tH.shape[1])
        padded_tH[: len(own_tH)] = own_tH
        parts = [torch.empty_like(padded_tH) for _ in division]
        dist.all_gather(parts, padded_tH, group=group)
        places = [on_device(_places(images, num_tokens), own_tH.device) for images in division]
        tokens_TH = own_tH.new_empty(sum(sizes), own_tH.shape[1])
        for part_tH, place_t in zip(parts, places, strict=True):
            tokens_TH[place_t] = part_tH[: len(place_t)]
        ctx.save_for_backward(places[group.rank()])
        return tokens_TH

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (place_t,) = ctx.saved_tensors
        return gradients[0][place_t], None, None, None


def _places(images: Sequence[int], num_tokens: Sequence[int]) -> Tensor:
    """Where the tokens of some images stand among all, int64 `[t]`."""
    starts = [0]
    for num in num_tokens:
        starts.append(starts[-1] + num)
    ranges = [torch.arange(starts[image], starts[image + 1]) for image in images]
    return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.int64)


def mark_partial(modules: Iterable[nn.Module]) -> None:
    """Says that each rank's gradients of these modules are those of its own images."""
    for module in modules:
        for parameter in module.parameters():
            setattr(parameter, _PARTIAL, True)


@torch.no_grad()
def sum_partial_gradients(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Sums the `main_grad` of marked parameters over the group; the others stay as they are. Collective."""
    partial = [p for p in parameters if p.requires_grad and getattr(p, _PARTIAL, False)]
    gradients = [p.main_grad for p in partial]  # type: ignore[attr-defined]
    if group.size() == 1 or not gradients:
        return
    flat = _flatten_dense_tensors(gradients)
    dist.all_reduce(flat, group=group)
    for gradient, summed in zip(gradients, _unflatten_dense_tensors(flat, gradients), strict=True):
        gradient.copy_(summed)
