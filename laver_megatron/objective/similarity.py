"""How alike the visual tokens of an image are: the mean cosine of its pairs of tokens, without their N x N matrix.

Letters: T tokens of several images, N tokens of one, H width, I images, G = H + 1.

With u the unit vectors of an image's tokens,

    mean over i != j of u_i . u_j  =  (|sum_i u_i|^2 - sum_i |u_i|^2) / (N (N - 1))

so sums over the tokens are all that is needed, and tokens may be split over ranks: the sums add up. A token of length 0
has no direction; it counts with the cosine 0, as in `gram.cosine_gram`.
"""

import torch
from torch import Tensor

from laver_megatron.objective import at_least_fp32
from laver_megatron.objective.gram import SQUARED_NORM_EPS


def unit_vectors(tokens_TH: Tensor) -> Tensor:
    """Tokens at length 1, fp32 (fp64 for fp64); 0 for those that are too short to have a direction."""
    tokens_TH = at_least_fp32(tokens_TH)
    squared_T1 = tokens_TH.square().sum(-1, keepdim=True)
    scale_T1 = squared_T1.clamp(min=SQUARED_NORM_EPS).rsqrt()
    return tokens_TH * torch.where(squared_T1 > SQUARED_NORM_EPS, scale_T1, 0.0)


def unit_sums(tokens_TH: Tensor, image_T: Tensor, num_images: int) -> Tensor:
    """Of each image the sum of its tokens' unit vectors and, behind it, of their squared lengths: `[I, G]`.

    image_T: which image a token belongs to, int64.
    """
    unit_TH = unit_vectors(tokens_TH)
    unit_TG = torch.cat([unit_TH, unit_TH.square().sum(-1, keepdim=True)], dim=-1)
    return unit_TG.new_zeros(num_images, unit_TG.shape[-1]).index_add_(0, image_T, unit_TG)


def cosines_of_sums(sums_IG: Tensor, num_tokens_I: Tensor) -> Tensor:
    """Mean pairwise cosine of each image, `[I]`, from the sums of all its tokens; NaN for an image of one token."""
    squared_I = sums_IG[:, :-1].square().sum(-1)
    num_pairs_I = num_tokens_I * (num_tokens_I - 1)
    mean_I = (squared_I - sums_IG[:, -1]) / num_pairs_I.clamp(min=1)
    return torch.where(num_pairs_I > 0, mean_I, torch.nan)


def mean_pairwise_cosine(tokens_NH: Tensor) -> Tensor:
    """Mean cosine of the N (N - 1) pairs of different tokens of one image, a scalar; near 1 they have become one."""
    sums_IG = unit_sums(tokens_NH, torch.zeros(len(tokens_NH), dtype=torch.int64, device=tokens_NH.device), 1)
    return cosines_of_sums(sums_IG, torch.tensor([len(tokens_NH)], device=tokens_NH.device))[0]
