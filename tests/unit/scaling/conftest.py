"""Fixtures of the scaling tools' tests."""

from tests.parity import single_process  # noqa: F401
from tests.unit.scaling.small_sweeps import ladder, sweep  # noqa: F401
