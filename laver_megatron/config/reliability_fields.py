"""The section of the configuration that says how a run survives faults: when it saves and stops, what it keeps, how
long it waits. None of it changes the numbers of the iterations that are trained."""

from __future__ import annotations

from dataclasses import dataclass

from laver_megatron.config.options import ABOVE_ZERO, NOT_NEGATIVE, POSITIVE, option


@dataclass(frozen=True, kw_only=True)
class ReliabilityConfig:
    """Saving, stopping, and what to do about faults."""

    save_interval_minutes: float | None = option(
        "minutes after a checkpoint at which the next is saved, beside those of --save-interval; none: by iterations "
        "alone",
        valid=ABOVE_ZERO,
        default=30.0,
    )
    exit_duration_minutes: float | None = option(
        "save and stop this long after the start, restarts included; SLURM's own time limit is heeded without it",
        valid=ABOVE_ZERO,
        default=None,
    )
    restarts: int = option(
        "times that `laver train` starts its processes again after a fault such as a killed process; not after "
        "mistakes in the settings",
        valid=NOT_NEGATIVE,
        default=0,
    )
    restart_same_step_limit: int = option(
        "faults in a row at the same iteration after which it is not started again", valid=POSITIVE, default=3
    )
