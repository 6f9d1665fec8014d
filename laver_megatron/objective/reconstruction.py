"""L_MIM: the student predicts the teacher's output at masked tokens; the teacher sees the whole image.

Letters: T tokens (the caller selects the masked ones), K width of the vision head's logits.
"""

import torch
from torch import Tensor

from laver_megatron.objective import at_least_fp32


def reconstruction_losses(
    student_TK: Tensor,
    teacher_TK: Tensor,
    *,
    centre_K: Tensor | None,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """Cross-entropy of every token between teacher and student:

        loss_i = - sum_k softmax((teacher_i - centre) / tau_tea)_k  log softmax(student_i / tau_stu)_k

    This is one term of the paper's L_MIM, which prints a sum over the masked positions P_M; ours is their
    mean over the global batch (the caller sums and divides). The paper has no centre; the official code
    subtracts one, as DINO does: pass None or a tensor. The least value of a loss is not 0 but the entropy of
    the teacher's distribution, see `teacher_entropies`.

    Args:
        student_TK, teacher_TK: [T, K] logits in any float dtype. The teacher is detached.
        centre_K: [K] or None for no centre.
        student_temperature, teacher_temperature: positive; 0.1 and 0.04 in the official settings.

    Returns:
        [T], fp32 (fp64 for fp64 logits), in nats, per token. The gradient is
        (softmax(student / tau_stu) - target) / tau_stu.

    Example: two logits, teacher [0.04 ln 3, 0] has the target [3/4, 1/4] at 0.04; a student that
    answers [0, 0] loses ln 2.
    """
    target_TK = _teacher_log_probabilities(teacher_TK, centre_K, teacher_temperature).exp()
    prediction_TK = torch.log_softmax(at_least_fp32(student_TK) / student_temperature, dim=-1)
    return -(target_TK * prediction_TK).sum(dim=-1)


@torch.no_grad()
def teacher_entropies(teacher_TK: Tensor, centre_K: Tensor | None, teacher_temperature: float) -> Tensor:
    """Entropy [T], in nats, of the teacher's distribution of every token; a monitor, without gradient.

    Between 0 (all weight on one logit) and ln K (uniform). A teacher that has collapsed shows as either end:
    near ln K it teaches nothing, near 0 with the same winner everywhere it teaches one answer.
    """
    log_target_TK = _teacher_log_probabilities(teacher_TK, centre_K, teacher_temperature)
    return -(log_target_TK.exp() * log_target_TK).sum(dim=-1)


@torch.no_grad()
def updated_centre(centre_K: Tensor, mean_K: Tensor, momentum: float) -> Tensor:
    """The centre after one step: momentum * centre + (1 - momentum) * mean, as a new tensor
    of the centre's dtype.

    `mean_K` is the mean of the teacher's raw logits over all visual tokens (hidden or not) of the global
    batch, so the caller reduces it first. Every logit has a centre of its own, so with K sharded each rank
    updates its own part.
    """
    return (momentum * at_least_fp32(centre_K) + (1 - momentum) * at_least_fp32(mean_K)).to(centre_K.dtype)


@torch.no_grad()
def scaled_teacher_logits(teacher_TK: Tensor, centre_K: Tensor | None, teacher_temperature: float) -> Tensor:
    """(teacher - centre) / tau_tea, detached: the logits of the target distribution."""
    logits_TK = at_least_fp32(teacher_TK)
    if centre_K is not None:
        logits_TK = logits_TK - centre_K
    return logits_TK / teacher_temperature


def _teacher_log_probabilities(teacher_TK: Tensor, centre_K: Tensor | None, teacher_temperature: float) -> Tensor:
    return torch.log_softmax(scaled_teacher_logits(teacher_TK, centre_K, teacher_temperature), dim=-1)
