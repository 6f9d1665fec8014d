"""Fixtures of the model's tests."""

from tests.parity import single_process  # noqa: F401
