"""What a dry run says on the terminal: the model's parameters, and a table of what the ranks hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, fields

from laver_megatron.planning.dry_run import DryRun, RankReport
from laver_megatron.planning.hardware import GIB
from laver_megatron.planning.memory import StateBytes
from laver_megatron.runtime.table import align

_KINDS = [item.name for item in fields(StateBytes)]


def dry_run_report(run: DryRun) -> str:
    """The model by part, the table by pipeline stage (equal ranks in one line), totals over all ranks."""
    counted = {name: number for name, number in run.parameters.items() if number}
    width = max(len(f"{number:,}") for number in counted.values())
    lines = ["parameters"]
    lines += [f"  {number:>{width},}  {name}" for name, number in counted.items()]
    lines += ["", *rank_table(run.ranks), ""]
    total = sum(rank.bytes.total for rank in run.ranks)
    largest = max(run.ranks, key=lambda rank: rank.bytes.total)
    lines += [
        f"all {len(run.ranks)} ranks: {total / GIB:,.3f} GiB; the largest: {largest.bytes.total / GIB:,.3f} GiB, on "
        f"stage {largest.stage}. Activations, the losses' logits and what the libraries take come on top.",
        f"sharding: {run.num_tensors:,} tensors of student, teacher and optimizer, every value of each on one rank "
        "and its copies",
    ]
    return "\n".join(lines)


def rank_table(ranks: Sequence[RankReport]) -> list[str]:
    """Lines of the table; ranks of a stage that hold the same share one."""
    groups: dict[tuple, list[RankReport]] = {}
    for rank in ranks:
        groups.setdefault((rank.stage, rank.num_layers, rank.num_parameters, rank.bytes), []).append(rank)
    rows = [["stage", "TP rank", "DP rank", "ranks", "layers", "parameters", *_KINDS, "GiB"]]
    for (stage, num_layers, num_parameters, held), alike in groups.items():
        rows.append(
            [
                str(stage),
                spans(rank.tp_rank for rank in alike),
                spans(rank.dp_rank for rank in alike),
                str(len(alike)),
                str(num_layers),
                f"{num_parameters:,}",
                *(f"{number / GIB:.3f}" for number in (*astuple(held), held.total)),
            ]
        )
    return align(rows)


def spans(numbers: Iterable[int]) -> str:
    """Whole numbers in short: 0-3,5."""
    found: list[list[int]] = []
    for number in sorted(set(numbers)):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in found)
