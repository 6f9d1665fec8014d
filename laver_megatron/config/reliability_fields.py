"""The section of the configuration that says how a run survives faults: when it saves and stops, what it keeps, how
long it waits. None of it changes the numbers of the iterations that are trained."""

from __future__ import annotations

from dataclasses import dataclass

from laver_megatron.config.options import ABOVE_ZERO, option


@dataclass(frozen=True, kw_only=True)
class ReliabilityConfig:
    """Saving, stopping, and what to do about faults."""

    start_timeout_minutes: float | None = option(
        "minutes from the start of a process to the first iteration after which the watchdog ends the run with exit "
        "status 75 and names the rank that stopped; none: any time",
        valid=ABOVE_ZERO,
        default=60,
    )
    data_timeout_minutes: float | None = option(
        "the same for reading the data of one iteration", valid=ABOVE_ZERO, default=10
    )
    step_timeout_minutes: float | None = option(
        "the same for one iteration, and for a rank without a heartbeat in any phase", valid=ABOVE_ZERO, default=10
    )
    save_timeout_minutes: float | None = option("the same for one checkpoint", valid=ABOVE_ZERO, default=60)
    straggler_percent: float | None = option(
        "say it when a rank is busy for so many per cent longer than the others of its pipeline stage; none: never",
        valid=ABOVE_ZERO,
        default=50,
    )
