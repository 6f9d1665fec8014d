"""Layouts of a run on a number of GPUs: which are possible, which fit, and which is the fastest."""

from __future__ import annotations

from dataclasses import dataclass

from laver_megatron.planning.layouts import Pinned, layout_problems, layouts
from laver_megatron.planning.plan import Job, Plan, plan_layout


@dataclass(frozen=True)
class Search:
    """fitting: the fastest first; too_large: possible, but not in memory, the least too large first; impossible: why
    some layouts cannot be at all, with how many."""

    fitting: tuple[Plan, ...]
    too_large: tuple[Plan, ...]
    impossible: tuple[tuple[str, int], ...]


def search(job: Job, pinned: Pinned | None = None) -> Search:
    """All layouts of the job's GPUs that have the pinned values."""
    fitting: list[Plan] = []
    too_large: list[Plan] = []
    impossible: dict[str, int] = {}
    for config in layouts(job, pinned or {}):
        problems = layout_problems(job, config)
        if problems:
            impossible[problems[0]] = impossible.get(problems[0], 0) + 1
            continue
        plan = plan_layout(job, config)
        (fitting if plan.fits else too_large).append(plan)
    return Search(
        tuple(sorted(fitting, key=lambda plan: plan.seconds)),
        tuple(sorted(too_large, key=lambda plan: plan.fullest.memory_bytes)),
        tuple(sorted(impossible.items(), key=lambda item: -item[1])),
    )
