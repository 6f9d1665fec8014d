"""L_GA and L_CGA: Gram-Anchoring keeps the visual tokens of an image from collapsing into one another.

Letters: I images of N visual tokens each, K width of the vision head's logits. Every function takes many images of one
size at once: 32 of them cost about as many kernels as one.

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


def inner_products(z_INK: Tensor) -> Tensor:
    """Z Z^T of each image: [I, N, N], fp32 (fp64 for fp64 logits), from logits of any float dtype."""
    z_INK = at_least_fp32(z_INK)
    return z_INK @ z_INK.mT


def cosine_gram(inner_INN: Tensor) -> Tensor:
    """The paper's G(Z) = Norm(Z) Norm(Z)^T, from the inner products Z Z^T of all visual tokens of each image.

    [I, N, N] cosines, the dtype of `inner_INN`. The diagonal is the constant 1. A row with a squared norm of at
    most SQUARED_NORM_EPS has cosine 0 to every other row and no gradient.

    Example: Z = [[3, 0], [1, 1]] has inner products [[9, 3], [3, 2]] and the cosine 3 / sqrt(9 * 2) = 0.7071.
    """
    squared_norms_IN = inner_INN.diagonal(dim1=-2, dim2=-1)
    scale_IN = squared_norms_IN.clamp(min=SQUARED_NORM_EPS).rsqrt()
    scale_IN = torch.where(squared_norms_IN > SQUARED_NORM_EPS, scale_IN, 0.0)
    gram_INN = inner_INN * scale_IN[..., :, None] * scale_IN[..., None, :]
    identity_NN = torch.eye(inner_INN.shape[-1], dtype=torch.bool, device=inner_INN.device)
    return gram_INN.masked_fill(identity_NN, 1.0)


def gram_losses(
    student_gram_INN: Tensor, teacher_gram_INN: Tensor, kind: str = "cga", reduction: str = "mean"
) -> Tensor:
    """Gram-Anchoring of each image, from the cosines of the student's and the teacher's logits:

        "ga":   sum_ij (G_student - G_teacher)_ij^2
        "cga":  sum_ij max(0, G_student - G_teacher)_ij^2

    `cga` is one-sided: only pairs that are more similar for the student than for the teacher are pushed apart;
    pairs that are less similar get exactly no gradient.

    `reduction="mean"` divides by N^2 (the diagonal is counted and contributes 0), so that images of all sizes
    weigh the same; `"sum"` is the squared Frobenius norm as the paper prints it. The official code takes the
    plain, unclipped MSE of a Gram matrix over all patches of a micro-batch, so that a loss depends on which
    images share it; ours is per image.

    Args:
        student_gram_INN, teacher_gram_INN: [I, N, N] from `cosine_gram`. The teacher is detached.

    Returns:
        [I], one value an image; the caller averages over the images of the global batch.

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
    difference_INN = student_gram_INN - teacher_gram_INN.detach()
    if kind == "cga":
        difference_INN = difference_INN.clamp(min=0)
    squares_INN = difference_INN.square()
    return squares_INN.mean((-2, -1)) if reduction == "mean" else squares_INN.sum((-2, -1))


@torch.no_grad()
def mean_off_diagonal(gram_INN: Tensor) -> Tensor:
    """Mean cosine of the N(N-1) pairs of different tokens of each image, [I]; a monitor, without gradient. NaN for
    images of one token, which have no pair, as in `similarity.cosines_of_sums`.

    Near 1 the tokens of the image have collapsed into one. Zero rows count with the cosine 0.
    """
    num_tokens = gram_INN.shape[-1]
    off_diagonal_sum_I = gram_INN.sum((-2, -1)) - gram_INN.diagonal(dim1=-2, dim2=-1).sum(-1)
    return off_diagonal_sum_I / (num_tokens * (num_tokens - 1))
