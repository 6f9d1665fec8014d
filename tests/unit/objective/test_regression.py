"""Smooth L1 and its targets against nested loops in fp64."""

import math

import pytest
import torch

from laver_megatron.objective.regression import normalised_pixels, smooth_l1_losses, standardised


def naive_losses(prediction_TK, target_TK):
    losses = []
    for prediction, target in zip(prediction_TK.tolist(), target_TK.tolist(), strict=True):
        distances = [abs(p - t) for p, t in zip(prediction, target, strict=True)]
        losses.append(sum(d * d / 2 if d < 1 else d - 0.5 for d in distances) / len(distances))
    return losses


def naive_normalised(row, *, unbiased, eps):
    mean = sum(row) / len(row)
    variance = sum((x - mean) ** 2 for x in row) / (len(row) - unbiased)
    return [(x - mean) / math.sqrt(variance + eps) for x in row]


def example(scale=1.5):
    generator = torch.Generator().manual_seed(2)
    return (scale * torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))


def test_values_and_gradient():
    prediction_TK, target_TK = example()
    prediction_TK.requires_grad_()
    target_TK.requires_grad_()
    losses_T = smooth_l1_losses(prediction_TK, target_TK)
    assert losses_T.tolist() == pytest.approx(naive_losses(prediction_TK, target_TK), rel=1e-12)  # fp64 rounding
    losses_T.sum().backward()
    difference_TK = (prediction_TK - target_TK).detach()
    assert (difference_TK.abs() < 1).any() and (difference_TK.abs() > 1).any()  # both sides of the bend
    torch.testing.assert_close(prediction_TK.grad, difference_TK.clamp(-1, 1) / 7)
    assert target_TK.grad is None


def test_worked_example():
    loss = smooth_l1_losses(torch.zeros(1, 2), torch.tensor([[0.5, 2.0]]))
    assert loss.item() == 0.8125
    assert smooth_l1_losses(torch.zeros(1, 2, dtype=torch.bfloat16), torch.ones(1, 2)).dtype == torch.float32


@pytest.mark.parametrize(
    "function, unbiased, eps",
    [(standardised, False, 1e-5), (normalised_pixels, True, 1e-6)],
    ids=["standardised", "pixels"],
)
@pytest.mark.parametrize("scale", [1.5, 1e-3])
def test_normalised_targets(function, unbiased, eps, scale):
    """A token of one colour becomes 0, and a faint one does not become noise."""
    rows_TK, _ = example(scale)
    rows_TK[2] = 0.7
    rows_TK.requires_grad_()
    found_TK = function(rows_TK)
    expected = [naive_normalised(row, unbiased=unbiased, eps=eps) for row in rows_TK.tolist()]
    torch.testing.assert_close(found_TK, torch.tensor(expected, dtype=torch.float64))
    assert not found_TK.requires_grad and found_TK[2].abs().max() < 1e-9
