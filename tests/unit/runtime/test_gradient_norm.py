"""The gradient norm that Megatron-Core takes where it has no kernel for it, against fp64."""

import math
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32, get_grad_norm_fp32
from megatron.core.utils import local_multi_tensor_l2_norm

from laver_megatron.runtime.backend import shut_down_parallelism
from laver_megatron.runtime.gradient_norm import agreed_loss_and_norm, blockwise_l2_norm
from tests.distributed.harness import Layout, join

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the machine may have Megatron's own kernels")

# Blocks of 4096 squares in fp32: at worst 4096 / 8 roundings in a row of 6e-8 each, half of that in the norm, and of
# random signs a hundredth of it.
TOLERANCE = 1e-6
# More rounding than TOLERANCE allows for the sum over the whole tensor in fp32.
LARGE = 4_000_000


@pytest.fixture(autouse=True, scope="module")
def group_of_one():
    join(Layout(), seed=0)
    yield
    shut_down_parallelism()


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def norm_fp64(*tensors):
    """By numpy, a piece at a time."""
    pieces = (piece.numpy().astype(np.float64) for tensor in tensors for piece in tensor.reshape(-1).split(2**20))
    return math.sqrt(sum(float(np.dot(piece, piece)) for piece in pieces))


def megatron_norm(*gradients):
    """By the function that the optimizer's `get_grad_norm` calls."""
    return get_grad_norm_fp32(list(gradients), grad_stats_parallel_group=torch.distributed.group.WORLD)


@pytest.mark.parametrize("num_elements", [1, 4095, 4096, 4097, 1_000_003, LARGE])
def test_megatron_s_norm_of_one_tensor(num_elements):
    gradient = normal(num_elements)
    assert megatron_norm(gradient) == pytest.approx(norm_fp64(gradient), rel=TOLERANCE)


def test_the_tolerance_tells_megatron_s_own_norm_apart():
    gradient = normal(LARGE)
    own, _ = local_multi_tensor_l2_norm(65536, None, [[gradient]], False)
    assert abs(own.item() / norm_fp64(gradient) - 1) > 10 * TOLERANCE


def test_megatron_s_norm_of_as_many_elements_as_an_embedding_has():
    gradient = normal(100_000_000)
    exact = norm_fp64(gradient)
    assert megatron_norm(gradient) == pytest.approx(exact, rel=TOLERANCE)
    own, _ = local_multi_tensor_l2_norm(65536, None, [[gradient]], False)
    assert own.item() < 0.99 * exact


def test_tensors_of_all_shapes_and_scales_together():
    gradients = [normal(3, 5, seed=1) * 1e-6, normal(700, 900, seed=2), normal(5000, seed=3) * 1e3, torch.zeros(0)]
    assert megatron_norm(*gradients) == pytest.approx(norm_fp64(*gradients), rel=TOLERANCE)
    transposed = normal(300, 200, seed=4).t()
    assert megatron_norm(transposed) == pytest.approx(norm_fp64(transposed), rel=TOLERANCE)
    assert megatron_norm() == 0.0
    assert megatron_norm(torch.zeros(10_000)) == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 9_999])
def test_what_is_not_finite_stays_so(value, place):
    gradient = torch.ones(10_000)
    gradient[place] = value
    assert not math.isfinite(megatron_norm(gradient))


def test_memory_is_a_small_part_of_the_tensor():
    """Counted in bytes of the tensors that the norm makes."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class LargestResult(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and not func.is_view:
                self.largest = max(self.largest, result.nbytes)
            return result

    gradient = normal(LARGE)
    with LargestResult() as made:
        blockwise_l2_norm(65536, torch.zeros(1), [[gradient]], False)
    assert 0 < made.largest < gradient.nbytes / 1000


def test_clipping_leaves_the_norm_asked_for():
    parameter = torch.nn.Parameter(torch.zeros(LARGE))
    parameter.grad = normal(LARGE)
    clip_grad_by_total_norm_fp32([parameter], 0.3, megatron_norm(parameter.grad))
    assert norm_fp64(parameter.grad) == pytest.approx(0.3, rel=TOLERANCE)


def optimizer_of(counted, copies):
    """What is asked of Megatron's: parameters with gradients, of which some count for the norm."""
    parameters = []
    for gradient in (*counted, *copies):
        parameters.append(torch.nn.Parameter(torch.zeros_like(gradient)))
        parameters[-1].grad = gradient
    part = SimpleNamespace(
        get_main_grads_for_grad_norm=lambda: [parameter.grad for parameter in parameters[: len(counted)]],
        get_parameters=lambda: [*parameters, torch.nn.Parameter(torch.zeros(3))],  # the last one without a gradient
    )
    return SimpleNamespace(chained_optimizers=[part])


def test_the_agreed_norm_is_megatron_s_whatever_the_copies_are():
    counted, copies = [normal(700, seed=1), normal(30, 9, seed=2)], [normal(5000, seed=3)]
    loss, norm = agreed_loss_and_norm(optimizer_of(counted, copies), 0.1)
    assert norm == megatron_norm(*counted) and loss == torch.tensor(0.1).item()
    assert agreed_loss_and_norm(optimizer_of([], []), 2.0) == (2.0, 0.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_agreed_norm_sees_every_copy(value):
    copy = torch.ones(5000)
    copy[4999] = value
    loss, norm = agreed_loss_and_norm(optimizer_of([torch.ones(4)], [torch.ones(3), copy]), 2.0)
    assert loss == 2.0 and math.isnan(norm)
    loss, norm = agreed_loss_and_norm(optimizer_of([torch.ones(4)], []), value)
    assert math.isnan(loss) and norm == 2.0


def test_ranks_agree_in_one_collective():
    optimizer = optimizer_of([torch.ones(4)], [torch.ones(3)])
    with mock.patch.object(torch.distributed, "all_reduce") as all_reduce:
        agreed_loss_and_norm(optimizer, 2.0)
    all_reduce.assert_called_once()
