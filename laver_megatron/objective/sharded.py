"""The objective for logits whose last dimension is split over a tensor-parallel group.

Letters: T tokens, W words of the vocabulary on this rank, K logits of the vision head on this rank, N visual
tokens of one image.

Every function takes this rank's part and returns the complete result, the same on all ranks of the group.
Gradients follow Megatron's rule for replicated results: a sum over the group has the identity as its
backward. So let every rank compute the same loss from the result and call backward on it, divided by nothing;
each rank then holds the exact gradient of its own part. All ranks of the group must call together, with the
same T or N. With `group` None or of size one there is no communication and the result is that of the
unsharded function.
"""

from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup

from laver_megatron.objective import at_least_fp32
from laver_megatron.objective.gram import inner_products
from laver_megatron.objective.language import IGNORE_LABEL
from laver_megatron.objective.reconstruction import (
    reconstruction_losses,
    scaled_teacher_logits,
    teacher_entropies,
)
from laver_megatron.objective.regression import LAYER_NORM_EPS, smooth_l1_losses, standardised


def sharded_language_losses(logits_TW: Tensor, labels_T: Tensor, group: ProcessGroup | None) -> Tensor:
    """`language.language_losses` for vocabulary-parallel logits: rank r holds words [r W, (r + 1) W).

    `labels_T` are global word ids or IGNORE_LABEL. Computed in fp32 (fp64 for fp64 logits) a few rows at a time: there
    is never an fp32 copy of all logits, and what is kept for the backward pass are the logits as they came.
    """
    first_word = group.rank() * logits_TW.shape[1] if _is_sharded(group) else 0
    return _CrossEntropy.apply(logits_TW, labels_T, first_word, group)


@torch.no_grad()
def sharded_is_likeliest(logits_TW: Tensor, labels_T: Tensor, group: ProcessGroup | None) -> Tensor:
    """Whether the label is the word with the largest logit, of equal ones the first: bool `[T]`, False where the label
    is IGNORE_LABEL. Two numbers a token cross the group."""
    first_word = group.rank() * logits_TW.shape[1] if _is_sharded(group) else 0
    word_T = logits_TW.argmax(-1)
    largest_T = logits_TW.gather(1, word_T[:, None]).squeeze(1)
    word_T = word_T + first_word
    if _is_sharded(group):
        of_all_T = at_least_fp32(largest_T).clone()
        dist.all_reduce(of_all_T, op=dist.ReduceOp.MAX, group=group)
        word_T = word_T.where(largest_T == of_all_T, torch.iinfo(torch.int64).max)
        dist.all_reduce(word_T, op=dist.ReduceOp.MIN, group=group)
    return word_T == labels_T


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TW: Tensor, labels_T: Tensor, first_word: int, group: ProcessGroup | None) -> Tensor:
        num_words = logits_TW.shape[1]
        words_T = labels_T - first_word
        is_here_T = (labels_T != IGNORE_LABEL) & (words_T >= 0) & (words_T < num_words)
        words_T = words_T.clamp(0, num_words - 1)
        log_sum_T = torch.cat([torch.logsumexp(rows_CW, -1) for rows_CW in _rows_in_fp32(logits_TW)])
        label_logits_T = at_least_fp32(logits_TW.gather(1, words_T[:, None]).squeeze(1)).where(is_here_T, 0.0)
        if _is_sharded(group):
            largest_T = log_sum_T.clone()
            dist.all_reduce(largest_T, op=dist.ReduceOp.MAX, group=group)
            sums_2T = torch.stack([(log_sum_T - largest_T).exp(), label_logits_T])
            dist.all_reduce(sums_2T, group=group)
            log_sum_T, label_logits_T = sums_2T[0].log() + largest_T, sums_2T[1]
        ctx.save_for_backward(logits_TW, log_sum_T, labels_T != IGNORE_LABEL, is_here_T, words_T)
        return (log_sum_T - label_logits_T).where(labels_T != IGNORE_LABEL, 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """softmax - 1 at the label, times the gradient of the loss; 0 where there is no label."""
        logits_TW, log_sum_T, has_label_T, is_here_T, words_T = ctx.saved_tensors
        weight_T = gradients[0].where(has_label_T, 0.0)
        gradient_TW = torch.empty_like(logits_TW)
        start = 0
        for rows_CW in _rows_in_fp32(logits_TW):
            part = slice(start, start + len(rows_CW))
            softmax_CW = (rows_CW - log_sum_T[part, None]).exp_().mul_(weight_T[part, None])
            softmax_CW.scatter_add_(1, words_T[part, None], -(weight_T[part] * is_here_T[part])[:, None])
            gradient_TW[part] = softmax_CW
            start = part.stop
        return gradient_TW, None, None, None


# Logits that are in fp32 at a time: 64 MB.
_FP32_LOGITS = 1 << 24


def _rows_in_fp32(logits_TW: Tensor) -> Iterator[Tensor]:
    for rows_CW in logits_TW.split(max(_FP32_LOGITS // logits_TW.shape[1], 1)):
        yield at_least_fp32(rows_CW)


def sharded_reconstruction_losses(
    student_TK: Tensor,
    teacher_TK: Tensor,
    group: ProcessGroup | None,
    *,
    centre_K: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """`reconstruction.reconstruction_losses` for logits (and centre) split over the group.

    With s and t the scaled logits less their maximum, and since the target sums to one,

        loss = log sum_k exp(s_k)  -  sum_k exp(t_k) s_k / sum_k exp(t_k)

    so one all-reduce of two maxima and one of three sums per token are enough. The gradient of this rank's
    part is (softmax(student / tau_stu) - target) / tau_stu, as without sharding.
    """
    if not _is_sharded(group):
        return reconstruction_losses(
            student_TK,
            teacher_TK,
            centre_K=centre_K,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
        )
    student_TK = at_least_fp32(student_TK) / student_temperature
    teacher_TK = scaled_teacher_logits(teacher_TK, centre_K, teacher_temperature)
    student_max_T, teacher_max_T = _maxima(group, student_TK, teacher_TK)
    student_TK = student_TK - student_max_T[:, None]
    weight_TK = (teacher_TK - teacher_max_T[:, None]).exp()
    student_sum_T, weight_sum_T, dot_T = _sums(group, student_TK.exp(), weight_TK, weight_TK * student_TK)
    return student_sum_T.log() - dot_T / weight_sum_T


def sharded_smooth_l1_losses(prediction_TK: Tensor, target_TK: Tensor, group: ProcessGroup | None) -> Tensor:
    """`regression.smooth_l1_losses` for predictions and targets split over the group."""
    losses_T = smooth_l1_losses(prediction_TK, target_TK)
    if not _is_sharded(group):
        return losses_T
    # All parts are of one size, so the mean of their means is that of all.
    return reduce_from_tensor_model_parallel_region(losses_T / group.size(), group=group)


@torch.no_grad()
def sharded_standardised(outputs_TK: Tensor, group: ProcessGroup | None) -> Tensor:
    """`regression.standardised` for outputs split over the group: this rank's part. The mean is taken off before
    squares are summed, which in fp32 would otherwise leave nothing of a small variance around a large mean."""
    if not _is_sharded(group):
        return standardised(outputs_TK)
    outputs_TK, size = at_least_fp32(outputs_TK), outputs_TK.shape[-1] * group.size()
    (sum_T,) = _sums(group, outputs_TK)
    centred_TK = outputs_TK - sum_T[:, None] / size
    (squares_T,) = _sums(group, centred_TK.square())
    return centred_TK * (squares_T[:, None] / size + LAYER_NORM_EPS).rsqrt()


@torch.no_grad()
def sharded_teacher_entropies(
    teacher_TK: Tensor, centre_K: Tensor | None, teacher_temperature: float, group: ProcessGroup | None
) -> Tensor:
    """`reconstruction.teacher_entropies` for logits (and centre) split over the group."""
    if not _is_sharded(group):
        return teacher_entropies(teacher_TK, centre_K, teacher_temperature)
    teacher_TK = scaled_teacher_logits(teacher_TK, centre_K, teacher_temperature)
    (max_T,) = _maxima(group, teacher_TK)
    teacher_TK = teacher_TK - max_T[:, None]
    weight_TK = teacher_TK.exp()
    weight_sum_T, dot_T = _sums(group, weight_TK, weight_TK * teacher_TK)
    return weight_sum_T.log() - dot_T / weight_sum_T


def sharded_inner_products(z_of_sizes: list[Tensor], group: ProcessGroup | None) -> list[Tensor]:
    """`gram.inner_products` of images of several sizes, [I, N, K] each, with one all-reduce for all of them.

    The student's and the teacher's logits may share the call; the teacher's get no gradient if they require none. The
    list must have the same shapes on all ranks; an empty list returns [] without communication.
    """
    partial_products = [inner_products(z_INK) for z_INK in z_of_sizes]
    if not partial_products or not _is_sharded(group):
        return partial_products
    flat = torch.cat([inner_INN.flatten() for inner_INN in partial_products])
    flat = reduce_from_tensor_model_parallel_region(flat, group=group)
    parts = flat.split([inner_INN.numel() for inner_INN in partial_products])
    return [part.view_as(inner_INN) for part, inner_INN in zip(parts, partial_products, strict=True)]


def _is_sharded(group: ProcessGroup | None) -> TypeGuard[ProcessGroup]:
    return group is not None and group.size() > 1


@torch.no_grad()
def _maxima(group: ProcessGroup, *tensors_TK: Tensor) -> tuple[Tensor, ...]:
    """The maximum of every token over the group, for several tensors in one all-reduce. A shift, so without
    gradient.
    """
    maxima = torch.stack([tensor_TK.amax(dim=-1) for tensor_TK in tensors_TK])
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=group)
    return maxima.unbind()


def _sums(group: ProcessGroup, *tensors_TK: Tensor) -> tuple[Tensor, ...]:
    """The sum of every token over the group, for several tensors in one all-reduce.

    The stack is a fresh, contiguous tensor that no earlier backward has saved: Megatron's all-reduce works in
    place, and on a copy that it drops if its input is not contiguous.
    """
    sums = torch.stack([tensor_TK.sum(dim=-1) for tensor_TK in tensors_TK])
    return reduce_from_tensor_model_parallel_region(sums, group=group).unbind()
