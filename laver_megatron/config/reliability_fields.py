"""The section of the configuration that says how a run survives faults: when it saves and stops, what it keeps, how
long it waits. Of all of it only --spike-action changes the numbers of iterations that are trained."""

from __future__ import annotations

from dataclasses import dataclass

from laver_megatron.config.options import ABOVE_ZERO, Range, option


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
        "standard deviations above the mean of the last steps from which a value is a spike",
        valid=ABOVE_ZERO,
        default=6.0,
    )
    spike_window: int = option(
        "applied steps that mean and deviation are taken over; before there are as many, nothing is a spike",
        valid=Range("must be at least 2", {"minimum": 2}),
        default=100,
    )
