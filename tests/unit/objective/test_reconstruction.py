"""Reconstruction losses, entropies and the centre against nested loops in fp64."""

import math

import pytest
import torch

from laver_megatron.objective.reconstruction import reconstruction_losses, teacher_entropies, updated_centre

TEMPERATURES = {"student_temperature": 0.1, "teacher_temperature": 0.04}


def naive_softmax(row, temperature):
    largest = max(row)
    weights = [math.exp((x - largest) / temperature) for x in row]
    return [weight / sum(weights) for weight in weights]


def naive_losses(student_TK, teacher_TK, centre_K, student_temperature, teacher_temperature):
    centre = [0.0] * student_TK.shape[1] if centre_K is None else centre_K.tolist()
    losses = []
    for student, teacher in zip(student_TK.tolist(), teacher_TK.tolist(), strict=True):
        target = naive_softmax([t - c for t, c in zip(teacher, centre, strict=True)], teacher_temperature)
        prediction = naive_softmax(student, student_temperature)
        losses.append(-sum(q * math.log(p) for q, p in zip(target, prediction, strict=True)))
    return losses


def example(num_tokens=5, width=7):
    generator = torch.Generator().manual_seed(1)
    student_TK = torch.randn(num_tokens, width, generator=generator, dtype=torch.float64) * 0.3
    teacher_TK = torch.randn(num_tokens, width, generator=generator, dtype=torch.float64) * 0.3
    centre_K = torch.randn(width, generator=generator, dtype=torch.float64) * 0.1
    return student_TK, teacher_TK, centre_K


@pytest.mark.parametrize("centred", [False, True])
def test_values_and_gradient(centred):
    student_TK, teacher_TK, centre_K = example()
    centre_K = centre_K if centred else None
    student_TK.requires_grad_()
    teacher_TK.requires_grad_()
    losses_T = reconstruction_losses(student_TK, teacher_TK, centre_K=centre_K, **TEMPERATURES)
    expected = naive_losses(student_TK, teacher_TK, centre_K, 0.1, 0.04)
    assert losses_T.tolist() == pytest.approx(expected, rel=1e-12)  # fp64 rounding
    weight_T = torch.arange(1.0, 6.0, dtype=torch.float64)
    (losses_T * weight_T).sum().backward()
    for token in range(5):
        shift_K = centre_K if centred else torch.zeros(7, dtype=torch.float64)
        target = naive_softmax((teacher_TK[token] - shift_K).tolist(), 0.04)
        prediction = naive_softmax(student_TK[token].tolist(), 0.1)
        expected_K = [weight_T[token].item() * (p - q) / 0.1 for p, q in zip(prediction, target, strict=True)]
        assert student_TK.grad[token].tolist() == pytest.approx(expected_K, abs=1e-12)  # fp64 rounding
    assert teacher_TK.grad is None


def test_worked_example():
    student_TK, teacher_TK = torch.zeros(1, 2), torch.tensor([[0.04 * math.log(3), 0.0]])
    loss = reconstruction_losses(student_TK, teacher_TK, centre_K=None, **TEMPERATURES)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)  # fp32 rounding
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert teacher_entropies(teacher_TK, None, 0.04).item() == pytest.approx(entropy, rel=1e-6)


def test_least_at_the_teacher():
    """A student with the teacher's distribution loses its entropy, and has no gradient."""
    _, teacher_TK, centre_K = example()
    student_TK = ((teacher_TK - centre_K) * 0.1 / 0.04).requires_grad_()
    losses_T = reconstruction_losses(student_TK, teacher_TK, centre_K=centre_K, **TEMPERATURES)
    torch.testing.assert_close(losses_T, teacher_entropies(teacher_TK, centre_K, 0.04), rtol=1e-12, atol=1e-12)
    losses_T.sum().backward()
    assert student_TK.grad.abs().max() < 1e-12  # fp64 rounding


def test_half_precision_is_computed_in_fp32():
    student_TK, teacher_TK, centre_K = example()
    student_TK, teacher_TK, centre_K = student_TK.bfloat16(), teacher_TK.bfloat16(), centre_K.float()
    losses_T = reconstruction_losses(student_TK, teacher_TK, centre_K=centre_K, **TEMPERATURES)
    assert losses_T.dtype == torch.float32
    expected = naive_losses(student_TK, teacher_TK, centre_K, 0.1, 0.04)
    assert losses_T.tolist() == pytest.approx(expected, rel=1e-5)  # fp32 logits / 0.04, bf16 would be off by 1e-2


def test_large_logits_stay_finite():
    student_TK = torch.tensor([[1e4, 0.0], [0.0, -1e4]], requires_grad=True)
    losses_T = reconstruction_losses(student_TK, student_TK.detach(), centre_K=None, **TEMPERATURES)
    losses_T.sum().backward()
    assert losses_T.tolist() == [0, 0]
    assert student_TK.grad.isfinite().all()
    assert teacher_entropies(student_TK, None, 0.04).tolist() == [0, 0]


def test_no_token():
    losses_T = reconstruction_losses(torch.empty(0, 3), torch.empty(0, 3), centre_K=None, **TEMPERATURES)
    assert losses_T.shape == (0,) and losses_T.sum() == 0


def test_entropies():
    _, teacher_TK, centre_K = example()
    for centre in (None, centre_K):
        expected = naive_losses(teacher_TK, teacher_TK, None, 0.04, 0.04)
        if centre is not None:
            expected = naive_losses(teacher_TK - centre, teacher_TK, centre, 0.04, 0.04)
        assert teacher_entropies(teacher_TK, centre, 0.04).tolist() == pytest.approx(expected, rel=1e-12)
    uniform = teacher_entropies(torch.full((2, 9), 3.0), None, 0.04)
    assert uniform.tolist() == pytest.approx([math.log(9)] * 2, rel=1e-6)  # fp32 rounding


def test_centre():
    centre_K, mean_K = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.0])
    new_K = updated_centre(centre_K, mean_K, 0.9)
    assert new_K.tolist() == pytest.approx([1.2, -1.8], rel=1e-6)  # fp32 rounding
    assert centre_K.tolist() == [1.0, -2.0]
    assert updated_centre(centre_K, mean_K.bfloat16(), 0.9).dtype == torch.float32
