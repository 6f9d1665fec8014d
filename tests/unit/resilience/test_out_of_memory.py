"""What is said when memory runs out."""

import pytest
import torch

from laver_megatron import train
from laver_megatron.config.fields import Config
from laver_megatron.resilience.out_of_memory import is_out_of_memory, out_of_memory_message
from laver_megatron.resilience.status import read_status

CUDA_TEXT = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.10 GiB of which 5 MiB is free."
)


def config(**settings):
    given = {"data_path": ("x",), "run_dir": "x", "seq_length": 4096, "train_iters": 1, "micro_batch_size": 4}
    return Config.of(**{**given, "global_batch_size": 8, "tensor_model_parallel_size": 2, **settings})


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in {"memory_allocated": 60, "memory_reserved": 70}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value << 30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 80 << 30))


def test_the_gpus_numbers_the_layout_and_what_to_do(gpu):
    text = out_of_memory_message(torch.OutOfMemoryError(CUDA_TEXT), config(), 8)
    assert "20.00 MiB asked for; 60.0 GiB allocated, 70.0 reserved, 1.0 free of 80.0" in text
    assert "TP 2 x PP 1 x DP 4, --micro-batch-size 4, --seq-length 4096, --recompute-granularity none" in text
    for remedy in ("--sequence-parallel;", "--micro-batch-size 2;", "--recompute-granularity full;", "laver plan"):
        assert remedy in text, remedy


def test_what_is_in_force_is_not_proposed(gpu):
    settings = {"sequence_parallel": True, "recompute_granularity": "full", "micro_batch_size": 1}
    remedies = out_of_memory_message(torch.OutOfMemoryError(CUDA_TEXT), config(**settings), 8).partition("lowers it")[2]
    for remedy in ("--sequence-parallel", "--micro-batch-size", "--recompute-granularity"):
        assert remedy not in remedies


def test_a_real_allocation_on_the_host_fails():
    with pytest.raises(RuntimeError) as failed:
        torch.empty(1 << 58, dtype=torch.uint8)
    assert is_out_of_memory(failed.value)
    text = out_of_memory_message(failed.value, config(num_workers=4), 2)
    assert (
        text.startswith("out of memory on the host: 288230376151711744 bytes asked for") and "--num-workers 2" in text
    )


def test_other_errors_are_not():
    assert not is_out_of_memory(RuntimeError("shapes differ")) and is_out_of_memory(MemoryError())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(CUDA_TEXT), MemoryError()])
def test_the_run_ends_with_it(monkeypatch, tmp_path, error):
    def fail(config):
        raise error

    monkeypatch.setattr(train, "setup", fail)
    monkeypatch.setattr(train, "heed_signals", lambda run_dir: None)
    with pytest.raises(
        SystemExit, match=r"^rank 0: error: out of memory on the .*What lowers it: .*\[train.py:\d+\]$"
    ) as ended:
        train.run(config(run_dir=str(tmp_path / "run")))
    assert isinstance(ended.value.code, str)  # exit status 1
    assert ": OutOfMemory: out of memory on the " in read_status(tmp_path / "run")["message"]


def test_other_runtime_errors_keep_their_traceback(monkeypatch, tmp_path):
    def fail(config):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(train, "setup", fail)
    monkeypatch.setattr(train, "heed_signals", lambda run_dir: None)
    with pytest.raises(RuntimeError, match="shapes differ"):
        train.run(config(run_dir=str(tmp_path / "run")))
