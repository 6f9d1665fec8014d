"""Options of Megatron-Core that the parts around it do not support, and why: the help page and the refusal say it in
the same words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Refusal:
    """Which values of an option are refused, why, and what to do instead."""

    values: tuple[Any, ...]
    why: str
    remedy: str


REFUSED = {
    "cuda_graph_impl": Refusal(
        ("local", "transformer_engine"),
        "a graph replays what it captured, but what attention computes differs from micro-batch to micro-batch",
        "use none",
    ),
    "fine_grained_activation_offloading": Refusal(
        (True,),
        "it has to be told where each micro-batch begins, which stages with a student and a teacher do not do",
        "use --recompute-granularity to save memory",
    ),
    "tp_comm_overlap": Refusal(
        (True,),
        "TransformerEngine's buffers for it have one shape, but the passes of student and teacher have two",
        "drop it",
    ),
    "optimizer": Refusal(
        ("muon",),
        "it needs the package emerging_optimizers, which is not on the package index, and keeps its master weights "
        "where neither checkpoints nor the teacher's average find them",
        "use adam",
    ),
    "use_mup": Refusal(
        (True,),
        "its multipliers are made for training from scratch; they would change what the pretrained model computes",
        "scale rates by size with laver sweep --lr-exponent",
    ),
}


def refused(name: str, what: str) -> str:
    """The help text of an option that is refused. what: it would do."""
    return f"{what}; refused: {REFUSED[name].why}"
