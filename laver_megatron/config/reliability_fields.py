"""The section of the configuration that says how a run survives faults: when it saves and stops, what it keeps, how
long it waits. None of it changes the numbers of the iterations that are trained."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ReliabilityConfig:
    """Saving, stopping, and what to do about faults."""
