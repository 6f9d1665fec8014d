"""Which rank is slower than those that do the same work.

In synchronous training every rank's step takes equally long: a slow one makes the others wait. So what is measured is
the share of the time in which a rank does not wait. A thread looks at the main thread's innermost frame several times a
second (`stacks.is_waiting`), which costs microseconds and no synchronisation of the device. Ranks of one pipeline stage
are compared, for stages differ by design.

It sees what keeps the main thread: reading, Python, a throttled CPU; on Gloo all computation. On CUDA the main thread
runs ahead of the device and waits there, so a slow GPU is not seen by this; nor a slow link, which keeps both its ends.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from statistics import median_low

from laver_megatron.resilience.heartbeat import Beat
from laver_megatron.resilience.phases import DATA, STEP, now
from laver_megatron.resilience.stacks import is_waiting

_LOOKS = 200  # of a comparison, at least: then a share of a half is known to within a few per cent
_LEAST_BUSY = 0.2  # a rank that waits for more than this leaves is nobody's reason to wait


class Sampler:
    """Looks at the main thread of this process.

    Attributes:
        counts: (times at which it did not wait, times looked), of the training alone.
        interval: seconds between two looks.
    """

    interval = 0.1

    def __init__(self) -> None:
        self.counts = (0, 0)
        self._main = threading.main_thread().ident or 0

    def look(self) -> None:
        """Looks once."""
        frame = sys._current_frames().get(self._main)
        if frame is not None and now().phase in (DATA, STEP):
            busy, looks = self.counts
            self.counts = (busy + (not is_waiting(frame)), looks + 1)


class Stragglers:
    """Compares what the samplers of all ranks have counted since the last comparison.

    Args:
        percent: longer than the others by so much is slow; None: nobody is.
    """

    def __init__(self, percent: float | None) -> None:
        self._percent = percent
        self._last: dict[int, Beat] = {}

    def line(self, beats: Mapping[int, Beat]) -> str | None:
        """A line that names the slow ranks, if there are any and enough was counted."""
        if self._percent is None or len(beats) < 2:
            return None
        if self._last.keys() != beats.keys():
            self._last = dict(beats)
            return None
        looks = {rank: beat.looks - self._last[rank].looks for rank, beat in beats.items()}
        if min(looks.values()) < _LOOKS:
            return None
        share = {rank: (beat.busy - self._last[rank].busy) / looks[rank] for rank, beat in beats.items()}
        self._last = dict(beats)
        slow = []
        for rank, beat in sorted(beats.items()):
            others = [share[other] for other, theirs in beats.items() if other != rank and theirs.stage == beat.stage]
            usual = median_low(others) if others else share[rank]
            if share[rank] >= _LEAST_BUSY and share[rank] > usual * (1 + self._percent / 100):
                slow.append(
                    f"rank {rank} (process {beat.pid} on {beat.host}) is busy for {share[rank]:.0%} of the time, the "
                    f"others of its stage for {usual:.0%}"
                )
        return f"straggler: {'; '.join(slow)}" if slow else None
