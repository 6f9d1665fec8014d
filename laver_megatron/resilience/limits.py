"""How long a phase may take before the watchdog ends the run, and how long a collective may."""

from laver_megatron.config.fields import Config
from laver_megatron.resilience.phases import DATA, SAVE, START, STEP, VALIDATE

# The watchdog knows which rank stopped; a collective that runs out of time blames whoever waited. So it comes later.
_MINUTES_LATER, _SHARE_BEFORE = 2, 0.8
_MINUTES_UNWATCHED = 10
_LONGEST_INTERVAL, _BEATS_A_LIMIT = 5.0, 10


def phase_limits(config: Config) -> dict[str, float | None]:
    """Seconds that each phase may last; None: any time. A validation is many: of one global batch each.

    A given --distributed-timeout-minutes ends a collective in whatever phase it is, so no limit is longer than it."""
    reliability, collective = config.reliability, config.parallel.distributed_timeout_minutes
    minutes = {
        START: reliability.start_timeout_minutes,
        DATA: reliability.data_timeout_minutes,
        STEP: reliability.step_timeout_minutes,
        SAVE: reliability.save_timeout_minutes,
        VALIDATE: reliability.step_timeout_minutes,
    }
    longest = None if collective is None else collective * _SHARE_BEFORE
    return {
        name: None if limit is None else 60 * (limit if longest is None else min(limit, longest))
        for name, limit in minutes.items()
    }


def collective_timeout_minutes(config: Config) -> int:
    """Minutes that a collective may take: as given, or so many that the watchdog is first."""
    if config.parallel.distributed_timeout_minutes is not None:
        return config.parallel.distributed_timeout_minutes
    limits = [limit for limit in phase_limits(config).values() if limit is not None]
    return int(max(limits) / 60) + _MINUTES_LATER if limits else _MINUTES_UNWATCHED


def beat_interval(limits: dict[str, float | None]) -> float:
    """Seconds between two heartbeats."""
    return min([_LONGEST_INTERVAL, *(limit / _BEATS_A_LIMIT for limit in limits.values() if limit is not None)])
