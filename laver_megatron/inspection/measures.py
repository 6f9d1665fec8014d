"""What is measured of a layer, as functions of tensors.

Letters: N visual tokens of one image, M text tokens, H width of the decoder, E width of the encoder, A attention heads,
Q queries, K keys, L layers.

Values that do not exist (one token has no pairs) are NaN. "Unit" means divided by its own length, so that measures of
directions do not follow the few visual tokens that are hundreds of times as long as the others.
"""

import torch
from torch import Tensor

from laver_megatron.objective.gram import cosine_gram, inner_products
from laver_megatron.objective.similarity import unit_vectors

NEIGHBOURS = 10


def effective_rank(tokens_NH: Tensor) -> Tensor:
    """Number of directions that the tokens fill: exp of the entropy of their singular values, in [1, min(N, H)].

        p_i = s_i / sum_j s_j,   rank = exp(-sum_i p_i log p_i)

    with s the singular values of the unit vectors, not centred: what all tokens share counts as one direction. Roy and
    Vetterli, "The effective rank" (EUSIPCO 2007). NaN for an image of one token.
    """
    if len(tokens_NH) < 2:
        return torch.tensor(torch.nan)
    unit_NH = unit_vectors(tokens_NH).double()
    # The eigenvalues of the smaller product are the squares; in fp64 this is as exact, and many times faster.
    product = unit_NH @ unit_NH.T if len(unit_NH) <= unit_NH.shape[1] else unit_NH.T @ unit_NH
    singular = torch.linalg.eigvalsh(product).clamp(min=0).sqrt()
    return torch.special.entr(singular / singular.sum()).sum().exp().float()


def cknna(tokens_NH: Tensor, features_NE: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """Alignment of the tokens with the encoder's features of the same patches: CKA over mutual nearest neighbours, 1
    where both have the same neighbourhoods.

        K = X X^T, L = Y Y^T of the unit vectors
        a_ij = 1 if j is among the `neighbours` nearest of i in K and in L, j != i, else 0
        CKNNA = HSIC(aK, aL) / sqrt(HSIC(a'K, a'K) HSIC(a''L, a''L))

    where a' and a'' are the neighbours in K and in L alone, and HSIC is the unbiased estimate of Song et al. (JMLR
    2012). Huh et al., "The Platonic Representation Hypothesis" (ICML 2024), appendix A; VIRAL (2025) measures visual
    tokens against the encoder with it. NaN where N <= `neighbours` or N < 4, or an HSIC in the root is not positive.
    """
    num_tokens = len(tokens_NH)
    if num_tokens <= neighbours or num_tokens < 4:
        return torch.tensor(torch.nan)
    kernels = [unit @ unit.T for unit in (unit_vectors(tokens_NH), unit_vectors(features_NE))]
    nearest = [_nearest(kernel_NN, neighbours) for kernel_NN in kernels]
    mutual_NN = nearest[0] * nearest[1]
    own = [_unbiased_hsic(near * kernel, near * kernel) for near, kernel in zip(nearest, kernels, strict=True)]
    shared = _unbiased_hsic(mutual_NN * kernels[0], mutual_NN * kernels[1])
    return shared / (own[0].clamp(min=0) * own[1].clamp(min=0)).sqrt() if min(own) > 0 else torch.tensor(torch.nan)


def _nearest(kernel_NN: Tensor, neighbours: int) -> Tensor:
    """1 at the `neighbours` largest of each row, itself not counted, else 0."""
    others_NN = kernel_NN.clone().fill_diagonal_(-torch.inf)
    return torch.zeros_like(kernel_NN).scatter_(1, others_NN.topk(neighbours, dim=1).indices, 1.0)


def _unbiased_hsic(k_NN: Tensor, l_NN: Tensor) -> Tensor:
    num = len(k_NN)
    k_NN, l_NN = (kernel.clone().fill_diagonal_(0) for kernel in (k_NN, l_NN))
    trace = (k_NN * l_NN.T).sum()
    means = k_NN.sum() * l_NN.sum() / ((num - 1) * (num - 2))
    rows = 2 * (k_NN.sum(0) @ l_NN.sum(1)) / (num - 2)
    return (trace + means - rows) / (num * (num - 3))


def visual_attention_mass(weights_AQK: Tensor, visual_K: Tensor) -> Tensor:
    """Share of its attention that a query gives to visual keys, mean over the heads: `[Q]`, in [0, 1].

    weights_AQK: attention weights, rows that sum to 1. visual_K: which keys are visual, bool.
    """
    return weights_AQK[..., visual_K].sum(-1, dtype=torch.float32).mean(0)


def slope(values_Q: Tensor) -> Tensor:
    """Slope of the least-squares line through values at 0, 1, 2, ...; NaN for fewer than two."""
    if len(values_Q) < 2:
        return torch.tensor(torch.nan)
    place_Q = torch.arange(len(values_Q), dtype=values_Q.dtype, device=values_Q.device)
    place_Q = place_Q - place_Q.mean()
    return (place_Q @ values_Q) / place_Q.square().sum()


def centroid_distance(visual_NH: Tensor, text_MH: Tensor) -> Tensor:
    """Distance between the mean of the visual and the mean of the text tokens' unit vectors, in [0, 2]; NaN where
    either kind is missing."""
    return (unit_vectors(visual_NH).mean(0) - unit_vectors(text_MH).mean(0)).norm()


def silhouette(visual_NH: Tensor, text_MH: Tensor) -> Tensor:
    """Separation of visual from text tokens: mean silhouette over both kinds, in [-1, 1]; 1: two tight clusters far
    apart, 0: mixed.

        s = (b - a) / max(a, b)

    with a a token's mean cosine distance (1 - cosine) to the others of its kind and b that to the other kind. Rousseeuw
    (1987), as in `sklearn.metrics.silhouette_score`. NaN where a kind has fewer than two tokens.
    """
    if min(len(visual_NH), len(text_MH)) < 2:
        return torch.tensor(torch.nan)
    kinds = unit_vectors(visual_NH), unit_vectors(text_MH)
    values = []
    for own, other in (kinds, kinds[::-1]):
        cosines_N = own @ own.sum(0) - own.square().sum(-1)
        within_N = 1 - cosines_N / (len(own) - 1)
        between_N = 1 - own @ other.mean(0)
        values.append((between_N - within_N) / torch.maximum(within_N, between_N).clamp(min=1e-12))
    return torch.cat(values).mean()


def gram_excess(student_NK: Tensor, teacher_NK: Tensor) -> dict[str, Tensor]:
    """What clipping lets through of the Gram matrices of an image (cosines of its visual tokens' logits).

    Over the N (N - 1) pairs of different tokens, with d = G_student - G_teacher:

        share    of pairs with d > 0: those that CGA pushes apart
        positive mean of max(0, d): what CGA sees
        negative mean of max(0, -d): what GA would pull together and CGA leaves alone

    NaN for an image of one token.
    """
    num_tokens = len(student_NK)
    if num_tokens < 2:
        return dict.fromkeys(("share", "positive", "negative"), torch.tensor(torch.nan))
    difference_NN = cosines(student_NK) - cosines(teacher_NK)  # 0 on the diagonal
    num_pairs = num_tokens * (num_tokens - 1)
    return {
        "share": (difference_NN > 0).sum() / num_pairs,
        "positive": difference_NN.clamp(min=0).sum() / num_pairs,
        "negative": (-difference_NN).clamp(min=0).sum() / num_pairs,
    }


def cosines(tokens_NH: Tensor) -> Tensor:
    """Cosines of all pairs of tokens, `[N, N]`."""
    return cosine_gram(inner_products(tokens_NH[None]))[0]


def principal_components(tokens_NH: Tensor, num_components: int) -> Tensor:
    """The tokens along the directions of their largest variance, `[N, num_components]`; 0 where there are fewer.

    Of a direction and its opposite, that is taken in which the token farthest from the mean is positive.
    """
    tokens_NH = tokens_NH.float()
    centred_NH = tokens_NH - tokens_NH.mean(0)
    left_NR, singular_R, _ = torch.linalg.svd(centred_NH, full_matrices=False)
    scores_NR = (left_NR * singular_R)[:, :num_components]
    farthest_R = scores_NR.gather(0, scores_NR.abs().argmax(0, keepdim=True))
    scores_NR = scores_NR * torch.where(farthest_R < 0, -1.0, 1.0)
    return torch.nn.functional.pad(scores_NR, (0, num_components - scores_NR.shape[1]))


def pca_colours(tokens_NH: Tensor, grid: tuple[int, int]) -> Tensor:
    """An image's patches in the colours of their first three principal components, `[rows, columns, 3]` in [0, 1]: like
    colours, like tokens. The tokens' lengths are taken out; each component runs from its lowest to its highest."""
    scores_N3 = principal_components(unit_vectors(tokens_NH), 3)
    low_3, high_3 = scores_N3.amin(0), scores_N3.amax(0)
    return ((scores_N3 - low_3) / (high_3 - low_3).clamp(min=1e-12)).view(*grid, 3)


def patch_similarity(tokens_NH: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """Cosine of every patch to a chosen one (row, column), `[rows, columns]`."""
    unit_NH = unit_vectors(tokens_NH)
    return (unit_NH @ unit_NH[patch[0] * grid[1] + patch[1]]).view(grid)
