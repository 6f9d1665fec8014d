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

from typing import TypeGuard

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    reduce_from_tensor_model_parallel_region,
    vocab_parallel_cross_entropy,
)
from torch import Tensor
from torch.distributed import ProcessGroup

from laver_megatron.objective import at_least_fp32
from laver_megatron.objective.gram import inner_products
from laver_megatron.objective.language import IGNORE_LABEL, language_losses
from laver_megatron.objective.reconstruction import (
    reconstruction_losses,
    scaled_teacher_logits,
    teacher_entropies,
)


def sharded_language_losses(logits_TW: Tensor, labels_T: Tensor, group: ProcessGroup | None) -> Tensor:
    """`language.language_losses` for vocabulary-parallel logits: rank r holds words [r W, (r + 1) W).

    `labels_T` are global word ids or IGNORE_LABEL. `group` must be Megatron's tensor-parallel group: the
    cross-entropy of megatron-core 0.16 knows no other. Always fp32 inside, fp64 logits included. The logits
    are left as they are.
    """
    if not _is_sharded(group):
        return language_losses(logits_TW, labels_T)
    megatron_group = parallel_state.get_tensor_model_parallel_group()
    assert dist.get_process_group_ranks(group) == dist.get_process_group_ranks(megatron_group), (
        "Megatron's cross-entropy reduces over the group of parallel_state, not over the one given"
    )
    # Megatron works in place on what `.float()` gives, which is the caller's own tensor if that is in fp32.
    logits_TW = logits_TW.clone() if logits_TW.dtype == torch.float32 else logits_TW.float()
    has_label_T = labels_T != IGNORE_LABEL
    losses_T = vocab_parallel_cross_entropy(logits_TW, labels_T.where(has_label_T, 0))
    return losses_T.where(has_label_T, 0.0)


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


def sharded_inner_products_of_images(z_of_images: list[Tensor], group: ProcessGroup | None) -> list[Tensor]:
    """`gram.inner_products` of many images, [N_i, K] each, with one all-reduce for all of them.

    Images may differ in N. The student's and the teacher's logits may share the call; the teacher's get no
    gradient if they require none. The list must have the same lengths N_i on all ranks; an empty list returns
    [] without communication.
    """
    partial_products = [inner_products(z_NK) for z_NK in z_of_images]
    if not partial_products or not _is_sharded(group):
        return partial_products
    flat = torch.cat([inner_NN.flatten() for inner_NN in partial_products])
    flat = reduce_from_tensor_model_parallel_region(flat, group=group)
    parts = flat.split([inner_NN.numel() for inner_NN in partial_products])
    return [part.view_as(inner_NN) for part, inner_NN in zip(parts, partial_products, strict=True)]


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
