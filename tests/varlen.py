"""Attention within pieces written out, in any precision, in place of FlashAttention's kernels where there is no GPU.

Letters: N tokens, A query heads, G key/value heads, D head width, P pieces.
"""

import math

import pytest
import torch

from laver_megatron.model import flash_attention


def scores_of_pieces(query_NAD, key_NGD, pieces):
    """(rows, scores `[A, rows, rows]`, -inf where not seen) of each piece."""
    heads_per_group = query_NAD.shape[1] // key_NGD.shape[1]
    key_NAD = key_NGD.repeat_interleave(heads_per_group, dim=1)
    bounds = pieces.bounds_P.tolist()
    assert pieces.bounds_P.dtype == torch.int32 and bounds[0] == 0 and bounds[-1] == len(query_NAD) == len(key_NGD)
    for first, end in zip(bounds[:-1], bounds[1:], strict=True):
        assert 0 < end - first <= pieces.longest and pieces.longest > 1
        rows = slice(first, end)
        scores = torch.einsum("qad,kad->aqk", query_NAD[rows], key_NAD[rows]) / math.sqrt(query_NAD.shape[2])
        if pieces.causal:
            scores = scores.masked_fill(
                torch.ones(end - first, end - first, device=scores.device).triu(1).bool(), -torch.inf
            )
        yield rows, scores


def plain_forward(query_NAD, key_NGD, value_NGD, pieces):
    value_NAD = value_NGD.repeat_interleave(query_NAD.shape[1] // value_NGD.shape[1], dim=1)
    output_NAD = torch.empty_like(query_NAD)
    lse_AN = query_NAD.new_empty(query_NAD.shape[1], len(query_NAD))
    for rows, scores in scores_of_pieces(query_NAD, key_NGD, pieces):
        lse_AN[:, rows] = scores.logsumexp(-1)
        output_NAD[rows] = torch.einsum("aqk,kad->qad", scores.softmax(-1), value_NAD[rows])
    return output_NAD, lse_AN


def plain_backward(gradient_NAD, query_NAD, key_NGD, value_NGD, output_NAD, lse_AN, pieces):
    """As the kernels do it: from the output and the log-sum-exp that they are given, whatever it is made of."""
    num_groups = key_NGD.shape[1]
    heads_per_group = query_NAD.shape[1] // num_groups
    key_NAD, value_NAD = (x.repeat_interleave(heads_per_group, dim=1) for x in (key_NGD, value_NGD))
    of_query, of_key, of_value = (torch.empty_like(query_NAD) for _ in range(3))
    scale = 1 / math.sqrt(query_NAD.shape[2])
    for rows, scores in scores_of_pieces(query_NAD, key_NGD, pieces):
        shares = (scores - lse_AN[:, rows, None]).exp()
        of_shares = torch.einsum("qad,kad->aqk", gradient_NAD[rows], value_NAD[rows])
        of_scores = shares * (of_shares - (gradient_NAD[rows] * output_NAD[rows]).sum(2).t()[:, :, None]) * scale
        of_query[rows] = torch.einsum("aqk,kad->qad", of_scores, key_NAD[rows])
        of_key[rows] = torch.einsum("aqk,qad->kad", of_scores, query_NAD[rows])
        of_value[rows] = torch.einsum("aqk,qad->kad", shares, gradient_NAD[rows])
    return of_query, *(x.unflatten(1, (num_groups, heads_per_group)).sum(2) for x in (of_key, of_value))


@pytest.fixture
def plain_varlen(monkeypatch):
    """The kernel `flash` on a CPU."""
    monkeypatch.setattr(flash_attention, "varlen_forward", plain_forward)
    monkeypatch.setattr(flash_attention, "varlen_backward", plain_backward)
