"""The section of the configuration that says how a run survives faults: when it saves and stops, what it keeps, how
long it waits. Of all of it only --spike-action changes the numbers of iterations that are trained."""

from __future__ import annotations

from dataclasses import dataclass

from laver_megatron.config.options import ABOVE_ZERO, NOT_NEGATIVE, POSITIVE, Range, option

SAVE_FAILURES = ("stop", "continue")


@dataclass(frozen=True, kw_only=True)
class ReliabilityConfig:
    """Saving, stopping, and what to do about faults."""

    spike_action: str = option(
        "what becomes of a step whose loss or gradient norm is a spike; skip: it is not applied, as one that is not "
        "finite; stop: nor is it, and the run saves the state before it and ends; run_dir/skipped.jsonl names its "
        "samples",
        choices=("none", "skip", "stop"),
        default="none",
    )
    spike_sigmas: float = option(
        "a loss or gradient norm more than this many standard deviations above the mean of recent steps is a spike",
        valid=ABOVE_ZERO,
        default=6.0,
    )
    spike_window: int = option(
        "applied steps that mean and deviation are taken over; before there are as many, nothing is a spike",
        valid=Range("must be at least 2", {"minimum": 2}),
        default=100,
    )
    strict_load: bool = option(
        "go on from the newest checkpoint or not at all; otherwise a damaged one is passed over for the newest whole "
        "one, with a warning",
        default=False,
    )
    async_save: bool = option(
        "train on while a checkpoint is written, from a copy in the host's memory; the last one is waited for",
        default=True,
    )
    save_failure: str = option(
        "when a checkpoint cannot be written (a full disk): stop, or continue with a warning and try again at the next "
        "save; the last save of a run has to succeed",
        choices=SAVE_FAILURES,
        default="stop",
    )
    keep_last: int | None = option(
        "checkpoints to keep, the newest; an older one is deleted only when the new one is whole, so leave room for "
        "one more (default: all are kept)",
        valid=POSITIVE,
        default=None,
    )
    keep_every: int | None = option(
        "with --keep-last, also keep those at iterations divisible by this", valid=POSITIVE, default=None
    )
    keep_best: bool = option(
        "with --keep-last, also keep the one with the lowest validation loss of those that were validated",
        default=False,
    )
    save_interval_minutes: float | None = option(
        "save a checkpoint this many minutes after the last one, in addition to --save-interval; none: by iterations "
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
    node_timeout_minutes: float = option(
        "minutes that the launchers of several nodes with --restarts wait for each other before each start; one that "
        "has not come by then is lost, and the run ends or, with --elastic, goes on without it",
        valid=ABOVE_ZERO,
        default=15.0,
    )
    elastic: bool = option(
        "go on without lost nodes at a smaller data-parallel size, with the same samples in the same order; not "
        "without node 0; needs --restarts",
        default=False,
    )
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
        "report a rank that is busy this many percent longer than the others of its pipeline stage; none: never",
        valid=ABOVE_ZERO,
        default=50,
    )
