"""What each stage of a chain has done, in a line: its language loss, what was frozen, and what has changed."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from laver_megatron.config.modules import MODULES
from laver_megatron.run_log.records import read_records
from laver_megatron.stages.chain import Stage, is_first_node
from laver_megatron.stages.weight_changes import ModuleChange, changes_of_modules


def report_stages(stages: Sequence[Stage], *, compare_weights: bool) -> int:
    """Prints the lines, on the first node alone; compare_weights: with what the checkpoints themselves say. Returns the
    exit status: 1 if a weight that was frozen has changed."""
    if not is_first_node():
        return 0
    width = max(len(stage.name) for stage in stages)
    status = 0
    for stage in stages:
        if compare_weights:
            assert stage.checkpoint is not None and stage.config.start.load is not None
            changes = changes_of_modules(stage.config.start.load, stage.config.start.encoder, stage.checkpoint)
            weights = describe_changes(changes, stage.config.model.freeze)
            if broken := changed_though_frozen(changes, stage.config.model.freeze):
                weights = f"FROZEN, BUT CHANGED: {', '.join(broken)}; {weights}"
                status = 1
        else:
            weights = f"frozen: {', '.join(stage.config.model.freeze) or 'nothing'}"
        print(f"{stage.name:<{width}}  {describe_loss(Path(stage.config.run.run_dir))}; {weights}")
    sys.stdout.flush()
    return status


def describe_loss(run_dir: Path) -> str:
    """The language loss of the first and of the last iteration."""
    losses = [record["lm_loss"] for record in read_records(run_dir / "metrics.jsonl")]
    return f"LM loss {losses[0]:.3f} -> {losses[-1]:.3f}" if losses else "no metrics"


def describe_changes(changes: Mapping[str, ModuleChange], frozen: Sequence[str]) -> str:
    """Frozen modules with the number of their tensors, and of the others how many tensors have changed."""
    same, moved = [], []
    for name in MODULES:
        change = changes.get(name)
        if change is None:
            continue
        if name in frozen and change.num_changed == change.num_new == 0:
            same.append(f"{name} ({change.num_tensors} tensors)")
        elif change.num_new == change.num_tensors:
            moved.append(f"{name} (new)")
        else:
            moved.append(f"{name} ({change.num_changed + change.num_new} of {change.num_tensors} tensors)")
    frozen_text, changed_text = (", ".join(names) or "nothing" for names in (same, moved))
    return f"frozen and the same to the last bit: {frozen_text}; changed: {changed_text}"


def changed_though_frozen(changes: Mapping[str, ModuleChange], frozen: Sequence[str]) -> list[str]:
    """Frozen modules that have changed. One that is new (such as a vision head) has not."""
    return [name for name in frozen if name in changes and changes[name].num_changed > 0]
