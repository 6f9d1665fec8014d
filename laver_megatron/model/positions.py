"""Rotary positions of text and visual tokens: three indices a token, the angles they turn into, and the turning.

Letters: B packs, L tokens of a sequence, A heads, D width of an attention head, F = D / 2 frequency pairs.

Every token carries (t, row, column) as in Qwen2.5-VL. Text carries three equal indices, so a pretrained
Qwen2.5 is unchanged on text. A visual token stands at the index where its image starts, plus its grid row
and column; text goes on at the largest index used + 1. `a [2 x 3 image] b`:

    t        0   1 1 1 1 1 1   4
    row      0   1 1 1 2 2 2   4
    column   0   1 2 3 1 2 3   4

In the reconstruction stream every image starts at 0. With `1d`, tokens are simply counted within their
document (or image). The paper gives visual tokens "block-wise 2D-RoPE"; the official code uses the
contiguous sections of Qwen2.5-VL in its second stage and 1D positions in the first and third.
"""

from typing import Any

import torch
from torch import Tensor

from laver_megatron.model.spans import run_starts_and_ends

# Share of the frequency pairs given to t, row and column by Qwen2.5-VL: 16, 24 and 24 of 64.
_MROPE_SHARES = (16, 24, 24)


def language_positions(document_BL: Tensor, image_BL: Tensor, row_BL: Tensor, col_BL: Tensor, positions: str) -> Tensor:
    """Position indices of the language stream, int64 `[3, B, L]`; counted anew in every document."""
    index_L = torch.arange(document_BL.shape[1], device=document_BL.device)
    document_starts_BL, _ = run_starts_and_ends(document_BL)
    if positions == "1d":
        return (index_L - document_starts_BL).expand(3, -1, -1)
    # A text token moves the count on by 1; an image moves it by its longer side, at its last token,
    # which is the grid's last row and column.
    visual_BL = image_BL >= 0
    _, image_ends_BL = run_starts_and_ends(image_BL)
    last_of_image_BL = visual_BL & (image_ends_BL == index_L + 1)
    advance_BL = torch.where(visual_BL, 0, 1)
    advance_BL = torch.where(last_of_image_BL, torch.maximum(row_BL, col_BL) + 1, advance_BL)
    before_BL = advance_BL.cumsum(1) - advance_BL
    base_BL = before_BL - before_BL.gather(1, document_starts_BL)
    return torch.stack([base_BL, base_BL + row_BL * visual_BL, base_BL + col_BL * visual_BL])


def reconstruction_positions(image_BL: Tensor, row_BL: Tensor, col_BL: Tensor, positions: str) -> Tensor:
    """Position indices of the reconstruction stream, int64 `[3, B, L]`; every image starts at 0."""
    if positions == "1d":
        starts_BL, _ = run_starts_and_ends(image_BL)
        index_L = torch.arange(image_BL.shape[1], device=image_BL.device)
        return (index_L - starts_BL).expand(3, -1, -1)
    visual_BL = image_BL >= 0
    return torch.stack([torch.zeros_like(row_BL), row_BL * visual_BL, col_BL * visual_BL])


def frequency_axes(num_frequencies: int, positions: str, device: torch.device | None = None) -> Tensor:
    """Which of (0: t, 1: row, 2: column) each frequency pair turns with, int64 `[num_frequencies]`.

    `2d` interleaves: even pairs turn with the row, odd pairs with the column, so both see low and high
    frequencies alike. `mrope` is Qwen2.5-VL's contiguous 16:24:24, scaled to the head; it leaves the column
    only the slowest frequencies. With `1d` all three indices are equal and the choice is without effect.
    """
    pair_F = torch.arange(num_frequencies, device=device)
    if positions == "mrope":
        t_end = num_frequencies * _MROPE_SHARES[0] // sum(_MROPE_SHARES)
        row_end = t_end + (num_frequencies - t_end) // 2
        return (pair_F >= t_end).long() + (pair_F >= row_end).long()
    if positions in ("1d", "2d"):
        return 1 + pair_F % 2
    raise ValueError(f"positions must be '1d', '2d' or 'mrope', got {positions!r}")


def rotary_angles(position_3BL: Tensor, head_dim: int, theta: float, positions: str) -> Tensor:
    """Angles in the shape Megatron-Core rotates with, fp32 `[L, B, 1, D]` (the D/2 angles, twice)."""
    device = position_3BL.device
    exponent_F = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    inverse_frequency_F = 1.0 / theta**exponent_F
    axis_F = frequency_axes(head_dim // 2, positions, device)
    position_FBL = position_3BL.float()[axis_F]
    angles_LBF = position_FBL.permute(2, 1, 0) * inverse_frequency_F
    return torch.cat([angles_LBF, angles_LBF], dim=-1).unsqueeze(2)


def rotary_table(angles_LB1D: Tensor, dtype: torch.dtype) -> Tensor:
    """Cosines and sines of a micro-batch's angles for `rotate`, `[2, L, B, 1, F]` in `dtype`."""
    angles_LB1F = angles_LB1D[..., : angles_LB1D.shape[-1] // 2]
    return torch.stack([angles_LB1F.cos(), angles_LB1F.sin()]).to(dtype)


def rotate(heads_LBAD: Tensor, table_2LB1F: Tensor) -> Tensor:
    """Turns pair f of every head, entries f and f + F, by its angle: `[L, B, A, D]`."""
    return _Rotation.apply(heads_LBAD, table_2LB1F)


class _Rotation(torch.autograd.Function):
    """Keeps the table alone: the gradient turns back by the same angles."""

    @staticmethod
    def forward(ctx: Any, heads_LBAD: Tensor, table_2LB1F: Tensor) -> Tensor:
        ctx.save_for_backward(table_2LB1F)
        cos_LB1F, sin_LB1F = table_2LB1F
        return _turned(heads_LBAD, cos_LB1F, sin_LB1F)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ((cos_LB1F, sin_LB1F),) = ctx.saved_tensors
        return _turned(gradients[0], cos_LB1F, -sin_LB1F), None


def _turned(heads_LBAD: Tensor, cos_LB1F: Tensor, sin_LB1F: Tensor) -> Tensor:
    first, second = heads_LBAD.chunk(2, dim=-1)
    turned_LBAD = torch.empty_like(heads_LBAD, memory_format=torch.contiguous_format)
    turned_first, turned_second = turned_LBAD.chunk(2, dim=-1)
    torch.mul(first, cos_LB1F, out=turned_first).addcmul_(second, sin_LB1F, value=-1)
    torch.mul(second, cos_LB1F, out=turned_second).addcmul_(first, sin_LB1F)
    return turned_LBAD
