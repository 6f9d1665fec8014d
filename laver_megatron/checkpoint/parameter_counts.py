"""How many parameters the whole model has, by part, from any rank's stages and whatever the division."""

import math
from collections.abc import Iterator, Sequence

from torch import nn

from laver_megatron.model.laver import LaverStage
from laver_megatron.runtime.ranks import gathered
from laver_megatron.runtime.sharded_state import sharded_tensors, sharding_metadata

# Beginnings of checkpoint keys. A tied LM head is stored as the embedding, and counted there alone.
_PARTS = {
    "encoder": "encoder.", "connector": "connector.", "embedding": "embedding.", "decoder": "decoder.",
    "lm_head": "output_layer.", "vision_head": "vision_head.", "mask_token": "mask_token",
}  # fmt: skip


def count_parameters(stages: Sequence[LaverStage]) -> tuple[dict[str, int], int]:
    """(the student's parameters by part, trained or not; the teacher's). Call on all ranks together: tensors are
    counted whole and once, by their checkpoint keys."""
    metadata = sharding_metadata()
    student: dict[str, int] = {}
    teacher: dict[str, int] = {}
    for stage in stages:
        student.update(_whole_sizes(stage, stage.sharded_state_dict(metadata=metadata)))
        if stage.teacher is not None:
            teacher.update(_whole_sizes(stage.teacher, stage.teacher.sharded_state_dict("", (), metadata)))
    student, teacher = (
        {key: size for part in gathered(mine) for key, size in part.items()} for mine in (student, teacher)
    )
    counts = dict.fromkeys(_PARTS, 0)
    for key, size in student.items():
        (part,) = (name for name, beginning in _PARTS.items() if key.startswith(beginning))
        counts[part] += size
    return counts, sum(teacher.values())


def _whole_sizes(module: nn.Module, state: dict) -> Iterator[tuple[str, int]]:
    names = {name for name, _ in module.named_parameters()}
    for tensor in sharded_tensors({name: entry for name, entry in state.items() if name in names}):
        yield tensor.key, math.prod(tensor.global_shape)
