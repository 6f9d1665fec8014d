"""Which visual budget suits a data set: the one with the fullest packs.

Letters: I samples.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from laver_megatron.data.plan.best_fit import STYLES, pack_window
from laver_megatron.data.plan.sizes import SampleSizes
from laver_megatron.data.plan.usable import UsableRows

_BEST_FIT = STYLES[:1]  # quick, and wrong by much the same for neighbouring budgets
_SAMPLES_TRIED = 5_000
_BUDGETS_TRIED = 24  # first over all that come into question, then as many between the best one's neighbours


def propose_visual_budget(
    sources: Sequence[SampleSizes], seq_length: int, multiple_of: int = 1, max_left_out: float = 0.01
) -> int:
    """The visual budget with the fullest packs, of all slots together: tokens used over tokens and visual slots.

    Too small a budget leaves token slots empty, too large a one visual slots. Where an encoder makes every image the
    same number of tokens, it comes out as a number of images. Tried on a few thousand samples, spread over the data.

    multiple_of: what the budget has to be divisible by. max_left_out: the share of the samples within `seq_length`
    that the budget may leave out, for their visual tokens. 0 for data without images.

    Raises:
        ValueError: no sample is within `seq_length`.
    """
    tokens_I, visual_I = _spread_samples(sources, seq_length)
    if visual_I.max() == 0:
        return 0
    allowed = int(max_left_out * len(visual_I))
    lowest = _round_up(max(int(np.sort(visual_I)[len(visual_I) - 1 - allowed]), 1), multiple_of)
    fills: dict[int, float] = {}
    low, high = lowest, max(lowest, _round_up(seq_length, multiple_of))
    for _ in range(2):
        for budget in np.linspace(low, high, _BUDGETS_TRIED):
            _try_budget(fills, _round_up(int(budget), multiple_of), tokens_I, visual_I, seq_length, multiple_of)
        step = -(-(high - low) // (_BUDGETS_TRIED - 1))
        best = max(fills, key=lambda budget: (fills[budget], -budget))
        low, high = max(lowest, best - step), min(high, best + step)
    return max(fills, key=lambda budget: (fills[budget], -budget))


def _try_budget(
    fills: dict[int, float],
    budget: int,
    tokens_I: NDArray[np.int32],
    visual_I: NDArray[np.int32],
    seq_length: int,
    multiple_of: int,
) -> None:
    """Notes the fill with this budget, or with as much of it as the packs really use."""
    if budget in fills:
        return
    fits_I = visual_I <= budget
    tokens_I, visual_I = tokens_I[fits_I], visual_I[fits_I]
    pack_I = pack_window(tokens_I, visual_I, seq_length, budget, _BEST_FIT)
    used = _round_up(int(np.bincount(pack_I, visual_I).max()), multiple_of)
    slots = (int(pack_I.max()) + 1) * (seq_length + used)
    fills[used] = max(fills.get(used, 0.0), (int(tokens_I.sum(dtype=np.int64)) + int(visual_I.sum())) / slots)


def _spread_samples(sources: Sequence[SampleSizes], seq_length: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Tokens and visual tokens of a few thousand samples that fit, of each source as many as its weight asks for."""
    usable = [UsableRows(source, seq_length, by_shard=False) for source in sources]
    shares = np.array([source.weight * len(rows) for source, rows in zip(sources, usable, strict=True)])
    if shares.sum() == 0:
        raise ValueError(f"none of the {sum(map(len, sources))} samples has between 1 and {seq_length} tokens")
    nums = np.ceil(shares * (min(_SAMPLES_TRIED, shares.sum()) / shares.sum())).astype(int)
    picked = [
        (source, rows.at(np.arange(num) * len(rows) // max(num, 1)))
        for source, rows, num in zip(sources, usable, nums, strict=True)
    ]
    return (
        np.concatenate([source.tokens_I[rows_I] for source, rows_I in picked]),
        np.concatenate([source.visual_I[rows_I] for source, rows_I in picked]),
    )


def _round_up(value: int, multiple_of: int) -> int:
    return -(-value // multiple_of) * multiple_of
