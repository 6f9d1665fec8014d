"""Where a run's time went since it was born, by cause, across restarts.

    step        useful: iterations that are part of the run's state, without the two below
    data        the same iterations' waiting for data
    skipped     iterations without a step, because loss or gradient was not finite
    lost        iterations that were trained and then undone by a restart from an older checkpoint
    start, validate, save
    restart     between an attempt's last sign of life and the start of the next
    other       between iterations (logging), and iterations that were cut in the middle

They add up to the time since birth. The first three come from `Progress`, which is in the checkpoint and so says what
was kept. The others are sums over phases (`phases.py`); those of earlier attempts are in the run's status, which rank 0
writes every few seconds: a kill turns at most these seconds into `restart`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from laver_megatron.checkpoint.progress import Progress
from laver_megatron.resilience.phases import DATA, SAVE, START, STEP, VALIDATE, seconds_by_phase

KEPT = ("step", "data", "skipped")
CARRIED = ("lost", START, VALIDATE, SAVE, "restart", "other")
_BASE = ("training_seconds", "data_seconds", "skipped_seconds")


def is_number(value: Any) -> bool:
    """Whether a value of a file is a number that can be reckoned with."""
    return type(value) in (int, float) and -1e300 < value < 1e300


def is_ledger(value: Any) -> bool:
    """Whether a value of a file is what `Ledger.plain` gives."""
    if not isinstance(value, dict):
        return False
    parts = {"base": _BASE, "progress": _BASE, "seconds": (*KEPT, *CARRIED)}
    return all(is_number(value.get(name)) for name in ("born", "at")) and all(
        isinstance(part := value.get(name), dict) and part.keys() == {*causes} and all(map(is_number, part.values()))
        for name, causes in parts.items()
    )


class Ledger:
    """The accounts of a run, kept by one process of each attempt.

    Args:
        earlier: what `plain` gave at the last sign of life of the attempt before (`is_ledger`); None in a run's first.
    """

    def __init__(self, earlier: Mapping[str, Any] | None = None) -> None:
        self.started = time.time() - sum(seconds_by_phase().values())
        self.born = self.started
        self._carried = dict.fromkeys(CARRIED, 0.0)
        self._base: dict[str, float] | None = None  # of Progress when the accounts began
        self._at_resume = dict.fromkeys(_BASE, 0.0)
        self._progress: Progress | None = None
        self._earlier = earlier
        if earlier is not None:
            self.born, self._base = earlier["born"], dict(earlier["base"])
            self._carried = {cause: float(earlier["seconds"][cause]) for cause in CARRIED}
            self._carried["restart"] += max(0.0, self.started - earlier["at"])
            self._at_resume = dict(earlier["progress"])  # until it is known what the checkpoint has kept

    def follow(self, progress: Progress) -> None:
        """The run's state is filled: what the attempt before had trained beyond it is lost."""
        resumed = {name: getattr(progress, name) for name in _BASE}
        if self._base is None:
            self._base = resumed
        if self._earlier is not None:
            lost = self._earlier["progress"]["training_seconds"] - resumed["training_seconds"]
            self._carried["lost"] += max(0.0, lost)
        self._at_resume, self._progress = resumed, progress

    def seconds(self) -> dict[str, float]:
        """Seconds by cause, up to now."""
        spent = seconds_by_phase()
        reached = self._reached()
        base = self._base or reached
        training, data, skipped = (reached[name] - base[name] for name in _BASE)
        of_attempt = {
            START: spent[START],
            VALIDATE: spent[VALIDATE],
            SAVE: spent[SAVE],
            "other": spent[STEP] + spent[DATA] - (reached["training_seconds"] - self._at_resume["training_seconds"]),
        }
        return {
            "step": training - data - skipped,
            "data": data,
            "skipped": skipped,
            **{cause: self._carried[cause] + of_attempt.get(cause, 0.0) for cause in CARRIED},
        }

    def plain(self) -> dict[str, Any]:
        """For the run's status: what the next attempt needs."""
        reached = self._reached()
        return {
            "born": self.born,
            "at": time.time(),
            "base": self._base or reached,
            "progress": reached,
            "seconds": self.seconds(),
        }

    def summary(self) -> dict[str, Any]:
        """For people: useful seconds over all, and where the others went."""
        seconds = self.seconds()
        wall = time.time() - self.born
        return {"share": seconds["step"] / wall if wall > 0 else 0.0, "wall_seconds": wall, "seconds": seconds}

    def _reached(self) -> dict[str, float]:
        if self._progress is None:
            return dict(self._at_resume)
        return {name: getattr(self._progress, name) for name in _BASE}
