"""The planner as a user meets it: what it finds, what it refuses, and that what it writes can run."""

import json
from math import prod

import pytest

from laver_megatron.planning.hardware import GIB
from laver_megatron.planning.memory import state_of_rank
from laver_megatron.planning.models import SIGLIP2, encoder_sizes
from laver_megatron.planning.plan import activations_by_recomputation, laver_costs, plan_layout
from laver_megatron.planning.plan_command import main
from laver_megatron.planning.search import layout_problems, search
from tests.unit.planning.plans import job_of

SEVEN = ("--model", "7b", "--gpus", "16", "--gpu", "a100-80gb", "--seq-length", "2048", "--global-batch-size", "128")


@pytest.fixture(scope="module")
def paper():
    """The paper's second stage: Qwen2.5-7B on 16 A100-80GB."""
    return job_of(*SEVEN)


@pytest.fixture(scope="module")
def found(paper):
    return search(paper)


def test_what_fits_fits_and_the_fastest_comes_first(paper, found):
    assert len(found.fitting) > 50 and found.impossible
    times = [plan.seconds for plan in found.fitting]
    assert times == sorted(times)
    for plan in found.fitting:
        assert plan.fullest.memory_bytes <= paper.gpu.usable_bytes < 80 * GIB
        assert not layout_problems(paper, plan.config)
    for plan in found.too_large:
        assert plan.fullest.memory_bytes > paper.gpu.usable_bytes
    # Every kind of layout was looked at.
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "micro_batch_size",
                 "num_layers_per_virtual_pipeline_stage", "recompute_granularity"):  # fmt: skip
        assert len({plan.config.flat()[name] for plan in found.fitting}) > 1, name
    assert all(
        plan.config.parallel.sequence_parallel == (plan.config.parallel.tensor_model_parallel_size > 1)
        for plan in found.fitting
    )


def test_figures_of_a_plan(paper, found):
    plan = found.fitting[0]
    tokens = plan.config.data.global_batch_size * plan.config.data.seq_length
    assert plan.tokens_per_second_per_gpu == pytest.approx(tokens / plan.seconds / 16)
    assert plan.gpu_hours == pytest.approx(plan.seconds * 6250 * 16 / 3600)
    assert plan.model_flops_utilisation == pytest.approx(plan.flops.total / plan.seconds / 16 / 312e12)
    assert 0.3 < plan.model_flops_utilisation < 0.65
    full = plan_layout(paper, plan.config.replace(recompute_granularity="full"))
    assert full.hardware_flops - full.flops.total == plan.flops.student_layers_forward
    assert full.flops == plan.flops and full.seconds > plan.seconds
    assert full.fullest.activations.total < plan.fullest.activations.total
    by_kind = activations_by_recomputation(plan)
    assert by_kind["full"] < by_kind["selective"] and by_kind["full"] < by_kind["none"]


def test_what_laver_costs_the_paper(found):
    """7B, a third of the tokens visual: time by the design's floor 1 + 4/3 v phi, memory by hand."""
    plan = found.fitting[0]
    costs = laver_costs(plan)
    share, phi = plan.job.workload.visual_share, 0.92
    assert costs.ratio == pytest.approx(1 + 4 / 3 * share * phi, rel=0.08)
    assert costs.seconds_without * costs.ratio == pytest.approx(plan.seconds)
    layers = 28 * (3584 * (3584 + 2 * 512) + 3584**2 + 3 * 3584 * 18944)
    tp_pp = plan.config.parallel.tensor_model_parallel_size * plan.config.parallel.pipeline_model_parallel_size
    # bf16 weights, and fp32 accumulators divided over the replicas; norms, biases and the head are 1%, division more.
    expected = layers / tp_pp * (2 + 4 / plan.data_parallel_size)
    assert costs.teacher_bytes == pytest.approx(expected, rel=0.15)
    assert costs.head_bytes > 0 and costs.stream_bytes > 0
    assert laver_costs(plan_layout(plan.job, plan.config.replace(laver=False))) is None


def test_more_visual_tokens_take_more(paper):
    few, many = (job_of(*SEVEN[:6], "--seq-length", "4096", "--visual-share", share) for share in ("0.2", "0.8"))
    config = few.base.replace(tensor_model_parallel_size=4, sequence_parallel=True)
    other = many.base.replace(tensor_model_parallel_size=4, sequence_parallel=True)
    one, two = plan_layout(few, config), plan_layout(many, other)
    assert two.seconds > one.seconds and two.fullest.memory_bytes > one.fullest.memory_bytes
    assert two.flops.parts["reconstruction"] > 3 * one.flops.parts["reconstruction"]


def test_72b_needs_more_than_one_machine():
    found = search(job_of("--model", "72b", "--gpus", "8", "--gpu", "h100-80gb"))
    assert not found.fitting and found.too_large
    on_many = search(job_of("--model", "72b", "--gpus", "128", "--gpu", "h100-80gb"))
    assert on_many.fitting


def test_pinned_values_are_kept(paper):
    pinned = {"tensor_model_parallel_size": 2, "recompute_granularity": None}
    found = search(paper, pinned)
    assert found.fitting
    assert all(plan.config.parallel.tensor_model_parallel_size == 2 for plan in found.fitting)
    assert all(plan.config.parallel.recompute_granularity is None for plan in found.fitting)


def test_nothing_fits_ends_with_1(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--model", "72b", "--gpus", "8", "--gpu", "a100-40gb"])
    assert caught.value.code == 1
    text = capsys.readouterr().out
    assert "no layout fits 34.8 GiB; the smallest takes" in text and "64 GPUs are enough: TP 4 x PP 16" in text
    assert "do not fit 34.8 GiB (of 40) at their smallest" in text


def test_more_gpus_are_tried_up_to_a_number_that_is_named(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--model", "110b", "--gpus", "1", "--gpu", "a100-40gb"])  # 128 would do
    assert caught.value.code == 1
    assert "nor does one fit on 64 GPUs, the most that were tried" in capsys.readouterr().out


def test_what_fits_instead_is_in_the_json(capsys):
    """Pinned values that are possible, but too large: 1, and the layout that changes one of them."""
    with pytest.raises(SystemExit) as caught:
        main(["--model", "7b", "--gpus", "8", "--gpu", "h100-80gb", "--tp", "1", "--pp", "1", "--json"])
    assert caught.value.code == 1
    content = json.loads(capsys.readouterr().out)
    assert not content["best"] and content["too_large"] and content["instead"]["fits"]
    layout = content["instead"]["layout"]
    assert content["instead"]["num_gpus"] == 8
    assert 1 in (layout["tensor_model_parallel_size"], layout["pipeline_model_parallel_size"])


def test_uneven_splits_are_explained_where_there_are_any(capsys):
    for gpus, is_uneven in (("24", True), ("16", False)):
        main(["--model", "7b", "--gpu", "h100-80gb", "--gpus", gpus, *(["--pp", "3"] if is_uneven else ["--pp", "2"])])
        assert ("chunk a/b: a layers on the first stage" in capsys.readouterr().out) == is_uneven


def test_the_report(capsys):
    main([*SEVEN, "--layouts", "3"])
    text = capsys.readouterr().out
    for part in ("16 x a100-80gb", "layouts that fit", "LaVer costs", "model FLOPs of an iteration", "are not possible",
                 "accumulators", "bubble", "GPU hours", "activations by what is recomputed: none"):  # fmt: skip
        assert part in text, part


def test_json(capsys):
    main([*SEVEN, "--json", "--layouts", "2", "--no-laver"])
    content = json.loads(capsys.readouterr().out)
    best = content["best"][0]
    assert len(content["best"]) == 2 and best["fits"] and best["laver_costs"] is None
    assert best["seconds"] == pytest.approx(max(sum(stage["seconds"].values()) for stage in best["stages"]))
    assert set(best["stages"][0]["state_bytes"]) == {"weights", "gradients", "optimizer", "teacher", "accumulators"}
    assert best["encoder_bytes"] == 2 * sum(prod(size) for size in encoder_sizes(SIGLIP2).values())
    assert content["instead"] is None
    assert best["model_flops"]["total"] == sum(v for name, v in best["model_flops"].items() if name != "total")


@pytest.mark.parametrize("pp, chunk", [(1, None), (4, 1), (2, 2)])
def test_memory_is_that_of_the_fullest_replica(paper, pp, chunk):
    """Replicas own unequal parts of the teacher's accumulators and, for the buckets' padding, of the optimizer."""
    config = paper.base.replace(pipeline_model_parallel_size=pp, num_layers_per_virtual_pipeline_stage=chunk)
    config = config.replace(recompute_granularity="full")
    plan, are_unequal = plan_layout(paper, config), []
    for stage in plan.stages:
        states = [
            state_of_rank(config, paper.shape, SIGLIP2, paper.encoder_sizes, 16 // pp, stage.stage, rank)
            for rank in range(16 // pp)
        ]
        assert stage.state == max(states, key=lambda state: state.total)
        # Together they own every value once.
        assert sum(state.accumulators for state in states) == 2 * states[0].teacher
        are_unequal.append(len({state.total for state in states}) > 1)
    assert any(are_unequal)
