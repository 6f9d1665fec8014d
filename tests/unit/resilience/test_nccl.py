"""NCCL's variables, with CUDA made up."""

import pytest
import torch

from laver_megatron.resilience import nccl

VARIABLES = {
    "TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE",
    "TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_NCCL_ASYNC_ERROR_HANDLING",
}  # fmt: skip


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_nothing_without_cuda(tmp_path):
    environ = {}
    nccl.set_nccl_variables(tmp_path / "run", environ)
    nccl.write_flight_record(tmp_path, 0)
    assert environ == {} and list(tmp_path.iterdir()) == []


def test_the_flight_recorder_writes_into_the_run(cuda, tmp_path, monkeypatch):
    environ = {}
    monkeypatch.chdir(tmp_path)
    nccl.set_nccl_variables(nccl.Path("run"), environ)
    assert environ.keys() == VARIABLES
    assert environ["TORCH_FR_DUMP_TEMP_FILE"] == str(tmp_path / "run" / "faults" / "nccl_rank_")
    assert (tmp_path / "run" / "faults").is_dir()


def test_what_the_user_has_set_stays(cuda, tmp_path):
    given = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "0", "TORCH_FR_DUMP_TEMP_FILE": "/x", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}
    environ = dict(given)
    nccl.set_nccl_variables(tmp_path, environ)
    # Also under the other name, which would take precedence.
    assert environ == {**given, "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3"}


def test_the_names_are_torchs():
    """Those that any build of torch has in its libraries or headers."""
    library = (nccl.Path(torch.__file__).parent / "lib" / "libtorch_cpu.so").read_bytes()
    header = nccl.Path(torch.__file__).parent / "include/torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp"
    known = library + header.read_bytes()
    assert [name for name in VARIABLES if name.encode() not in known] == []


def test_the_watchdog_writes_the_record(cuda, tmp_path, monkeypatch):
    monkeypatch.setattr(torch._C._distributed_c10d, "_dump_nccl_trace", lambda: b"trace", raising=False)
    nccl.write_flight_record(tmp_path, 3)
    assert (tmp_path / "nccl_rank_3").read_bytes() == b"trace"
