"""L_MIM by regression: the vision head's outputs at masked tokens against numbers, not against a distribution. It is no
part of the paper, which predicts the teacher's distribution; with it one asks whether latent targets matter.

Letters: T tokens (the caller selects the masked ones), K numbers of a token's target.
"""

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, smooth_l1_loss

from laver_megatron.objective import at_least_fp32

LAYER_NORM_EPS = 1e-5
PATCH_VARIANCE_EPS = 1e-6


def smooth_l1_losses(prediction_TK: Tensor, target_TK: Tensor) -> Tensor:
    """Mean over a token's numbers of d^2 / 2 where |d| < 1, else |d| - 1/2, with d = prediction - target.

    Args:
        prediction_TK, target_TK: [T, K] in any float dtype. The target is detached.

    Returns:
        [T], fp32 (fp64 for fp64 predictions), one value a token; the caller averages over those of the global batch.

    Example: prediction [0, 0] and target [0.5, 2] lose (0.125 + 1.5) / 2 = 0.8125.
    """
    prediction_TK, target_TK = at_least_fp32(prediction_TK), at_least_fp32(target_TK).detach()
    return smooth_l1_loss(prediction_TK, target_TK, reduction="none").mean(-1)


@torch.no_grad()
def standardised(outputs_TK: Tensor) -> Tensor:
    """A token's outputs less their mean, over their deviation (a layer norm without weights), as I-JEPA normalises the
    teacher's: a target that cannot shrink to nothing. [T, K], fp32 (fp64 for fp64)."""
    return layer_norm(at_least_fp32(outputs_TK), outputs_TK.shape[-1:], eps=LAYER_NORM_EPS)


@torch.no_grad()
def normalised_pixels(pixels_TK: Tensor) -> Tensor:
    """A token's pixels, all colours together, less their mean, over the root of their (unbiased) variance plus
    PATCH_VARIANCE_EPS, as MAE normalises its targets. [T, K], fp32 (fp64 for fp64)."""
    pixels_TK = at_least_fp32(pixels_TK)
    variance_T1 = pixels_TK.var(dim=-1, keepdim=True)
    return (pixels_TK - pixels_TK.mean(dim=-1, keepdim=True)) / (variance_T1 + PATCH_VARIANCE_EPS).sqrt()
