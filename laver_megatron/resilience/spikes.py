"""Whether a step's loss or gradient norm stands out from those of the steps before it: arithmetic alone."""

import math
from collections.abc import Sequence

# Deviations below this share of the mean count as this share: numbers that hardly move make no spike of a small rise.
_SMALLEST_DEVIATION = 1e-3


def spike_limit(recent: Sequence[float], sigmas: float) -> float:
    """The value above which the next one is a spike: the mean of the recent ones, and `sigmas` standard deviations."""
    mean = math.fsum(recent) / len(recent)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in recent) / len(recent))
    return mean + sigmas * max(deviation, _SMALLEST_DEVIATION * abs(mean))


def find_spike(name: str, value: float, recent: Sequence[float], *, sigmas: float, window: int) -> str:
    """What makes a value a spike, with the numbers; empty where it is none.

    Args:
        recent: values of the last steps that were applied. Fewer than `window` of them say nothing yet.
    """
    if len(recent) < window:
        return ""
    limit = spike_limit(recent[-window:], sigmas)
    if value <= limit:
        return ""
    return f"{name} {value:.6g} is above {limit:.6g}, {sigmas:g} deviations over the mean of the last {window} steps"


def remember(recent: Sequence[float], value: float, window: int) -> tuple[float, ...]:
    """The recent values with one more, `window` of them at most."""
    return (*recent, value)[-window:]
