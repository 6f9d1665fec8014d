"""The same training steps on the CPU and on a GPU, and in fp32 and bf16."""

import pytest
import torch

from tests.distributed.build import make_assets, relative_distance
from tests.gpu.kernels import BF16, FP32, kernels
from tests.gpu.steps import TERMS, steps_in_a_process

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    directory = tmp_path_factory.mktemp("assets")
    make_assets(directory)
    return directory


@pytest.fixture(scope="module")
def on_cpu(assets):
    steps = steps_in_a_process(assets, assets / "cpu.pt", on_cpu=True, attention_kernel="dense")
    assert steps["device"] == "cpu"
    return steps


def on_gpu(assets, **changes):
    steps = steps_in_a_process(assets, assets / "gpu.pt", on_cpu=False, **changes)
    assert steps["device"].startswith("cuda")
    return steps


def assert_same_steps(found, expected, *, term, gradient, moved):
    """Terms by relative difference; gradients, and what weights and teacher moved, in relative Frobenius norm."""
    for name, start in expected["start"].items():
        assert torch.equal(found["start"][name], start), name
    for step, (mine, theirs) in enumerate(zip(found["steps"], expected["steps"], strict=True)):
        for name in TERMS:
            assert mine["terms"][name] == pytest.approx(theirs["terms"][name], rel=term), (step, name)
        for name, other in theirs["gradients"].items():
            assert relative_distance(mine["gradients"][name], other) < gradient, (step, "gradient", name)
        for name, other in theirs["values"].items():
            distance = (mine["values"][name] - other).norm()
            assert distance < moved * (other - expected["start"][name]).norm(), (step, "weights", name)
        # The teacher begins as the student, whose parameters it shares names with, and moves a tenth of its way.
        for name, other in theirs["teacher"].items():
            assert relative_distance(mine["teacher"][name], other) < moved, (step, "teacher", name)


@pytest.mark.parametrize("kernel", ["dense", *kernels(FP32)])
def test_steps_in_fp32_are_those_of_the_cpu(assets, on_cpu, kernel):
    # Two devices' sums in fp32 and no TF32; the oracle, in fp64, is 6e-6 from the CPU's gradients.
    assert_same_steps(on_gpu(assets, attention_kernel=kernel), on_cpu, term=2e-5, gradient=2e-4, moved=2e-4)


@pytest.mark.parametrize("kernel", ["dense", *kernels(BF16)])
def test_bf16_is_close_to_fp32(assets, on_cpu, kernel):
    steps = on_gpu(assets, attention_kernel=kernel, bf16=True)
    # The CPU's bf16 is 0.05 from fp32 in the first step's gradient; the second begins elsewhere.
    first, expected = steps["steps"][0], on_cpu["steps"][0]
    for name in ("lm_loss", "mim_loss", "gram_loss", "loss"):
        assert first["terms"][name] == pytest.approx(expected["terms"][name], rel=0.02), name
    ours, theirs = (torch.cat([g.flatten() for g in step["gradients"].values()]) for step in (first, expected))
    assert relative_distance(ours, theirs) < 0.1
