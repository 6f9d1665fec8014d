"""Fixtures of the converters' tests."""

from tests.parity import single_process  # noqa: F401
