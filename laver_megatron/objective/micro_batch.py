"""The three losses of one micro-batch on the last stage, each divided by its count over the global batch.

L = sum(lm) / N_label + w_mim * sum(mim) / N_masked + w_gram * sum(gram) / N_images: with global counts as
denominators, the sum over micro-batches and data-parallel ranks is the same for every layout of the run.

Letters: R rows with a label, W vocabulary columns and K vision-head columns on this rank, T visual tokens, M masked
ones, I images of N visual tokens each.
"""

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from laver_megatron.config.fields import ObjectiveConfig
from laver_megatron.data.batch.batches import GlobalCounts
from laver_megatron.model.laver import StageOutput
from laver_megatron.model.streams import MicroBatch
from laver_megatron.model.teacher import Centre
from laver_megatron.objective.gram import cosine_gram, gram_losses, mean_off_diagonal
from laver_megatron.objective.sharded import (
    sharded_inner_products,
    sharded_language_losses,
    sharded_reconstruction_losses,
    sharded_smooth_l1_losses,
    sharded_standardised,
    sharded_teacher_entropies,
)

Loss = TypeVar("Loss", float, Tensor)

TERMS = (
    "loss",
    "lm_loss",
    "mim_loss",
    "gram_loss",
    "student_visual_similarity",
    "teacher_visual_similarity",
    "teacher_entropy",
)


def count_of(term: str, counts: GlobalCounts) -> int:
    """What a term is a mean over."""
    return {
        "loss": counts.labels,
        "lm_loss": counts.labels,
        "mim_loss": counts.masked,
        "gram_loss": counts.images,
        "student_visual_similarity": counts.images,
        "teacher_visual_similarity": counts.images,
        "teacher_entropy": counts.visual_tokens,
    }[term]


def weighted_sum(lm_loss: Loss, mim_loss: Loss, gram_loss: Loss, objective: ObjectiveConfig) -> Loss:
    """The loss that is trained: L = L_LM + w_MIM L_MIM + w_gram L_gram."""
    return lm_loss + objective.mim_weight * mim_loss + objective.gram_weight * gram_loss


@record_function("losses")
def micro_batch_losses(
    output: StageOutput,
    batch: MicroBatch,
    counts: GlobalCounts,
    objective: ObjectiveConfig,
    centre: Centre | None,
    tp_group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """(loss to differentiate, this micro-batch's share of TERMS as one fp32 tensor).

    Summed over micro-batches and data-parallel ranks the shares are the global values: losses as defined
    above, similarities as means over images, entropy as mean over visual tokens.
    """
    language_R = sharded_language_losses(output.language_logits_RW, batch.labels_R, tp_group)
    language = language_R.sum() / max(counts.labels, 1)
    zero = torch.zeros((), device=language.device)
    reconstruction, gram, monitors = zero, zero, [zero, zero, zero]
    if output.student_logits_TK is not None:
        assert output.teacher_logits_TK is not None
        reconstruction_M = _reconstruction_losses(output, batch, objective, centre, tp_group)
        reconstruction = reconstruction_M.sum() / max(counts.masked, 1)
        gram, monitors = _gram_loss_and_monitors(
            output.student_logits_TK, output.teacher_logits_TK, batch, counts, objective, centre, tp_group
        )
    loss = weighted_sum(language, reconstruction, gram, objective)
    terms = torch.stack([loss, language, reconstruction, gram, *monitors]).detach().float()
    return loss, terms


def _reconstruction_losses(
    output: StageOutput,
    batch: MicroBatch,
    objective: ObjectiveConfig,
    centre: Centre | None,
    tp_group: dist.ProcessGroup,
) -> Tensor:
    """Of the masked tokens, `[M]`."""
    assert output.student_logits_TK is not None and output.teacher_logits_TK is not None
    student_MK, teacher_MK = (
        logits_TK.index_select(0, batch.masked_M) for logits_TK in (output.student_logits_TK, output.teacher_logits_TK)
    )
    if objective.reconstruction_loss == "cross-entropy":
        return sharded_reconstruction_losses(
            student_MK,
            teacher_MK,
            tp_group,
            centre_K=None if centre is None else centre.value_K,
            student_temperature=objective.student_temperature,
            teacher_temperature=objective.teacher_temperature,
        )
    if output.target_TK is None:
        target_MK = sharded_standardised(teacher_MK, tp_group)
    else:
        target_MK = output.target_TK.index_select(0, batch.masked_M)
    return sharded_smooth_l1_losses(student_MK, target_MK, tp_group)


def _gram_loss_and_monitors(
    student_TK: Tensor,
    teacher_TK: Tensor,
    batch: MicroBatch,
    counts: GlobalCounts,
    objective: ObjectiveConfig,
    centre: Centre | None,
    tp_group: dist.ProcessGroup,
) -> tuple[Tensor, list[Tensor]]:
    centre_K = None if centre is None else centre.value_K
    trains = objective.gram_loss != "none"
    anchored_TK = student_TK if trains else student_TK.detach()
    inner = sharded_inner_products(
        [
            _by_image(logits_TK, tokens_IN)
            for logits_TK in (anchored_TK, teacher_TK)
            for _, tokens_IN in batch.images_by_size
        ],
        tp_group,
    )
    num_sizes = len(batch.images_by_size)
    gram = torch.zeros((), device=student_TK.device)
    similarity = torch.zeros(2, device=student_TK.device)
    for student_INN, teacher_INN in zip(inner[:num_sizes], inner[num_sizes:], strict=True):
        student_INN, teacher_INN = cosine_gram(student_INN), cosine_gram(teacher_INN)
        if trains:
            losses_I = gram_losses(
                student_INN, teacher_INN, kind=objective.gram_loss, reduction=objective.gram_reduction
            )
            gram = gram + losses_I.sum()
        if student_INN.shape[-1] > 1:  # else there is no pair, and the image adds nothing
            similarity += torch.stack([mean_off_diagonal(cosines).sum() for cosines in (student_INN, teacher_INN)])

    num_images = max(counts.images, 1)
    entropy = sharded_teacher_entropies(teacher_TK, centre_K, objective.teacher_temperature, tp_group).sum()
    if centre is not None and torch.is_grad_enabled():
        centre.accumulate(teacher_TK)
    monitors = [
        similarity[0] / num_images,
        similarity[1] / num_images,
        entropy / max(counts.visual_tokens, 1),
    ]
    return gram / num_images, monitors


def _by_image(logits_TK: Tensor, tokens_IN: Tensor) -> Tensor:
    """The logits of images of one size, `[I, N, K]`."""
    if tokens_IN.numel() == len(logits_TK):  # all images are of this size: they are in order already
        return logits_TK.view(*tokens_IN.shape, -1)
    return logits_TK[tokens_IN]
