"""Fixtures of the planner's tests."""

import pytest

from tests.small_run import write_encoder


@pytest.fixture(scope="module")
def encoder_dir(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("encoder"))
