"""Whether a step is applied, and of a step that is not: which parameters on which ranks, which samples."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from laver_megatron.checkpoint.progress import Progress
from laver_megatron.config.reliability_fields import ReliabilityConfig
from laver_megatron.data.batch.packing import PackBatch
from laver_megatron.model.laver import LaverStage
from laver_megatron.resilience.spikes import find_spike, remember
from laver_megatron.runtime.gradient_norm import gradient_of
from laver_megatron.runtime.ranks import RaisedByAll, gathered
from laver_megatron.runtime.terminal import say

if TYPE_CHECKING:
    from laver_megatron.trainer import Trainer

NOT_FINITE = "not finite"
_NUM_NAMED = 5  # parameters in a record, of one rank and of all
_NUM_RANKS = 8  # of each parameter


def skip_reason(loss: float, grad_norm: float, progress: Progress, settings: ReliabilityConfig) -> str:
    """Why a step must not be applied; empty if it may be. The same on all ranks where the numbers are."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return f"{'gradient norm' if math.isfinite(loss) else 'loss'} {NOT_FINITE}"
    if settings.spike_action == "none":
        return ""
    limits: dict[str, Any] = {"sigmas": settings.spike_sigmas, "window": settings.spike_window}
    of_loss = find_spike("loss", loss, progress.recent_losses, **limits)
    return of_loss or find_spike("gradient norm", grad_norm, progress.recent_norms, **limits)


def remember_step(loss: float, grad_norm: float, progress: Progress, settings: ReliabilityConfig) -> None:
    """Adds a step that is applied to the window that the next ones are held against."""
    if settings.spike_action != "none":
        progress.recent_losses = remember(progress.recent_losses, loss, settings.spike_window)
        progress.recent_norms = remember(progress.recent_norms, grad_norm, settings.spike_window)


@dataclass(frozen=True)
class RankView:
    """What one rank knows of a step that is skipped.

    Attributes:
        replica: its data-parallel rank.
        names: the first parameters whose gradients are not finite here; num_names: of how many.
        bad: numbers of the replica's micro-batches whose loss is not finite; known on the last pipeline stage.
        keys: samples of each micro-batch of the replica; known where data are read.
    """

    replica: int
    names: list[str]
    num_names: int
    bad: list[int] = field(default_factory=list)
    keys: list[list[str]] = field(default_factory=list)


def note_skipped(
    trainer: Trainer, reason: str, loss: float, grad_norm: float, packs: Sequence[PackBatch], losses: Sequence[Tensor]
) -> None:
    """Puts the record of a step that is not applied, a line of skipped.jsonl, into `trainer.skipped`, and says it in
    short. Collective; the gradients are still those of the step.

    Args:
        packs: this replica's micro-batches.
        losses: of these micro-batches, on the last pipeline stage; empty elsewhere.

    Raises:
        RaisedByAll: the step is a spike with --spike-action stop.
    """
    iteration = trainer.progress.iteration + 1
    names = list(_bad_gradients(trainer.stages, trainer.optimizer))
    is_finite = torch.isfinite(torch.stack(list(losses))).tolist() if losses else []
    view = RankView(
        replica=parallel_state.get_data_parallel_rank(),
        names=names[:_NUM_NAMED],
        num_names=len(names),
        bad=[number for number, finite in enumerate(is_finite) if not finite],
        keys=[[key for keys in pack.keys for key in keys] for pack in packs],
    )
    numbers = {"iteration": iteration, "loss": loss, "grad_norm": grad_norm, "reason": reason}
    trainer.skipped = {**numbers, **join_views(gathered(view))}
    say(f"{_skip_line(trainer.skipped)}; see {Path(trainer.config.run.run_dir) / 'skipped.jsonl'}")
    if trainer.config.reliability.spike_action == "stop" and NOT_FINITE not in reason:
        raise RaisedByAll(
            f"iteration {iteration} is a spike: {reason}; look at its samples in skipped.jsonl, then resume with "
            "--spike-action skip to leave it out, or with none or more --spike-sigmas to train on it"
        )


def join_views(views: Sequence[RankView]) -> dict[str, Any]:
    """What all ranks know together.

    Returns:
        parameters: the first of them, with the ranks whose gradient is not finite. num_bad_gradients: of all parameters
        on all ranks. micro_batches: replica, number and keys of those whose loss is not finite. keys: theirs, or those
        of the whole step if none is known to be the cause.
    """
    ranks_of: dict[str, list[int]] = {}
    for number, view in enumerate(views):
        for name in view.names:
            ranks_of.setdefault(name, []).append(number)
    named: list[dict[str, Any]] = [
        {"name": name, "ranks": ranks[:_NUM_RANKS], "num_ranks": len(ranks)}
        for name, ranks in list(ranks_of.items())[:_NUM_NAMED]
    ]
    keys_of = {view.replica: view.keys for view in views if any(view.keys)}
    bad = sorted({(view.replica, number) for view in views for number in view.bad})
    micro_batches: list[dict[str, Any]] = [
        {"replica": replica, "micro_batch": number, "keys": keys_of[replica][number]} for replica, number in bad
    ]
    of_step = [key for replica in sorted(keys_of) for keys in keys_of[replica] for key in keys]
    return {
        "parameters": named,
        "num_bad_gradients": sum(view.num_names for view in views),
        "micro_batches": micro_batches,
        "keys": [key for micro_batch in micro_batches for key in micro_batch["keys"]] or of_step,
    }


def _skip_line(record: dict[str, Any]) -> str:
    """A skipped step in one line for the terminal."""
    parts = [f"iteration {record['iteration']} is not applied: {record['reason']}"]
    if record["parameters"]:
        first = record["parameters"][0]
        ranks = ", ".join(map(str, first["ranks"]))
        parts.append(f"{record['num_bad_gradients']} gradients, first {first['name']} on rank {ranks}")
    if record["micro_batches"]:
        names = (f"{part['micro_batch']} of replica {part['replica']}" for part in record["micro_batches"])
        parts.append(f"micro-batch {', '.join(names)}")
    keys = record["keys"]
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return "; ".join([*parts, f"samples {', '.join(keys[:3])}{more}"])


def _bad_gradients(stages: Sequence[LaverStage], optimizer: MegatronOptimizer) -> Iterator[str]:
    """Names of the parameters with a gradient in this rank's optimizer that is not finite."""
    for stage in stages:
        for name, parameter in stage.named_parameters():
            for part in optimizer.chained_optimizers:
                if parameter not in getattr(part, "model_param_group_index_map", {}):
                    continue
                group, order = part.model_param_group_index_map[parameter]
                gradient = gradient_of(part.optimizer.param_groups[group]["params"][order])
                if gradient is not None and not bool(torch.isfinite(gradient).all()):
                    yield _name_in_model(stage, name)


def _name_in_model(stage: LaverStage, name: str) -> str:
    """A parameter's name with the number of its decoder layer in the model, not in the pipeline stage."""
    found = re.match(r"(decoder\.layers\.)(\d+)(\..*)", name)
    if found is None:
        return name
    layer: Any = stage.get_submodule(f"{found[1]}{found[2]}")
    return f"{found[1]}{layer.layer_number - 1}{found[3]}"
