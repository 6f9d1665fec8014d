"""What Megatron-Core believes to be CUDA runs on the CPU where there is no GPU."""

import pytest
import torch

from laver_megatron.runtime.adam import ResumableAdam
from laver_megatron.runtime.backend import (
    initialise_parallelism,
    shut_down_parallelism,
    use_backend,
)

cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="redirections exist without CUDA only")


@pytest.fixture(autouse=True, scope="module")
def backend():
    return use_backend()


def test_the_same_answer_every_time(backend):
    assert use_backend() is backend
    assert backend.is_cuda == torch.cuda.is_available()
    assert backend.communication == ("nccl" if backend.is_cuda else "gloo")
    assert torch.zeros(1, device=torch.cuda.current_device()).device == backend.device


CPU = torch.device("cpu")
FACTORIES = {
    "empty": lambda device: torch.empty(3, device=device),
    "zeros": lambda device: torch.zeros(3, device=device),
    "full": lambda device: torch.full((3,), 2.0, device=device),
    "arange": lambda device: torch.arange(3, device=device),
    "tensor": lambda device: torch.tensor([1.0], device=device),
    "zeros_like": lambda device: torch.zeros_like(torch.ones(3), device=device),
    "new_zeros": lambda device: torch.ones(3).new_zeros(2, device=device),
    "to keyword": lambda device: torch.ones(3).to(device=device),
    "to": lambda device: torch.ones(3).to(device),
    "to with dtype": lambda device: torch.ones(3).to(device, torch.bfloat16),
    "module": lambda device: torch.nn.Linear(2, 3, device=device).weight,
    "module.to": lambda device: torch.nn.Linear(2, 3).to(device).weight,
}


@cpu_only
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 0)], ids=str)
@pytest.mark.parametrize("factory", FACTORIES)
def test_cuda_means_cpu(factory, device):
    assert FACTORIES[factory](device).device == CPU


@cpu_only
def test_cuda_methods():
    tensor = torch.ones(3)
    assert tensor.cuda() is tensor
    assert tensor.cuda(non_blocking=True) is tensor
    assert torch.nn.Linear(2, 3).cuda().weight.device == CPU
    assert torch.cuda.current_device() == CPU
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.current_stream() is None


@cpu_only
def test_type_names():
    """Megatron-Core compares these strings when it groups gradients."""
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.ones(1, dtype=torch.float16).type() == "torch.cuda.HalfTensor"
    assert torch.ones(1, dtype=torch.int64).type() == "torch.LongTensor"
    assert torch.ones(1).type(torch.float64).dtype == torch.float64
    assert torch.ones(1).type(dtype=torch.int32).dtype == torch.int32


@cpu_only
def test_other_devices_and_results_are_left_alone():
    assert torch.zeros(2, device="meta").device.type == "meta"
    assert torch.ones(3).to(torch.float64).dtype == torch.float64
    a = torch.ones(3, requires_grad=True)
    (a.cuda() * 2).sum().backward()
    assert a.grad.tolist() == [2, 2, 2]


@cpu_only
def test_random_states():
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    drawn = torch.rand(4, device="cuda")
    torch.set_rng_state(state)
    assert torch.equal(torch.rand(4), drawn)


def test_groups_of_one_process_can_be_left_and_joined_again():
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    for _ in range(2):
        initialise_parallelism(
            tensor_model_parallel_size=1,
            pipeline_model_parallel_size=1,
            virtual_pipeline_model_parallel_size=None,
            timeout_minutes=1,
            seed=3,
        )
        assert parallel_state.get_tensor_model_parallel_world_size() == 1
        assert parallel_state.is_pipeline_first_stage() and parallel_state.is_pipeline_last_stage()
        with get_cuda_rng_tracker().fork():
            forked = torch.rand(2)
        assert not torch.equal(forked, torch.rand(2))
        shut_down_parallelism()
        assert not torch.distributed.is_initialized()
    shut_down_parallelism()


@cpu_only
def test_the_rng_tracker_restores_the_stream():
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    tracker.add("other", 2)
    with tracker.fork("other"):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(2)
    assert torch.equal(torch.rand(3), inside)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with TransformerEngine or apex Megatron uses their Adam")
def test_megatron_gets_the_adam_that_resumes():
    import megatron.core.optimizer as optimizer
    from megatron.core.optimizer import distrib_optimizer

    assert optimizer.Adam is ResumableAdam and distrib_optimizer.Adam is ResumableAdam
    assert distrib_optimizer.HAVE_APEX_OR_TE and not optimizer.USING_PYTORCH_OPTIMIZER
