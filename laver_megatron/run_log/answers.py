"""The share of right answers in validation: teacher-forced, every token of an answer must be the likeliest.

An answer is a trained turn of a sample, its end of turn included; a sample of several turns has several. Records may
name the kind of question (`family`), by which answers are counted as well.

Letters: R labelled rows of a micro-batch, W words of the vocabulary on this rank, B packs, S tokens of a pack,
A answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from laver_megatron.data.batch.broadcast import is_reader
from laver_megatron.data.batch.packing import PackBatch
from laver_megatron.objective.language import IGNORE_LABEL
from laver_megatron.objective.sharded import sharded_is_likeliest

ANSWER_ACCURACY = "answer_accuracy"  # of all; of a family it is ANSWER_ACCURACY/FAMILY


class AnswerCounts:
    """Answers of global batches, right and all, by family."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_right: list[Tensor] = []  # labelled tokens of the batch under way, on the last stage
        self._right, self._all = Counter[str](), Counter[str]()  # of this rank's replica, on the rank that reads

    def note(self, logits_RW: Tensor, labels_R: Tensor, tp_group: dist.ProcessGroup) -> None:
        """Takes a micro-batch on the last stage, in the order of the schedule."""
        is_right_R = sharded_is_likeliest(logits_RW, labels_R, tp_group)
        self._is_right.append(is_right_R[labels_R != IGNORE_LABEL])

    def add(self, packs: Sequence[PackBatch]) -> None:
        """Counts the answers of the batch whose micro-batches were noted. Collective over a replica's stages."""
        sizes = [int((pack.labels_BS != IGNORE_LABEL).sum()) for pack in packs]
        if self._is_right:
            flags = torch.cat(self._is_right).to(torch.uint8)
        else:
            flags = torch.empty(sum(sizes), dtype=torch.uint8, device=self._device)
        self._is_right = []
        dist.broadcast(
            flags,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
        if not is_reader():
            return
        for pack, flags_R in zip(packs, flags.bool().cpu().split(sizes), strict=True):
            for family, is_right in answers_of(pack, flags_R):
                self._all[family] += 1
                self._right[family] += is_right

    def accuracies(self) -> dict[str, float]:
        """ANSWER_ACCURACY of all answers and of each family, the same on every rank; empty without answers.
        Collective."""
        gathered: list[tuple[Counter[str], Counter[str]]] = [(Counter(), Counter())] * dist.get_world_size()
        dist.all_gather_object(gathered, (self._right, self._all))
        right, every = (sum((counts[i] for counts in gathered), Counter[str]()) for i in (0, 1))
        if not every:
            return {}
        families = {f"{ANSWER_ACCURACY}/{name}": right[name] / every[name] for name in sorted(every) if name}
        return {ANSWER_ACCURACY: right.total() / every.total(), **families}


def answers_of(pack: PackBatch, is_right_R: Tensor) -> list[tuple[str, bool]]:
    """(family, whether all its tokens are right) of every answer of a micro-batch.

    Args:
        is_right_R: of its labelled tokens in the order of `streams.label_rows`: first tokens of all packs, then second.
    """
    has_label_BS = pack.labels_BS != IGNORE_LABEL
    is_right_SB = torch.zeros_like(has_label_BS.t())
    is_right_SB[has_label_BS.t()] = is_right_R
    # Between two answers stands at least the head of a turn, which has no labels.
    begins_BS = has_label_BS.clone()
    begins_BS[:, 1:] &= ~has_label_BS[:, :-1]
    number_BS = begins_BS.flatten().cumsum(0).view_as(begins_BS) - 1
    is_wrong_BS = has_label_BS & ~is_right_SB.t()
    wrong_A = torch.bincount(number_BS[is_wrong_BS], minlength=int(begins_BS.sum()))
    found = []
    for (row, column), num_wrong in zip(begins_BS.nonzero().tolist(), wrong_A.tolist(), strict=True):
        family = pack.families[row][int(pack.document_BS[row, column])] if pack.families else ""
        found.append((family, num_wrong == 0))
    return found
