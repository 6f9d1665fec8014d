"""Options of the engine on simulated machines: refused with a reason where they cannot work, else passed on."""

import dataclasses

import pytest

from laver_megatron.config.capabilities import Capabilities, find_capabilities
from laver_megatron.config.engine_checks import engine_problems
from laver_megatron.config.fields import Config, all_fields
from laver_megatron.config.refused import REFUSED
from laver_megatron.model.precision import teacher_config
from laver_megatron.model.qwen import transformer_config
from tests.unit.config.test_checks import SHAPE

CONFIG = Config.of(
    data_path=("shards",), seq_length=256, visual_seq_length=128, train_iters=10, run_dir="runs/test", bf16=True
)
CPU = Capabilities()
AMPERE, ADA, HOPPER, BLACKWELL = (
    Capabilities(compute_capability=capability, transformer_engine=(2, 8, 0))
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0))
)
TURING = Capabilities(compute_capability=(7, 5))
WITHOUT_ENGINE = Capabilities(compute_capability=(9, 0))
FP8 = {"fp8_format": "hybrid"}
PRECISION_AWARE = {"use_precision_aware_optimizer": True}


@pytest.mark.parametrize(
    "machine, settings, message",
    [
        (
            None,
            {"cuda_graph_impl": "local"},
            "cuda_graph_impl local is not supported: a graph replays what",
        ),
        (None, {"fine_grained_activation_offloading": True}, "fine_grained_activation_offloading on is not supported"),
        (None, {"tp_comm_overlap": True}, "tp_comm_overlap on is not supported: TransformerEngine's buffers"),
        (None, {"optimizer": "muon"}, "optimizer muon is not supported: it needs the package emerging_optimizers"),
        (None, {"use_mup": True}, "use_mup on is not supported: its multipliers are made for training"),
        (None, PRECISION_AWARE, "keeps no fp32 master weights, but the teacher averages them"),
        (None, PRECISION_AWARE | {"laver": False, "bf16": False}, "keeps what bf16 weights lack of fp32; set --bf16"),
        (CPU, PRECISION_AWARE | {"laver": False}, "use_precision_aware_optimizer needs a GPU, and none is here"),
        (WITHOUT_ENGINE, PRECISION_AWARE | {"laver": False}, "use_precision_aware_optimizer needs TransformerEngine;"),
        (CPU, {"attention_kernel": "flex"}, "attention_kernel flex needs CUDA (it has no backward pass on CPU)"),
        (CPU, {"attention_kernel": "flash"}, "attention_kernel flash needs CUDA; use auto or dense"),
        (
            TURING,
            {"attention_kernel": "flash"},
            "flash needs a GPU of compute capability 8.0, but this has 7.5; use flex",
        ),
        (None, {"attention_kernel": "flash", "bf16": False}, "flash computes in 16 bits; set --bf16, or use auto"),
        (None, FP8 | {"bf16": False}, "fp8_format hybrid needs bf16"),
        (None, {"teacher_fp8": True}, "teacher_fp8 needs fp8_format"),
        (None, FP8 | {"teacher_fp8": True, "laver": False}, "without LaVer there is no teacher"),
        (None, FP8 | {"seq_length": 250}, "seq_length + visual_seq_length 378 x micro_batch_size 1 / 1 ranks is 378"),
        (
            None,
            FP8 | {"fp8_recipe": "mxfp8", "teacher_fp8": True, "seq_length": 240, "visual_seq_length": 112},
            "multiples of 32 tokens with recipe mxfp8, but visual_seq_length 112",
        ),
        (
            None,
            FP8 | {"fp8_recipe": "delayed", "recompute_granularity": "selective", "recompute_modules": ("layernorm",)},
            "fp8_recipe delayed cannot recompute layernorm",
        ),
        (None, {"fp8_recipe": "mxfp8"}, "fp8_recipe mxfp8 has no use without fp8_format; set --fp8-format hybrid"),
        (CPU, {"ddp_bucket_size": 9}, "ddp_bucket_size 9 has no use without overlap_grad_reduce, which is off here"),
        (CPU, FP8, "fp8_format hybrid needs a GPU, and none is here"),
        (WITHOUT_ENGINE, FP8, "fp8_format hybrid needs TransformerEngine;"),
        (Capabilities((9, 0), (1, 13)), FP8, "TransformerEngine 2.1 or newer, but 1.13 is installed"),
        (AMPERE, FP8, "compute capability 8.9, but this has 8.0"),
        (
            ADA,
            FP8 | {"fp8_recipe": "blockwise"},
            "blockwise needs Hopper (compute capability 9.0), but this GPU has 8.9",
        ),
        (
            HOPPER,
            FP8 | {"fp8_recipe": "mxfp8"},
            "mxfp8 needs Blackwell (compute capability 10.0), but this GPU has 9.0",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_a_reason(machine, settings, message):
    problems = list(engine_problems(CONFIG.replace(**settings), machine))
    assert any(message in problem for problem in problems), problems


@pytest.mark.parametrize(
    "machine, settings",
    [
        (CPU, {}),
        (ADA, FP8),
        (HOPPER, FP8 | {"fp8_recipe": "blockwise", "teacher_fp8": True}),
        (HOPPER, FP8 | {"fp8_recipe": "delayed"}),
        (BLACKWELL, FP8 | {"fp8_recipe": "mxfp8"}),
        (HOPPER, PRECISION_AWARE | {"laver": False}),
        (HOPPER, {"attention_kernel": "flex"}),
        (Capabilities((8, 0)), {"attention_kernel": "flash"}),
    ],
)
def test_what_can_work_is_not(machine, settings):
    assert list(engine_problems(CONFIG.replace(**settings), machine)) == []


@pytest.mark.parametrize("width, fits", [(64, True), (128, True), (136, False), (20, False)])
def test_heads_that_flash_takes(width, fits):
    shape = dataclasses.replace(SHAPE, kv_channels=width)
    problems = list(engine_problems(CONFIG.replace(attention_kernel="flash"), HOPPER, shape))
    assert [f"up to 128 wide, but the model's are {width}; use flex" in problem for problem in problems] == [True] * (
        not fits
    )


def test_flash_without_cuda_is_one_problem():
    for bf16 in (False, True):
        [problem] = engine_problems(CONFIG.replace(attention_kernel="flash", bf16=bf16), CPU, SHAPE)
        assert problem == "attention_kernel flash needs CUDA; use auto or dense"


@pytest.mark.parametrize(
    "machine, num_replicas, settings, refused",
    [
        (CPU, 2, {}, True),
        (CPU, 2, {"overlap_grad_reduce": True}, False),
        (CPU, 2, {"overlap_param_gather": True}, False),
        (HOPPER, 2, {}, False),
        (HOPPER, 1, {}, True),
        (HOPPER, 2, {"overlap_grad_reduce": False}, True),
        (None, 2, {}, False),
        (None, None, {}, False),
    ],
)
def test_buckets_are_for_gradients_that_are_reduced_beside(machine, num_replicas, settings, refused):
    config = CONFIG.replace(ddp_bucket_size=9, **settings)
    problems = list(engine_problems(config, machine, num_replicas=num_replicas))
    assert ["ddp_bucket_size 9 has no use" in problem for problem in problems] == [True] * refused


@pytest.mark.parametrize("name", REFUSED)
def test_help_and_refusal_give_one_reason(name):
    refusal = REFUSED[name]
    for value in refusal.values:
        [problem] = engine_problems(CONFIG.replace(**{name: value}))
        assert f"is not supported: {refusal.why}; {refusal.remedy}" in problem
    assert f"refused: {refusal.why}" in all_fields()[name].metadata["help"]


def test_this_machine_without_a_gpu_has_no_compute_capability():
    assert find_capabilities(on_cuda=False).compute_capability is None


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
@pytest.mark.parametrize("teacher", [False, True])
def test_student_and_teacher_have_fp8_apart(recipe, teacher):
    config = CONFIG.replace(fp8_format="hybrid", fp8_recipe=recipe, teacher_fp8=teacher)
    student = transformer_config(config, SHAPE)
    assert (student.fp8, student.fp8_recipe) == ("hybrid", recipe)
    teachers = teacher_config(config, student)
    assert teachers.fp8 == ("hybrid" if teacher else None)
    assert teachers.hidden_size == student.hidden_size and student.fp8 == "hybrid"
    assert transformer_config(CONFIG, SHAPE).fp8 is None
