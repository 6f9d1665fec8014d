"""Fixtures of the scaling tools' tests."""

from tests.parity import single_process  # noqa: F401
