"""Which rank a run waits for: decided from heartbeats alone, by the clock of whoever receives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from laver_megatron.resilience.heartbeat import Beat
from laver_megatron.resilience.phases import PHASES, STEP

_QUIET_BEATS = 4  # without a heartbeat for so many intervals a rank has none
_ORDER = {name: order for order, name in enumerate(PHASES)}


@dataclass(frozen=True)
class Named:
    """A rank that stopped. silent_seconds: since its last heartbeat; still_seconds: since its main thread moved."""

    rank: int
    host: str
    pid: int
    phase: str
    iteration: int
    place: str
    is_silent: bool
    silent_seconds: float
    still_seconds: float

    def __str__(self) -> str:
        where = f"rank {self.rank} (process {self.pid} on {self.host})"
        doing = f"in phase {self.phase} after iteration {self.iteration}"
        if self.is_silent:
            return (
                f"{where} has given no heartbeat for {self.silent_seconds:.0f} s, {doing}: stopped, cut off, or held "
                f"by a C extension; it stood at {self.place}"
            )
        return f"{where} is alive but has not moved for {self.still_seconds:.0f} s, {doing}: it stands at {self.place}"


@dataclass(frozen=True)
class Verdict:
    """That a run hangs. named: the ranks that all others wait for; empty if it cannot be said."""

    named: tuple[Named, ...]
    places: Mapping[str, list[int]]

    def __str__(self) -> str:
        if self.named:
            return "; ".join(map(str, self.named))
        at = "; ".join(f"rank {numbers(ranks)} at {place}" for place, ranks in self.places.items())
        return f"no rank can be singled out, all wait for each other or for their devices: {at}"


def numbers(ranks: Sequence[int]) -> str:
    """Ranks in words, the first of many."""
    shown = ", ".join(map(str, ranks[:8]))
    return shown if len(ranks) <= 8 else f"{shown} and {len(ranks) - 8} more"


@dataclass
class _Seen:
    beat: Beat
    heard: float  # when its count was first seen
    moved: float  # when its number was first seen


class Judge:
    """Keeps what was heard of every rank, and says whether the run hangs.

    Args:
        limits: seconds that each phase may last, None for any time.
        interval: seconds between two heartbeats.
    """

    def __init__(self, limits: Mapping[str, float | None], interval: float) -> None:
        self.limits, self._quiet_seconds = limits, _QUIET_BEATS * interval
        self._seen: dict[int, _Seen] = {}

    def hear(self, beats: Mapping[int, Beat], now: float) -> None:
        """Takes the last heartbeats of all ranks."""
        for rank, beat in beats.items():
            last = self._seen.get(rank)
            if last is None:
                self._seen[rank] = _Seen(beat, now, now)
                continue
            if beat.count != last.beat.count:
                last.heard = now
            if beat.number != last.beat.number:
                last.moved = now
            last.beat = beat

    def forgive(self, now: float) -> None:
        """Counts from here on: this process was stopped itself, and heard nobody meanwhile."""
        for seen in self._seen.values():
            seen.heard = seen.moved = now

    def verdict(self, now: float) -> Verdict | None:
        """Who has exceeded its time, if anybody has; a rank that only waits is not to blame."""
        watched = {rank: seen for rank, seen in sorted(self._seen.items()) if not seen.beat.ended}
        silent = [rank for rank, seen in watched.items() if _exceeds(now - seen.heard, self._silence_limit(seen.beat))]
        late = {rank for rank, seen in watched.items() if _exceeds(now - seen.moved, self.limits.get(seen.beat.phase))}
        if not silent and not late:
            return None
        quiet = [rank for rank, seen in watched.items() if now - seen.heard > self._quiet_seconds]
        busy = [rank for rank, seen in watched.items() if rank not in quiet and not seen.beat.waits]
        suspects = silent or quiet or self._furthest_behind(busy)
        if suspects and not silent and not late.intersection(suspects):
            return None  # the others wait for a rank that is within the time of its phase, such as a long save
        if len(suspects) == len(watched) > 1:
            suspects = []
        places: dict[str, list[int]] = {}
        for rank, seen in watched.items():
            places.setdefault(f"{seen.beat.place} ({seen.beat.phase})", []).append(rank)
        return Verdict(tuple(self._name(rank, now, rank in quiet) for rank in suspects), places)

    def living(self, now: float) -> list[int]:
        """Ranks that give heartbeats."""
        return [
            rank for rank, seen in self._seen.items() if now - seen.heard <= self._quiet_seconds and not seen.beat.ended
        ]

    def _silence_limit(self, beat: Beat) -> float | None:
        """A thread that only beats needs no hour, whatever the phase may need."""
        known = [limit for limit in (self.limits.get(beat.phase), self.limits.get(STEP)) if limit is not None]
        return min(known, default=None)

    def _furthest_behind(self, ranks: Sequence[int]) -> list[int]:
        at = {rank: (self._seen[rank].beat.iteration, _ORDER[self._seen[rank].beat.phase]) for rank in ranks}
        return [rank for rank in ranks if at[rank] == min(at.values())]

    def _name(self, rank: int, now: float, is_silent: bool) -> Named:
        seen = self._seen[rank]
        beat = seen.beat
        return Named(
            rank, beat.host, beat.pid, beat.phase, beat.iteration, beat.place, is_silent,
            round(now - seen.heard, 1), round(now - seen.moved, 1),
        )  # fmt: skip


def _exceeds(seconds: float, limit: float | None) -> bool:
    return limit is not None and seconds > limit
