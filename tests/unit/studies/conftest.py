"""Fixtures of the studies' tests."""

from tests.unit.studies.small_sweeps import ladder, sweep  # noqa: F401
