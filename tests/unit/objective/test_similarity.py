"""Mean pairwise cosine against loops over pairs, and its sums split over parts."""

import itertools

import pytest
import torch

from laver_megatron.objective.gram import cosine_gram, inner_products, mean_off_diagonal
from laver_megatron.objective.similarity import cosines_of_sums, mean_pairwise_cosine, unit_sums


@pytest.mark.parametrize("num_tokens", [2, 3, 17])
def test_it_is_the_mean_over_pairs(num_tokens):
    tokens_NH = torch.randn(num_tokens, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(num_tokens))
    pairs = list(itertools.permutations(tokens_NH, 2))
    expected = sum(float(torch.cosine_similarity(a, b, dim=0)) for a, b in pairs) / len(pairs)
    assert mean_pairwise_cosine(tokens_NH).item() == pytest.approx(expected, abs=1e-12)
    assert mean_off_diagonal(cosine_gram(inner_products(tokens_NH[None]))).item() == pytest.approx(expected, abs=1e-12)


def test_one_token_has_no_value():
    token_NH = torch.tensor([[0.3, 1.7, -2.0]])
    assert mean_pairwise_cosine(token_NH).isnan()
    assert mean_off_diagonal(cosine_gram(inner_products(token_NH[None]))).isnan()


def test_equal_tokens_of_any_length_have_cosine_one_and_opposite_ones_minus_one():
    assert mean_pairwise_cosine(torch.tensor([[1.0, 2.0], [3.0, 6.0], [1e-3, 2e-3]])).item() == pytest.approx(1)
    assert mean_pairwise_cosine(torch.tensor([[1.0, 2.0], [-2.0, -4.0]])).item() == pytest.approx(-1)


def test_a_token_without_direction_counts_with_cosine_zero():
    tokens_NH = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 0.0]])
    assert mean_pairwise_cosine(tokens_NH).item() == pytest.approx(2 / 6)
    assert mean_off_diagonal(cosine_gram(inner_products(tokens_NH[None]))).item() == pytest.approx(2 / 6)


def test_sums_of_parts_add_up():
    """As on two ranks that hold a part of the tokens each, one of them none of the third image."""
    generator = torch.Generator().manual_seed(1)
    tokens_TH, sizes = torch.randn(12, 6, generator=generator), [5, 1, 6]
    image_T = torch.arange(3).repeat_interleave(torch.tensor(sizes))
    parts = [unit_sums(tokens_TH[part], image_T[part], 3) for part in (slice(0, 4), slice(4, 12))]
    found = cosines_of_sums(parts[0] + parts[1], torch.tensor(sizes))
    expected = torch.stack([mean_pairwise_cosine(own) for own in tokens_TH.split(sizes)])
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_it_is_computed_in_fp32():
    tokens_NH = torch.randn(40, 16, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert mean_pairwise_cosine(tokens_NH).dtype == torch.float32
    torch.testing.assert_close(mean_pairwise_cosine(tokens_NH), mean_pairwise_cosine(tokens_NH.float()))
