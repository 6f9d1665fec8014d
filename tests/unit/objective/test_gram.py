"""Gram-Anchoring against nested loops in fp64."""

import math

import pytest
import torch

from laver_megatron.objective.gram import cosine_gram, gram_losses, inner_products, mean_off_diagonal


def naive_cosines(z_NK):
    rows = z_NK.tolist()
    norms = [math.sqrt(sum(x * x for x in row)) for row in rows]
    directions = [[x / norm for x in row] for row, norm in zip(rows, norms, strict=True)]
    return [[sum(x * y for x, y in zip(a, b, strict=True)) for b in directions] for a in directions]


def naive_loss(student_NK, teacher_NK, kind, reduction):
    student, teacher, total = naive_cosines(student_NK), naive_cosines(teacher_NK), 0.0
    for i in range(len(student)):
        for j in range(len(student)):
            difference = student[i][j] - teacher[i][j]
            total += max(0.0, difference) ** 2 if kind == "cga" else difference**2
    return total / len(student) ** 2 if reduction == "mean" else total


def example(num_tokens=6, width=4):
    generator = torch.Generator().manual_seed(2)
    student_NK = torch.randn(num_tokens, width, generator=generator, dtype=torch.float64) * 3
    teacher_NK = torch.randn(num_tokens, width, generator=generator, dtype=torch.float64)
    return student_NK, teacher_NK


def loss_of(student_NK, teacher_NK, kind="cga", reduction="mean"):
    return gram_losses(
        cosine_gram(inner_products(student_NK)), cosine_gram(inner_products(teacher_NK)), kind, reduction
    )


@pytest.mark.parametrize("kind", ["ga", "cga"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_values_and_gradient(kind, reduction):
    student_NK, teacher_NK = example()
    student_NK.requires_grad_()
    teacher_NK.requires_grad_()
    loss = loss_of(student_NK, teacher_NK, kind, reduction)
    assert loss.item() == pytest.approx(naive_loss(student_NK, teacher_NK, kind, reduction), rel=1e-12)
    loss.backward()
    assert teacher_NK.grad is None
    step = 1e-5
    for token in range(6):
        for component in range(4):
            up, down = student_NK.detach().clone(), student_NK.detach().clone()
            up[token, component] += step
            down[token, component] -= step
            slope = (naive_loss(up, teacher_NK, kind, reduction) - naive_loss(down, teacher_NK, kind, reduction)) / (
                2 * step
            )
            # Central differences: step^2 from the third derivative, 1e-16 / step from rounding.
            assert student_NK.grad[token, component].item() == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_the_gram_matrix_is_of_normalised_rows():
    student_NK, _ = example()
    gram_NN = cosine_gram(inner_products(student_NK))
    expected_NN = torch.tensor(naive_cosines(student_NK), dtype=torch.float64)
    torch.testing.assert_close(gram_NN, expected_NN, rtol=0, atol=1e-14)  # fp64 rounding
    assert (gram_NN.diagonal() == 1).all()
    worked = cosine_gram(inner_products(torch.tensor([[3.0, 0.0], [1.0, 1.0]])))
    assert worked[0, 1].item() == pytest.approx(3 / math.sqrt(18), rel=1e-6)  # fp32 rounding


def two_tokens(cosine):
    return torch.tensor([[1.0, 0.0], [cosine, math.sqrt(1 - cosine**2)]], dtype=torch.float64)


def test_worked_example():
    close, apart = two_tokens(0.9), two_tokens(0.5)
    assert loss_of(close, apart, "ga").item() == pytest.approx(0.08, rel=1e-12)
    assert loss_of(close, apart, "cga").item() == pytest.approx(0.08, rel=1e-12)
    assert loss_of(apart, close, "ga").item() == pytest.approx(0.08, rel=1e-12)
    assert loss_of(apart, close, "cga").item() == 0
    assert loss_of(close, apart, "cga", "sum").item() == pytest.approx(0.32, rel=1e-12)


def test_cga_leaves_a_more_discriminative_student_exactly_alone():
    student_NK = two_tokens(0.5).requires_grad_()
    loss_of(student_NK, two_tokens(0.9), "cga").backward()
    assert (student_NK.grad == 0).all()
    loss_of(student_NK, two_tokens(0.9), "ga").backward()
    assert (student_NK.grad[1] != 0).all()


def test_cga_acts_pair_by_pair():
    """Only the pairs above the teacher's reach the student's similarities."""
    student_NK, teacher_NK = example()
    gram_NN = cosine_gram(inner_products(student_NK)).requires_grad_()
    gram_losses(gram_NN, cosine_gram(inner_products(teacher_NK)), "cga").backward()
    above_NN = gram_NN.detach() > cosine_gram(inner_products(teacher_NK))
    off_diagonal_NN = ~torch.eye(6, dtype=torch.bool)
    assert (gram_NN.grad[~above_NN & off_diagonal_NN] == 0).all()
    assert (gram_NN.grad[above_NN & off_diagonal_NN] > 0).all()
    assert (above_NN & off_diagonal_NN).any() and (~above_NN & off_diagonal_NN).any()


@pytest.mark.parametrize("kind", ["ga", "cga"])
def test_lengths_do_not_matter(kind):
    student_NK, teacher_NK = example()
    lengths_N = torch.tensor([1e-3, 10.0, 1.0, 7.0, 0.1, 300.0], dtype=torch.float64)[:, None]
    torch.testing.assert_close(
        loss_of(student_NK * lengths_N, teacher_NK / lengths_N, kind), loss_of(student_NK, teacher_NK, kind)
    )


@pytest.mark.parametrize("kind", ["ga", "cga"])
def test_zero_rows_give_no_nan_and_no_gradient(kind):
    student_NK, teacher_NK = example()
    student_NK[1] = 0
    teacher_NK[2] = 0
    student_NK.requires_grad_()
    loss = loss_of(student_NK, teacher_NK, kind)
    loss.backward()
    assert loss.isfinite() and student_NK.grad.isfinite().all()
    assert (student_NK.grad[1] == 0).all() and (student_NK.grad[2] != 0).any()
    gram_NN = cosine_gram(inner_products(student_NK))
    assert gram_NN[1].tolist() == [0, 1, 0, 0, 0, 0]
    all_zero = torch.zeros(3, 4, requires_grad=True)
    loss_of(all_zero, torch.zeros(3, 4), kind).backward()
    assert (all_zero.grad == 0).all()


def test_half_precision_is_computed_in_fp32():
    student_NK, teacher_NK = (z_NK.bfloat16() for z_NK in example(8, 64))
    assert inner_products(student_NK).dtype == torch.float32
    expected = naive_loss(student_NK, teacher_NK, "cga", "mean")
    assert loss_of(student_NK, teacher_NK).item() == pytest.approx(expected, rel=1e-5)  # bf16 would be off by 1e-2


def test_mean_off_diagonal():
    student_NK, _ = example()
    cosines = naive_cosines(student_NK)
    expected = sum(cosines[i][j] for i in range(6) for j in range(6) if i != j) / 30
    assert mean_off_diagonal(cosine_gram(inner_products(student_NK))).item() == pytest.approx(expected, rel=1e-12)
    collapsed = cosine_gram(inner_products(torch.ones(5, 3)))
    assert mean_off_diagonal(collapsed).item() == pytest.approx(1, rel=1e-6)  # fp32 rounding


def test_refusals():
    inner_NN = torch.eye(2)
    with pytest.raises(ValueError, match="cga"):
        gram_losses(inner_NN, inner_NN, "none")
    with pytest.raises(ValueError, match="mean"):
        gram_losses(inner_NN, inner_NN, "ga", "none")


@pytest.mark.parametrize("kind", ["ga", "cga"])
def test_many_images_at_once_are_each_by_itself(kind):
    pairs = [example(), tuple(z_NK.flip(0) for z_NK in example()), tuple(z_NK + 1 for z_NK in example())]
    student_INK, teacher_INK = (torch.stack(z_of_images) for z_of_images in zip(*pairs, strict=True))
    losses_I = loss_of(student_INK, teacher_INK, kind)
    expected = [naive_loss(student_NK, teacher_NK, kind, "mean") for student_NK, teacher_NK in pairs]
    assert losses_I.tolist() == pytest.approx(expected, rel=1e-12)
    similarity_I = mean_off_diagonal(cosine_gram(inner_products(student_INK)))
    one_by_one = [mean_off_diagonal(cosine_gram(inner_products(student_NK))).item() for student_NK, _ in pairs]
    assert similarity_I.tolist() == pytest.approx(one_by_one, rel=1e-12)
