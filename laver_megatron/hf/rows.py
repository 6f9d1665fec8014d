"""Which rows of which Hugging Face tensors a range of rows of a Megatron tensor is, and the other way round.

Found by applying a weight's join to row numbers in place of rows, so that the name table stays the only
place that knows an order. A fused QKV of 4 query heads of 64 rows and 2 groups is six runs:

    Megatron rows    0-127     128-191   192-255   256-383     384-447    448-511
    come from        q 0-127   k 0-63    v 0-63    q 128-255   k 64-127   v 64-127
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from laver_megatron.hf.weights import Size, Weight


@dataclass(frozen=True)
class Run:
    """Rows that lie together on both sides.

    Attributes:
        row: the first in the Megatron tensor.
        part, part_row: number of the weight's Hugging Face tensor, and the first row there.
        num_rows: how many.
    """

    row: int
    part: int
    part_row: int
    num_rows: int


@lru_cache(maxsize=64)
def row_runs(weight: Weight) -> tuple[Run, ...]:
    """All rows of the Megatron tensor, in its order."""
    starts, total = [], 0
    for size in weight.sizes:
        starts.append(total)
        total += size[0]
    numbers = [torch.arange(start, start + size[0]) for start, size in zip(starts, weight.sizes, strict=True)]
    source = weight.join(numbers)
    assert source.shape == (total,)
    breaks = torch.ones(total, dtype=torch.bool)
    breaks[1:] = source[1:] != source[:-1] + 1
    breaks[torch.isin(source, torch.tensor(starts))] = True  # two parts that happen to follow each other
    firsts = breaks.nonzero().squeeze(1).tolist()
    runs = []
    for row, end in zip(firsts, [*firsts[1:], total], strict=True):
        number = int(source[row])
        part = max(i for i, start in enumerate(starts) if start <= number)
        runs.append(Run(row, part, number - starts[part], end - row))
    return tuple(runs)


def _within(runs: tuple[Run, ...], start: int, stop: int, first: Callable[[Run], int]) -> Iterator[Run]:
    for run in runs:
        skipped = max(start - first(run), 0)
        num_rows = min(run.num_rows, stop - first(run)) - skipped
        if num_rows > 0:
            yield Run(run.row + skipped, run.part, run.part_row + skipped, num_rows)


def runs_of_megatron_rows(weight: Weight, start: int, stop: int) -> list[Run]:
    """What the Megatron rows [start, stop) are, in their order."""
    return list(_within(row_runs(weight), start, stop, lambda run: run.row))


def runs_of_part_rows(weight: Weight, part: int, start: int, stop: int) -> list[Run]:
    """Where the rows [start, stop) of the Hugging Face tensor number `part` lie in Megatron's, in their order."""
    runs = tuple(sorted((run for run in row_runs(weight) if run.part == part), key=lambda run: run.part_row))
    return list(_within(runs, start, stop, lambda run: run.part_row))


def split(weight: Weight, tensor: Tensor) -> list[Tensor]:
    """The Hugging Face tensors of a whole Megatron tensor: the inverse of `weight.join`."""
    return [
        join_blocks([tensor[run.row : run.row + run.num_rows] for run in runs_of_part_rows(weight, part, 0, size[0])])
        for part, size in enumerate(weight.sizes)
    ]


def join_blocks(blocks: list[Tensor]) -> Tensor:
    """Blocks of rows as one tensor; a single one is not copied."""
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def row_blocks(size: Size, dtype: torch.dtype, block_bytes: int = 32 << 20) -> Iterator[tuple[int, int]]:
    """[start, stop) of consecutive rows of a tensor, at most `block_bytes` together, at least one row each."""
    num_rows, *rest = size
    row_bytes = torch.Size(rest).numel() * dtype.itemsize
    step = max(block_bytes // max(row_bytes, 1), 1)
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)
