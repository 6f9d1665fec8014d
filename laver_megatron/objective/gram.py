"""L_GA and L_CGA: Gram-Anchoring keeps the visual tokens of an image from collapsing into one another.

Letters: N visual tokens of one image, K width of the vision head's logits.

The Gram matrix is built in two steps, inner products first and then cosines from them, G = D^-1/2 (Z Z^T)
D^-1/2 with D = diag(Z Z^T), instead of normalising Z. The result is the same, and with K split over ranks a
single sum of the partial inner products is all that has to be exchanged: everything after it is small and the
same on all ranks.
"""

import torch
from torch import Tensor

from laver_megatron.objective import at_least_fp32

# A row shorter than 1e-6 has no direction worth the name. Its cosine to every other token is set to 0,
# without gradient: dividing by such a length would give gradients of 1e6 and more.
SQUARED_NORM_EPS = 1e-12


def inner_products(z_NK: Tensor) -> Tensor:
    """Z Z^T of one image: [N, N], fp32 (fp64 for fp64 logits), from logits of any float dtype."""
    z_NK = at_least_fp32(z_NK)
    return z_NK @ z_NK.T


def cosine_gram(inner_NN: Tensor) -> Tensor:
    """The paper's G(Z) = Norm(Z) Norm(Z)^T, from the inner products Z Z^T of all visual tokens of one image.

    [N, N] cosines, the dtype of `inner_NN`. The diagonal is the constant 1. A row with a squared norm of at
    most SQUARED_NORM_EPS has cosine 0 to every other row and no gradient.

    Example: Z = [[3, 0], [1, 1]] has inner products [[9, 3], [3, 2]] and the cosine 3 / sqrt(9 * 2) = 0.7071.
    """
    squared_norms_N = inner_NN.diagonal()
    scale_N = squared_norms_N.clamp(min=SQUARED_NORM_EPS).rsqrt()
    scale_N = torch.where(squared_norms_N > SQUARED_NORM_EPS, scale_N, 0.0)
    gram_NN = inner_NN * scale_N[:, None] * scale_N[None, :]
    identity_NN = torch.eye(len(inner_NN), dtype=torch.bool, device=inner_NN.device)
    return gram_NN.masked_fill(identity_NN, 1.0)


def gram_loss(student_inner_NN: Tensor, teacher_inner_NN: Tensor, kind: str = "cga", reduction: str = "mean") -> Tensor:
    """Gram-Anchoring of one image, from the inner products of the student's and the teacher's logits:

        "ga":   sum_ij (G_student - G_teacher)_ij^2
        "cga":  sum_ij max(0, G_student - G_teacher)_ij^2

    `cga` is one-sided: only pairs that are more similar for the student than for the teacher are pushed apart;
    pairs that are less similar get exactly no gradient.

    `reduction="mean"` divides by N^2 (the diagonal is counted and contributes 0), so that images of all sizes
    weigh the same; `"sum"` is the squared Frobenius norm as the paper prints it. The official code takes the
    plain, unclipped MSE of a Gram matrix over all patches of a micro-batch, so that a loss depends on which
    images share it; ours is per image.

    Args:
        student_inner_NN, teacher_inner_NN: [N, N] from `inner_products`, complete sums over K. The teacher
            is detached.

    Returns:
        a scalar for one image; the caller averages over the images of the global batch.

    Raises:
        ValueError: an unknown kind or reduction.

    Example: two tokens, cosine 0.9 for the student and 0.5 for the teacher: both pairs (1, 2) and (2, 1)
    exceed by 0.4, so the mean is 2 * 0.16 / 4 = 0.08 for either kind. With the cosines exchanged `ga` stays
    0.08 and `cga` is 0.
    """
    if kind not in ("ga", "cga"):
        raise ValueError(f"gram_loss is {kind!r}; it must be 'ga' or 'cga'")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"gram_reduction is {reduction!r}; it must be 'mean' or 'sum'")
    difference_NN = cosine_gram(student_inner_NN) - cosine_gram(teacher_inner_NN.detach())
    if kind == "cga":
        difference_NN = difference_NN.clamp(min=0)
    squares_NN = difference_NN.square()
    return squares_NN.mean() if reduction == "mean" else squares_NN.sum()


def mean_off_diagonal(gram_NN: Tensor) -> Tensor:
    """Mean cosine of the N(N-1) pairs of different tokens; a monitor, without gradient. 0 for an image of one
    token.

    Near 1 the tokens of the image have collapsed into one. Zero rows count with the cosine 0.
    """
    num_tokens = len(gram_NN)
    gram_NN = gram_NN.detach()
    off_diagonal_sum = gram_NN.sum() - gram_NN.diagonal().sum()
    return off_diagonal_sum / max(num_tokens * (num_tokens - 1), 1)
