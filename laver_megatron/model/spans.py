"""Attention as spans: every query attends to one contiguous interval of keys. The only definition of the mask.

Letters: B packs, S language tokens, V visual slots, L any sequence of tokens.

In the language stream a text token sees its document up to itself; a visual token sees its document up to
the end of its own image (mixed attention, paper section "Spatial Awareness for Vision"), so a later image
sees an earlier one and never the reverse. In the reconstruction stream a token sees exactly its own image.
Padding sees itself alone, so that no softmax runs over nothing. One document `a a [image: i i] b`, padded to 6:

    position   0      1      2      3      4      5
    token      a      a      i      i      b      (padding)
    span       [0,1)  [0,2)  [0,4)  [0,4)  [0,5)  [5,6)

The official code lets all images of a row see one another, and under flash attention falls back to causal.
"""

import torch
from torch import Tensor


def run_starts_and_ends(labels_BL: Tensor) -> tuple[Tensor, Tensor]:
    """First index and one past the last index of the run of equal labels that each position lies in.

    `[[7, 7, 3, 7]]` gives starts `[[0, 0, 2, 3]]` and ends `[[2, 2, 3, 4]]`. int64 in, int64 out.
    """
    num_packs, length = labels_BL.shape
    index_L = torch.arange(length, device=labels_BL.device)
    edge_BL = labels_BL[:, 1:] != labels_BL[:, :-1]
    first_BL = torch.nn.functional.pad(edge_BL, (1, 0), value=True)
    last_BL = torch.nn.functional.pad(edge_BL, (0, 1), value=True)
    starts_BL = torch.where(first_BL, index_L, 0).cummax(dim=1).values
    ends_BL = torch.where(last_BL, index_L + 1, length).flip(1).cummin(dim=1).values.flip(1)
    return starts_BL, ends_BL


def language_spans(document_BS: Tensor, image_BS: Tensor, attention: str) -> Tensor:
    """Spans of the language stream, int32 `[B, 2, S]` (starts, ends).

    document_BS: index of the document a token belongs to, -1 for padding. image_BS: index of the image a
    visual token belongs to, -1 elsewhere. attention: `mixed`, or `causal` for all tokens alike.
    """
    index_S = torch.arange(document_BS.shape[1], device=document_BS.device)
    starts_BS, _ = run_starts_and_ends(document_BS)
    ends_BS = (index_S + 1).expand_as(starts_BS)
    if attention == "mixed":
        _, image_ends_BS = run_starts_and_ends(image_BS)
        ends_BS = torch.where(image_BS >= 0, image_ends_BS, ends_BS)
    elif attention != "causal":
        raise ValueError(f"attention must be 'mixed' or 'causal', got {attention!r}")
    return _with_padding_alone(starts_BS, ends_BS, document_BS < 0)


def reconstruction_spans(image_BV: Tensor) -> Tensor:
    """Spans of the reconstruction stream, int32 `[B, 2, V]`: `[image start, image end)`; padding (-1) alone."""
    return _with_padding_alone(*run_starts_and_ends(image_BV), image_BV < 0)


def _with_padding_alone(starts_BL: Tensor, ends_BL: Tensor, padding_BL: Tensor) -> Tensor:
    index_L = torch.arange(starts_BL.shape[1], device=starts_BL.device)
    starts_BL = torch.where(padding_BL, index_L, starts_BL)
    ends_BL = torch.where(padding_BL, index_L + 1, ends_BL)
    return torch.stack([starts_BL, ends_BL], dim=1).to(torch.int32)


def concatenate_spans(*spans: Tensor) -> Tensor:
    """Spans of several sequences laid one after the other; tokens of one never attend to those of another."""
    shifted, offset = [], 0
    for spans_B2L in spans:
        shifted.append(spans_B2L + offset)
        offset += spans_B2L.shape[2]
    return torch.cat(shifted, dim=2)


def spans_to_mask(spans_B2L: Tensor) -> Tensor:
    """The explicit boolean mask `[B, L, L]`: True where the query (row) may attend to the key (column)."""
    key_L = torch.arange(spans_B2L.shape[2], device=spans_B2L.device)
    starts_BL1, ends_BL1 = spans_B2L[:, 0, :, None], spans_B2L[:, 1, :, None]
    return (starts_BL1 <= key_L) & (key_L < ends_BL1)


def span_area(spans_B2L: Tensor, counted_BL: Tensor) -> int:
    """Number of (query, key) pairs that the queries where `counted_BL` holds attend to, summed over the packs.
    Padding attends to itself and is not work: leave it out of `counted_BL`."""
    return int((spans_B2L[:, 1] - spans_B2L[:, 0])[counted_BL].sum(dtype=torch.int64))
