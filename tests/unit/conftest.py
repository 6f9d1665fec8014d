"""The demo's tokenizer and preprocessor, shards to order, and one process as Megatron-Core sees it."""

import sys
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from webdataset import TarWriter

from laver_megatron.data.read.sample_encoder import SampleEncoder
from laver_megatron.encoders import ImagePreprocessor, open_preprocessor
from tests.parity import single_process  # noqa: F401

# --- what `make test-fast` leaves out ------------------------------------------------------------------

_is_fast_run = False
_may_start_processes = True


def pytest_configure(config: pytest.Config) -> None:
    global _is_fast_run
    _is_fast_run = "not processes" in config.option.markexpr
    if _is_fast_run:
        sys.addaudithook(_refuse_processes)
        BaseProcess.start = _refusing(BaseProcess.start)


def _refuse_processes(event: str, arguments: tuple = ()) -> None:
    if not _may_start_processes and event in ("subprocess.Popen", "os.fork"):
        raise RuntimeError("this test starts a process: mark it `processes`, and `make test-fast` will leave it out")


def _refusing(start: Callable[[BaseProcess], None]) -> Callable[[BaseProcess], None]:
    """Of spawned processes there is no event."""

    def refuse_or_start(process: BaseProcess) -> None:
        _refuse_processes("os.fork")
        start(process)

    return refuse_or_start


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    """Among the fast tests none starts a process."""
    global _may_start_processes
    _may_start_processes = not _is_fast_run
    try:
        return (yield)
    finally:
        _may_start_processes = True


# --- fixtures ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tokenizer(demo_dir):
    return AutoTokenizer.from_pretrained(demo_dir / "model")


@pytest.fixture(scope="session")
def encoder(tokenizer) -> SampleEncoder:
    return SampleEncoder(tokenizer)


@pytest.fixture(scope="session")
def preprocessor(demo_dir) -> ImagePreprocessor:
    return open_preprocessor(demo_dir / "encoder")


@pytest.fixture
def write_shard(tmp_path) -> Callable[..., Path]:
    """write_shard({key: {extension: bytes}}, name="some.tar") -> path, written by webdataset itself."""

    def write(samples: dict[str, dict[str, bytes]], name: str = "train-00000.tar") -> Path:
        path = tmp_path / name
        with TarWriter(str(path), encoder=False, mtime=0) as tar:
            for key, files in samples.items():
                tar.write({"__key__": key, **files})
        return path

    return write
