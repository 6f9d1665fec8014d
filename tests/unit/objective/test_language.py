"""Language losses against nested loops in fp64."""

import math

import pytest
import torch

from laver_megatron.objective.language import IGNORE_LABEL, language_losses


def naive_losses(logits_TW, labels_T):
    losses = []
    for row, label in zip(logits_TW.tolist(), labels_T.tolist(), strict=True):
        if label == IGNORE_LABEL:
            losses.append(0.0)
        else:
            losses.append(math.log(sum(math.exp(x) for x in row)) - row[label])
    return losses


def example():
    generator = torch.Generator().manual_seed(0)
    logits_TW = torch.randn(6, 11, generator=generator, dtype=torch.float64) * 3
    labels_T = torch.tensor([4, IGNORE_LABEL, 0, 10, IGNORE_LABEL, 7])
    return logits_TW, labels_T


def test_values_and_gradient():
    logits_TW, labels_T = example()
    logits_TW.requires_grad_()
    losses_T = language_losses(logits_TW, labels_T)
    assert losses_T.dtype == torch.float64
    assert losses_T.tolist() == pytest.approx(naive_losses(logits_TW, labels_T), abs=1e-13)  # fp64 rounding
    weight_T = torch.arange(1.0, 7.0, dtype=torch.float64)
    (losses_T * weight_T).sum().backward()
    expected_TW = torch.softmax(logits_TW.detach(), -1)
    for token, label in enumerate(labels_T.tolist()):
        if label == IGNORE_LABEL:
            expected_TW[token] = 0
        else:
            expected_TW[token, label] -= 1
    expected_TW *= weight_T[:, None]
    torch.testing.assert_close(logits_TW.grad, expected_TW, rtol=0, atol=1e-13)  # fp64 rounding
    assert (logits_TW.grad[labels_T == IGNORE_LABEL] == 0).all()


def test_half_precision_is_computed_in_fp32():
    logits_TW, labels_T = example()
    logits_TW = logits_TW.bfloat16()
    losses_T = language_losses(logits_TW, labels_T)
    assert losses_T.dtype == torch.float32
    # Against the same rounded logits in fp64: fp32 rounding only, bf16 arithmetic would be off by 1e-2.
    torch.testing.assert_close(losses_T.double(), language_losses(logits_TW.double(), labels_T), rtol=1e-6, atol=1e-6)


def test_nothing_to_learn():
    logits_TW = torch.randn(3, 5, requires_grad=True)
    losses_T = language_losses(logits_TW, torch.full((3,), IGNORE_LABEL))
    losses_T.sum().backward()
    assert losses_T.tolist() == [0, 0, 0]
    assert (logits_TW.grad == 0).all()
    assert language_losses(torch.empty(0, 5), torch.empty(0, dtype=torch.int64)).shape == (0,)
