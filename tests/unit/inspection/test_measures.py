"""Every measure against its formula in plain loops, numpy or scikit-learn, and at values that are known."""

import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score

from laver_megatron.inspection import measures


def tokens(num: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(num, width, generator=torch.Generator().manual_seed(seed)) + 0.5


def unit(tokens_NH: torch.Tensor) -> np.ndarray:
    values = tokens_NH.double().numpy()
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def test_effective_rank_is_the_entropy_of_the_singular_values():
    tokens_NH = tokens(9, 5, 1)
    shares = np.linalg.svd(unit(tokens_NH), compute_uv=False)
    shares /= shares.sum()
    assert measures.effective_rank(tokens_NH).item() == pytest.approx(math.exp(-(shares * np.log(shares)).sum()))


def test_effective_rank_of_known_tokens():
    assert measures.effective_rank(torch.tensor([[1.0, 1.0]] * 7)).item() == pytest.approx(1, abs=1e-3)
    assert measures.effective_rank(3 * torch.eye(6)).item() == pytest.approx(6)
    assert measures.effective_rank(torch.ones(1, 4)).isnan()


def cknna_in_loops(x_NH: np.ndarray, y_NE: np.ndarray, neighbours: int) -> float:
    """Element by element, with Song et al.'s unbiased estimate as sums over different indices."""
    num = len(x_NH)
    kernels = [x_NH @ x_NH.T, y_NE @ y_NE.T]
    near = [
        {(i, j) for i in range(num) for j in sorted(set(range(num)) - {i}, key=lambda j: -kernel[i, j])[:neighbours]}
        for kernel in kernels
    ]

    def hsic(k, other):
        trace = sum(k[i, j] * other[j, i] for i in range(num) for j in range(num))
        product = k.sum() * other.sum() / ((num - 1) * (num - 2))
        path = sum(k[i, j] * other[j, m] for i in range(num) for j in range(num) for m in range(num)) * 2 / (num - 2)
        return (trace + product - path) / (num * (num - 3))

    def kept(kernel, pairs):
        return np.array([[kernel[i, j] if (i, j) in pairs else 0.0 for j in range(num)] for i in range(num)])

    shared = hsic(kept(kernels[0], near[0] & near[1]), kept(kernels[1], near[0] & near[1]))
    own = [hsic(kept(kernel, pairs), kept(kernel, pairs)) for kernel, pairs in zip(kernels, near, strict=True)]
    return shared / math.sqrt(own[0] * own[1])


@pytest.mark.parametrize("neighbours", [2, 4, 11])
def test_cknna_is_that_of_the_definition(neighbours):
    x_NH, y_NE = tokens(14, 6, 2), tokens(14, 9, 3)
    y_NE[:, :6] += x_NH  # some neighbours in common
    expected = cknna_in_loops(unit(x_NH), unit(y_NE), neighbours)
    assert measures.cknna(x_NH, y_NE, neighbours).item() == pytest.approx(expected, abs=1e-5)


def test_cknna_of_known_features():
    x_NH = tokens(30, 8, 4)
    rotation = torch.linalg.qr(tokens(8, 8, 5)).Q
    assert measures.cknna(x_NH, 7 * x_NH @ rotation).item() == pytest.approx(1, abs=1e-4)
    assert abs(measures.cknna(x_NH, tokens(30, 8, 6)).item()) < 0.5
    assert measures.cknna(x_NH[:10], x_NH[:10], neighbours=10).isnan(), "more neighbours than others"


def test_attention_mass_is_the_share_of_visual_keys():
    weights_AQK = torch.softmax(tokens(2 * 3 * 5, 1, 7).view(2, 3, 5), -1)
    visual_K = torch.tensor([False, True, True, False, False])
    mass_Q = measures.visual_attention_mass(weights_AQK, visual_K)
    for query in range(3):
        expected = sum(float(weights_AQK[head, query, key]) for head in range(2) for key in (1, 2)) / 2
        assert mass_Q[query].item() == pytest.approx(expected)
    assert measures.visual_attention_mass(weights_AQK, torch.ones(5, dtype=torch.bool)).tolist() == pytest.approx(
        [1] * 3
    )


def test_slope_is_that_of_the_least_squares_line():
    values_Q = torch.tensor([0.5, 0.4, 0.45, 0.1])
    assert measures.slope(values_Q).item() == pytest.approx(np.polyfit(range(4), values_Q.numpy(), 1)[0])
    assert measures.slope(values_Q[:1]).isnan()


def test_separation_is_that_of_scikit_learn():
    visual_NH, text_MH = tokens(12, 6, 8), tokens(7, 6, 9) - 1.5
    together, kinds = np.concatenate([visual_NH, text_MH]), [0] * 12 + [1] * 7
    expected = silhouette_score(together, kinds, metric="cosine")
    assert measures.silhouette(visual_NH, text_MH).item() == pytest.approx(expected, abs=1e-5)
    distance = np.linalg.norm(unit(visual_NH).mean(0) - unit(text_MH).mean(0))
    assert measures.centroid_distance(visual_NH, text_MH).item() == pytest.approx(distance)
    assert (
        measures.silhouette(visual_NH, text_MH[:1]).isnan()
        and measures.centroid_distance(visual_NH, text_MH[:0]).isnan()
    )


def test_what_clipping_lets_through_is_counted_over_pairs():
    student_NK, teacher_NK = tokens(6, 4, 10), tokens(6, 4, 11)
    student, teacher = (unit(logits) @ unit(logits).T for logits in (student_NK, teacher_NK))
    differences = [student[i, j] - teacher[i, j] for i in range(6) for j in range(6) if i != j]
    found = measures.gram_excess(student_NK, teacher_NK)
    assert found["share"].item() == pytest.approx(sum(d > 0 for d in differences) / 30)
    assert found["positive"].item() == pytest.approx(sum(max(d, 0) for d in differences) / 30, abs=1e-6)
    assert found["negative"].item() == pytest.approx(sum(max(-d, 0) for d in differences) / 30, abs=1e-6)
    assert all(value.isnan() for value in measures.gram_excess(student_NK[:1], teacher_NK[:1]).values())


def test_principal_components_are_those_of_scikit_learn():
    tokens_NH = tokens(20, 6, 12)
    expected = PCA(3, svd_solver="full").fit_transform(tokens_NH.double().numpy())
    found = measures.principal_components(tokens_NH, 3).numpy()
    np.testing.assert_allclose(abs(found), abs(expected), atol=1e-4)
    assert (found[abs(found).argmax(0), range(3)] > 0).all()
    assert measures.principal_components(tokens_NH[:2], 3)[:, 2].tolist() == [0, 0]


def test_colours_run_over_the_whole_range_and_equal_tokens_share_one():
    tokens_NH = tokens(6, 5, 13)
    tokens_NH[4] = 3 * tokens_NH[1]
    colours = measures.pca_colours(tokens_NH, (2, 3))
    assert colours.shape == (2, 3, 3)
    assert colours.amin((0, 1)).tolist() == pytest.approx([0] * 3) and colours.amax((0, 1)).tolist() == pytest.approx(
        [1] * 3
    )
    torch.testing.assert_close(colours[1, 1], colours[0, 1])


def test_the_similarity_map_is_the_cosine_to_the_patch():
    tokens_NH = tokens(6, 5, 14)
    found = measures.patch_similarity(tokens_NH, (2, 3), (1, 0))
    expected = torch.cosine_similarity(tokens_NH, tokens_NH[3], dim=-1).view(2, 3)
    torch.testing.assert_close(found, expected)
