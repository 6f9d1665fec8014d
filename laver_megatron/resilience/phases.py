"""What this process is doing: its main thread says which phase it is in, other threads look.

    enter("step", iteration)            from here on
    with phase("data"): ...             then back to the phase before
    @phase("save")                      for the length of a call

Saying it is one assignment, of a tuple that holds everything: who looks sees a state that was, never half of one. The
seconds spent in each phase tile the time since the process began, so nothing of a run's time is unaccounted for.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import psutil

# In the order of an iteration.
START, DATA, STEP, VALIDATE, SAVE = PHASES = ("start", "data", "step", "validate", "save")


class Moment(NamedTuple):
    """A stretch of the main thread's work.

    Attributes:
        number: rises with every stretch, so that two that look alike differ: the main thread moves while it rises.
        since: when it began, `time.monotonic`.
        before: seconds in each phase up to then.
    """

    phase: str
    iteration: int
    number: int
    since: float
    before: Mapping[str, float]


# Importing torch and Megatron-Core has taken seconds of the start already.
_moment = Moment(START, 0, 0, time.monotonic() - max(0.0, time.time() - psutil.Process().create_time()), {})


def now() -> Moment:
    """Where the main thread is."""
    return _moment


def enter(name: str, iteration: int | None = None) -> None:
    """The main thread is in another phase, or again in the same one. iteration: how many are done; None: as before."""
    global _moment
    moment, time_now = _moment, time.monotonic()
    _moment = Moment(
        name,
        moment.iteration if iteration is None else iteration,
        moment.number + 1,
        time_now,
        {**moment.before, moment.phase: moment.before.get(moment.phase, 0.0) + time_now - moment.since},
    )


@contextmanager
def phase(name: str) -> Iterator[None]:
    """The main thread is in a phase while the block runs, or the function that this decorates."""
    before = _moment.phase
    enter(name)
    try:
        yield
    finally:
        enter(before)


def seconds_by_phase() -> dict[str, float]:
    """Seconds in each phase since the process began, the present one included."""
    moment = _moment
    spent = {name: moment.before.get(name, 0.0) for name in PHASES}
    spent[moment.phase] += time.monotonic() - moment.since
    return spent
