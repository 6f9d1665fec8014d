"""Fixtures of the distributed tests: the worker processes and the small random model, both once a session."""

from collections.abc import Iterator

import pytest

from tests.distributed.build import Assets, make_assets
from tests.distributed.harness import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Four processes that stay for the whole session."""
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Assets:
    """Random Qwen2.5 checkpoints (tied and untied) and a random SigLIP encoder in Hugging Face format."""
    return make_assets(tmp_path_factory.mktemp("assets"))
