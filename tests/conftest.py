"""What several test files share: the demo's model, encoder and shards, made once per session."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

import laver_megatron  # noqa: F401  # before any test file imports Megatron-Core, which it prepares the import of

# Without deadlines, for busy machines. `make test` tries the same examples every time; `make test-full` searches anew
# and prints how to repeat what it finds.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors, and often several processes on few cores


@pytest.fixture(autouse=True)
def own_log_handlers() -> Iterator[None]:
    """A program that runs in this process logs to the stderr of its test, which is closed after it."""
    logger = logging.getLogger("laver_megatron")
    handlers, level = logger.handlers[:], logger.level
    yield
    logger.handlers[:], logger.level = handlers, level


@pytest.fixture(scope="session")
def demo_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small demo: model/, encoder/, shards/train-*.tar (96 samples) and shards/valid-*.tar (24). Read only."""
    from laver_megatron.demo.make import make_demo

    return make_demo(tmp_path_factory.mktemp("demo"), num_train_samples=96, num_valid_samples=24)
