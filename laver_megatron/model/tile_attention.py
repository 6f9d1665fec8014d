"""Attention by tiles on the CPU, with PyTorch's CPU flash kernel called once a tile.

Letters: L tokens, Q queries of a tile, K keys of a tile, A query heads, G key/value heads, R = A / G query heads that
share one, D head width.

PyTorch's own function copies keys and values for every query head, and adds up gradients tile by tile in tensors of the
whole sequence. Here the R query heads of a key/value head are rows of one matrix product, `[G, L * R, D]`, and a
tile's gradients are added where they belong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Tile:
    """Queries of a pack, and the keys that any of them attends to.

    mask: which, `[queries, keys]`, 0 or -inf; None if every query attends to all of the keys, or `is_causal`.
    is_causal: queries and keys are the same tokens, and each query attends to the keys up to itself.
    """

    queries: slice
    keys: slice
    mask: Tensor | None
    is_causal: bool = False


class TileAttention(torch.autograd.Function):
    """Attention of one pack: query `[L, A, D]`, key and value `[L, G, D]`, its tiles to context `[L, A, D]`."""

    @staticmethod
    def forward(ctx: Any, query_LAD: Tensor, key_LGD: Tensor, value_LGD: Tensor, tiles: Sequence[Tile]) -> Tensor:
        """The tiles, which hold every query once."""
        query = _by_group(query_LAD, key_LGD.shape[1])
        context = torch.empty_like(query)
        logsumexps = []
        for tile in tiles:
            of_tile, logsumexp = _forward(
                *_inputs(tile, query, key_LGD, value_LGD),
                is_causal=tile.is_causal,
                attn_mask=_mask_of_rows(tile, query.shape[2]),
            )
            _rows(context, tile).copy_(of_tile)
            logsumexps.append(logsumexp)
        ctx.save_for_backward(query, key_LGD, value_LGD, context, *logsumexps)
        ctx.tiles = tiles
        return _by_token(context, len(query_LAD))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value."""
        (gradient_LAD,) = gradients
        query, key_LGD, value_LGD, context, *logsumexps = ctx.saved_tensors
        gradient = _by_group(gradient_LAD, key_LGD.shape[1])
        of_query = torch.empty_like(query)
        of_key_GLD, of_value_GLD = (torch.zeros_like(x.transpose(0, 1)) for x in (key_LGD, value_LGD))
        for tile, logsumexp in zip(ctx.tiles, logsumexps, strict=True):
            query_part, *key_parts = _backward(
                _rows(gradient, tile),
                *_inputs(tile, query, key_LGD, value_LGD),
                _rows(context, tile),
                logsumexp,
                0.0,
                tile.is_causal,
                attn_mask=_mask_of_rows(tile, query.shape[2]),
            )
            _rows(of_query, tile).copy_(query_part)
            for whole_GLD, part in zip((of_key_GLD, of_value_GLD), key_parts, strict=True):
                whole_GLD[:, tile.keys] += part.sum(1) if tile.is_causal else part.squeeze(0)
        return _by_token(of_query, len(gradient_LAD)), of_key_GLD.transpose(0, 1), of_value_GLD.transpose(0, 1), None


def _by_group(x_LAD: Tensor, groups: int) -> Tensor:
    """`[G, L, R, D]`, contiguous."""
    return x_LAD.unflatten(1, (groups, -1)).transpose(0, 1).contiguous()


def _by_token(x_GLRD: Tensor, length: int) -> Tensor:
    """`[L, A, D]`, contiguous."""
    return x_GLRD.transpose(0, 1).reshape(length, -1, x_GLRD.shape[-1])


def _rows(x_GLRD: Tensor, tile: Tile) -> Tensor:
    """A tile's queries as the kernel takes them, a view: all heads as rows of one product, `[1, G, Q * R, D]`; of a
    causal tile, whose rows the kernel must be able to count, `[G, R, Q, D]`."""
    x_GQRD = x_GLRD[:, tile.queries]
    return x_GQRD.transpose(1, 2) if tile.is_causal else x_GQRD.flatten(1, 2).unsqueeze(0)


def _inputs(tile: Tile, query_GLRD: Tensor, key_LGD: Tensor, value_LGD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    key_GKD, value_GKD = (x_LGD[tile.keys].transpose(0, 1) for x_LGD in (key_LGD, value_LGD))
    if tile.is_causal:
        repeats = query_GLRD.shape[2]
        key, value = (x_GKD.unsqueeze(1).expand(-1, repeats, -1, -1) for x_GKD in (key_GKD, value_GKD))
    else:
        key, value = key_GKD.unsqueeze(0), value_GKD.unsqueeze(0)
    return _rows(query_GLRD, tile), key, value


def _mask_of_rows(tile: Tile, repeats: int) -> Tensor | None:
    """Of a tile's rows, `[Q * R, K]`."""
    return None if tile.mask is None else tile.mask.repeat_interleave(repeats, 0)
