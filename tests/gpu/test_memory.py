"""Peak memory of training steps on a GPU against what the planner says beforehand."""

import gc
from importlib.util import find_spec

import pytest
import torch

from laver_megatron.encoders import read_encoder
from laver_megatron.hf.shape import read_model_shape
from laver_megatron.planning.activations import activations_of_stage
from laver_megatron.planning.memory import state_of_rank
from laver_megatron.planning.workload import Workload
from laver_megatron.runtime.backend import shut_down_parallelism, use_backend
from tools.benchmarks.memory import peak_of_steps
from tools.benchmarks.our_step import OurStep, make_config, make_trainer, write_model
from tools.benchmarks.step_shapes import StepShape

# State and activations are both gigabytes, so that an error in either shows.
SHAPE = StepShape(
    "h2048 L6", 2048, 6, 4096, 5632, 16, 4, 32768, num_images=4, grid_side=27, vision_head_hidden_size=1024
)


def planned_bytes(config, directory, shape, *, fused):
    """Of one rank without any division: what it keeps and what a micro-batch takes."""
    encoder, model = read_encoder(directory / "encoder"), read_model_shape(directory / "model")
    workload = Workload(shape.seq_length, shape.num_images, shape.image_tokens, 1, "mixed", encoder)
    state = state_of_rank(config, model, encoder, {}, 1, 0, 0)
    activations = activations_of_stage(config, model, workload, shape.num_micro_batches, 0, fused=fused)
    return state.total, activations.total


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recompute", [None, "selective", "full"])
@pytest.mark.parametrize("laver", [True, False], ids=["laver", "lm"])
def test_peak_is_what_the_planner_says(tmp_path, laver, recompute):
    device = use_backend().device
    write_model(SHAPE, tmp_path, torch.bfloat16)
    config = make_config(SHAPE, tmp_path, laver=laver, bf16=True, recompute_granularity=recompute)
    state, activations = planned_bytes(config, tmp_path, SHAPE, fused=find_spec("transformer_engine") is not None)
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    try:
        peak = peak_of_steps(lambda: OurStep(make_trainer(config, SHAPE), "memory"), device) - before
    finally:
        shut_down_parallelism()
    assert peak == pytest.approx(state + activations, rel=0.05), (
        f"{peak / 2**30:.2f} GiB; planned {state / 2**30:.2f} of state and {activations / 2**30:.2f} of activations"
    )
