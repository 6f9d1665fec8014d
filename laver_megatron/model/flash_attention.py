"""Attention over spans by FlashAttention, in PyTorch's own build: exact, with no mask. CUDA, 16 bits.

Letters: B packs, N tokens of all packs in one segment, A query heads, G key/value heads, D head width, P pieces,
Q queries that see tokens behind themselves.

A segment whose tokens see their documents whole (images of the reconstruction stream) is one call over pieces of any
lengths, without a mask. Any other is a causal call over its documents, and one over what is left, the strict upper
triangle of each image: with its tokens in reverse, queries b-2..a and keys b-1..a+1 of image [a, b), it is causal, too.
The two are merged by their log-sum-exp; backward, each is given the merged output and log-sum-exp. A whole image in
the second call would count its lower triangle twice.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from laver_megatron.runtime.transfer import on_device

# Tokens that see themselves alone, most of them padding, would be as many pieces: they are computed so many to a piece,
# and replaced.
ALONE_TOKENS = 128


@dataclass(frozen=True)
class Pieces:
    """What one call attends within: consecutive tokens, of every piece to itself.

    bounds_P: where each begins, and the end of the last, int32. longest: tokens, at least.
    """

    bounds_P: Tensor
    longest: int
    causal: bool


@dataclass(frozen=True)
class Plan:
    """How a segment is computed.

    Attributes:
        documents: the first call.
        alone_N: tokens that see themselves alone, int64; None without any.
        triangles: the second call; None without an image in a causal document.
        queries_Q, keys_Q: its tokens, int64.
    """

    documents: Pieces
    alone_N: Tensor | None
    triangles: Pieces | None
    queries_Q: Tensor
    keys_Q: Tensor


def flash_plans(spans_B2L: Tensor, segments: tuple[int, ...], device: torch.device | None = None) -> list[Plan]:
    """Of each segment its plan, made on the host and moved to a device, by default that of the spans.

    Raises:
        ValueError: spans of another form than documents, causal but for the images in them, or seen whole.
    """
    device = device or spans_B2L.device
    firsts = accumulate((0, *segments[:-1]))
    parts = spans_B2L.cpu().long().split(segments, dim=2)
    return [_plan(part_B2N - first, device) for part_B2N, first in zip(parts, firsts, strict=True)]


def _plan(spans_B2N: Tensor, device: torch.device) -> Plan:
    num_packs, _, length = spans_B2N.shape
    starts_N, ends_N = (spans_B2N + length * torch.arange(num_packs)[:, None, None]).transpose(0, 1).flatten(1)
    index_N = torch.arange(len(starts_N))
    is_first_N = starts_N == index_N
    bounds_D = pad(is_first_N.nonzero().squeeze(1), (0, 1), value=len(index_N))
    document_N = is_first_N.cumsum(0) - 1
    document_end_N = bounds_D[document_N + 1]
    _, run_lengths = ends_N.unique_consecutive(return_counts=True)
    run_end_N = run_lengths.cumsum(0).repeat_interleave(run_lengths)
    fits_N = (starts_N == bounds_D[document_N]) & (ends_N == run_end_N) & (ends_N <= document_end_N)
    fits_N &= (spans_B2N[:, 0] >= 0).flatten()
    if not bool(fits_N.all()):
        row = int((~fits_N).nonzero()[0])
        start, end = spans_B2N[row // length, :, row % length].tolist()
        raise ValueError(
            f"attention kernel flash cannot compute the span [{start}, {end}) of token {row % length} of pack "
            f"{row // length}; use flex or dense"
        )
    causal = not torch.equal(ends_N, document_end_N)
    is_alone_D = bounds_D.diff() == 1
    follows_D = is_alone_D & pad(is_alone_D, (1, 0), value=False)[:-1]
    kept_D = ~follows_D | (bounds_D[:-1] % ALONE_TOKENS == 0)
    queries_Q = (ends_N > index_N + 1).nonzero().squeeze(1).flip(0)[: None if causal else 0]
    _, of_images = ends_N[queries_Q].unique_consecutive(return_counts=True)
    alone_N = bounds_D[:-1][is_alone_D]
    return Plan(
        documents=_pieces(pad(bounds_D[:-1][kept_D], (0, 1), value=len(index_N)), causal, device),
        alone_N=on_device(alone_N, device) if len(alone_N) else None,
        triangles=_pieces(pad(of_images.cumsum(0), (1, 0)), True, device) if len(of_images) else None,
        queries_Q=on_device(queries_Q, device),
        keys_Q=on_device(queries_Q + 1, device),
    )


def _pieces(bounds_P: Tensor, causal: bool, device: torch.device) -> Pieces:
    # With one query at most, PyTorch would go another way, with a log-sum-exp of another layout.
    longest = max(int(bounds_P.diff().max()), 2)
    return Pieces(on_device(bounds_P, device, torch.int32), longest, causal)


class FlashAttention(torch.autograd.Function):
    """Attention in one segment: query `[N, A, D]`, key and value `[N, G, D]`, Plan to output `[N, A, D]`."""

    @staticmethod
    def forward(ctx: Any, query_NAD: Tensor, key_NGD: Tensor, value_NGD: Tensor, plan: Plan) -> Tensor:
        """Both calls, merged."""
        output_NAD, lse_AN = varlen_forward(query_NAD, key_NGD, value_NGD, plan.documents)
        if plan.triangles is not None:
            rows_Q = plan.queries_Q
            ahead_QAD, lse_of_ahead_AQ = varlen_forward(*_ahead(plan, query_NAD, key_NGD, value_NGD), plan.triangles)
            lse_AQ = lse_AN[:, rows_Q]
            share_QA1 = (lse_of_ahead_AQ - lse_AQ).sigmoid().t()[:, :, None]
            merged_QAD = torch.lerp(output_NAD[rows_Q].to(lse_AN.dtype), ahead_QAD.to(lse_AN.dtype), share_QA1)
            output_NAD.index_copy_(0, rows_Q, merged_QAD.to(output_NAD.dtype))
            lse_AN.index_copy_(1, rows_Q, torch.logaddexp(lse_AQ, lse_of_ahead_AQ))
        if plan.alone_N is not None:
            heads_per_group = query_NAD.shape[1] // value_NGD.shape[1]
            output_NAD.index_copy_(0, plan.alone_N, value_NGD[plan.alone_N].repeat_interleave(heads_per_group, dim=1))
        ctx.save_for_backward(query_NAD, key_NGD, value_NGD, output_NAD, lse_AN)
        ctx.plan = plan
        return output_NAD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Both calls, each with what the two have merged to."""
        (gradient_NAD,) = gradients
        plan: Plan = ctx.plan
        query_NAD, key_NGD, value_NGD, output_NAD, lse_AN = ctx.saved_tensors
        alone_NAD = None
        if plan.alone_N is not None:
            alone_NAD = gradient_NAD[plan.alone_N]
            gradient_NAD = gradient_NAD.index_fill(0, plan.alone_N, 0)
        inputs = query_NAD, key_NGD, value_NGD
        of_query, of_key, of_value = varlen_backward(gradient_NAD, *inputs, output_NAD, lse_AN, plan.documents)
        if plan.triangles is not None:
            rows_Q = plan.queries_Q
            merged = output_NAD[rows_Q], lse_AN[:, rows_Q]
            ahead = varlen_backward(gradient_NAD[rows_Q], *_ahead(plan, *inputs), *merged, plan.triangles)
            for whole, rows, part in zip(
                (of_query, of_key, of_value), (rows_Q, *[plan.keys_Q] * 2), ahead, strict=True
            ):
                whole.index_copy_(0, rows, whole[rows] + part)
        if plan.alone_N is not None and alone_NAD is not None:
            of_groups = alone_NAD.unflatten(1, (value_NGD.shape[1], -1)).sum(2)
            of_value.index_copy_(0, plan.alone_N, of_groups)
        return of_query, of_key, of_value, None


def _ahead(plan: Plan, query_NAD: Tensor, key_NGD: Tensor, value_NGD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return query_NAD[plan.queries_Q], key_NGD[plan.keys_Q], value_NGD[plan.keys_Q]


def varlen_forward(query_NAD: Tensor, key_NGD: Tensor, value_NGD: Tensor, pieces: Pieces) -> tuple[Tensor, Tensor]:
    """Attention within pieces: output `[N, A, D]` and log-sum-exp fp32 `[A, N]`, both new."""
    output_NAD, lse_AN, *_ = torch.ops.aten._flash_attention_forward(
        query_NAD, key_NGD, value_NGD, pieces.bounds_P, pieces.bounds_P, pieces.longest, pieces.longest,
        0.0, pieces.causal, False,
    )  # fmt: skip
    return output_NAD, lse_AN


def varlen_backward(
    gradient_NAD: Tensor,
    query_NAD: Tensor,
    key_NGD: Tensor,
    value_NGD: Tensor,
    output_NAD: Tensor,
    lse_AN: Tensor,
    pieces: Pieces,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, all new."""
    # Read by dropout alone, of which there is none.
    unread = torch.empty(2, dtype=torch.uint64, device=query_NAD.device)
    return torch.ops.aten._flash_attention_backward(
        gradient_NAD, query_NAD, key_NGD, value_NGD, output_NAD, lse_AN, pieces.bounds_P, pieces.bounds_P,
        pieces.longest, pieces.longest, 0.0, pieces.causal, unread, unread,
    )  # fmt: skip
