"""A run's summary: whole-model numbers at any division, the same after an interruption, LaVer's overhead apart."""

import contextlib
import io
import json
import re
from unittest import mock

import pytest
from transformers import AutoModel, AutoModelForCausalLM

from laver_megatron import train
from laver_megatron.hf.shape import read_model_shape
from laver_megatron.planning.dry_run import dry_run
from laver_megatron.run_log.run_summary import FILE_NAME
from tests.distributed.build import ONE_PROCESS, make_config, synthetic_data
from tests.distributed.harness import Layout

ALL_FOUR = Layout(tp=2, pp=2, sp=True)
SETTINGS = {
    "train_iters": 3, "eval_interval": 2, "eval_iters": 1, "valid_data_path": ("other-answers",),
    "freeze": ("encoder",),
}  # fmt: skip


def run(layout, config):
    """Job: `train` from wherever the run directory stands."""
    with synthetic_data():
        train.train(train.setup(config))


@pytest.fixture(scope="module")
def summaries(pool, assets, tmp_path_factory):
    """What is left by a run in one process, the same in four with a stop after two iterations, one without LaVer, and
    one with untied embeddings."""
    directory = tmp_path_factory.mktemp("summaries")

    def summary(name, layout=ONE_PROCESS, stops=(None,), **settings):
        found = []
        for stop in stops:
            config = make_config(assets, directory / name, layout, exit_interval=stop, **{**SETTINGS, **settings})
            pool.run(run, layout, config)
            found.append(json.loads((directory / name / FILE_NAME).read_text()))
        return found

    (whole,) = summary("whole")
    stopped, resumed = summary("parted", ALL_FOUR, stops=(2, None))
    (plain,) = summary("plain", laver=False)
    (untied,) = summary("untied", Layout(pp=2), load=f"hf:{assets.untied}", train_iters=1)
    return {"whole": whole, "stopped": stopped, "resumed": resumed, "plain": plain, "untied": untied}


def records(summary, name):
    path = f"{summary['config']['run_dir']}/{name}.jsonl"
    with open(path) as file:
        return [json.loads(line) for line in file]


def test_an_interrupted_run_has_a_summary_and_a_resumed_one_is_whole(summaries):
    whole, stopped, resumed = (summaries[name] for name in ("whole", "stopped", "resumed"))
    assert (stopped["state"], stopped["iteration"], stopped["train_iters"]) == ("unfinished", 2, 3)
    assert (resumed["state"], resumed["counted_iterations"]) == ("finished", 3)
    exact = (
        "iteration", "counted_iterations", "skipped_iterations", "seed", "config_hash", "parameters",
        "teacher_parameters", "tokens", "samples", "flops",
    )  # fmt: skip
    assert {name: whole[name] for name in exact} == {name: resumed[name] for name in exact}
    assert stopped["config_hash"] == whole["config_hash"]  # neither the layout nor where to stop is in it
    for name in ("validation", "training"):
        assert resumed[name].keys() == whole[name].keys()
    for which in ("last", "best"):  # 1e-5: the promise of layout invariance
        assert resumed["validation"][which] == pytest.approx(whole["validation"][which], rel=1e-5)


def test_sums_are_those_of_the_steps(summaries):
    for name in ("whole", "resumed", "plain"):
        summary = summaries[name]
        steps = records(summary, "metrics")
        assert len(steps) == 3
        assert summary["tokens"]["total"] == sum(step["num_tokens"] for step in steps)
        visual = sum(step["num_tokens"] * step["visual_token_share"] for step in steps)
        assert summary["tokens"]["visual"] == pytest.approx(visual) and visual > 0
        assert summary["tokens"]["text"] == summary["tokens"]["total"] - summary["tokens"]["visual"]
        assert 0 < summary["tokens"]["label"] < summary["tokens"]["text"]
        assert summary["samples"] == steps[-1]["consumed_samples"]
        devices, seconds = summary["hardware"]["num_devices"], [step["elapsed_seconds"] for step in steps]
        flops = sum(1e12 * step["tflops_per_gpu"] * time * devices for step, time in zip(steps, seconds, strict=True))
        assert summary["flops"]["model"] == pytest.approx(flops)
        assert summary["time"]["training_seconds"] == pytest.approx(sum(seconds))
        assert summary["time"]["device_hours"] == pytest.approx(sum(seconds) * devices / 3600)


def test_the_overhead_is_what_plain_training_does_without(summaries):
    whole, plain = summaries["whole"], summaries["plain"]
    assert whole["tokens"] == plain["tokens"]
    assert whole["flops"]["language_model"] == plain["flops"]["model"] == plain["flops"]["language_model"]
    assert whole["flops"]["laver_overhead"] > 0 == plain["flops"]["laver_overhead"]
    assert plain["config_hash"] != whole["config_hash"]


def test_parameters_are_those_of_the_hugging_face_models(summaries, assets):
    for name, path in (("whole", assets.tied), ("untied", assets.untied)):
        summary = summaries[name]
        parts = summary["parameters"]
        language = AutoModelForCausalLM.from_pretrained(path)
        embedding = language.model.embed_tokens.weight.numel()
        assert parts["embedding"] == embedding
        assert parts["lm_head"] == (0 if name == "whole" else embedding)
        assert parts["decoder"] == language.model.num_parameters() - embedding
        assert parts["encoder"] == AutoModel.from_pretrained(assets.encoder).num_parameters()
        assert parts["connector"] == (32 * 64 + 64) + (64 * 64 + 64)
        assert parts["vision_head"] == (64 * 32 + 32) + (32 * 32 + 32) + 32 * 64 and parts["mask_token"] == 64
        assert summary["teacher_parameters"] == parts["decoder"] + parts["vision_head"]
    plain = summaries["plain"]
    assert plain["parameters"]["vision_head"] == plain["parameters"]["mask_token"] == plain["teacher_parameters"] == 0


@pytest.mark.parametrize("target, size", [("features", 32), ("pixels", 3 * 8**2)])
def test_a_target_of_another_size_counts_its_head(pool, assets, tmp_path, target, size):
    """Parameters and FLOPs are those of a dry run, and of a latent target with as large a head."""
    found = []
    for name, settings in ((target, {"mim_target": target}), ("latent", {"vision_head_output_size": size})):
        config = make_config(assets, tmp_path / name, train_iters=1, centre_momentum=None, **settings)
        pool.run(run, ONE_PROCESS, config)
        found.append(json.loads((tmp_path / name / FILE_NAME).read_text()))
    assert found[0]["parameters"] == found[1]["parameters"] and found[0]["flops"] == found[1]["flops"]
    assert found[0]["flops"]["laver_overhead"] > 0
    config = make_config(assets, tmp_path / "dry", centre_momentum=None, mim_target=target)
    counted = dry_run(config, read_model_shape(assets.tied), assets.encoder, 1).parameters
    names = {"vision_head": "vision head", "connector": "connector", "mask_token": "[MASK]", "encoder": "encoder"}
    assert {name: found[0]["parameters"][name] for name in names} == {it: counted[names[it]] for it in names}
    assert found[0]["parameters"]["vision_head"] == (64 * 32 + 32) + (32 * 32 + 32) + 32 * size
    assert found[0]["teacher_parameters"] == counted["teacher"]


def test_validation_is_the_last_and_the_best(summaries):
    for name in ("whole", "plain"):
        validation, written = summaries[name]["validation"], records(summaries[name], "validation")
        assert [record["iteration"] for record in written] == [2, 3]
        best = min(written, key=lambda record: record["lm_loss"])
        for which, record in (("last", written[-1]), ("best", best)):
            assert validation[which].items() <= record.items()
    monitors = {"student_visual_similarity", "teacher_visual_similarity", "teacher_entropy"}
    assert monitors <= summaries["whole"]["validation"]["last"].keys()
    assert not monitors & summaries["plain"]["validation"]["last"].keys()
    steps = records(summaries["whole"], "metrics")
    assert summaries["whole"]["training"]["num_iterations"] == 3
    assert summaries["whole"]["training"]["lm_loss"] == pytest.approx(sum(step["lm_loss"] for step in steps) / 3)


class Clock:
    """In place of the module `time`: a second passes with every look at it."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        self.now += 1
        return self.now


def run_with_slow_saves(layout, config):
    """Job: `train` where a save takes a thousand seconds and an evaluation a hundred; what it prints."""
    clock = Clock()

    def slowly(seconds, function):
        def slow(*arguments, **settings):
            clock.now += seconds
            return function(*arguments, **settings)

        return slow

    output = io.StringIO()
    with (
        synthetic_data(),
        mock.patch.object(train, "time", clock),
        mock.patch.object(train, "save", slowly(1000, train.save)),
        mock.patch.object(train, "evaluate", slowly(100, train.evaluate)),
        contextlib.redirect_stdout(output),
    ):
        train.train(train.setup(config))
    return output.getvalue()


def test_time_per_iteration_is_that_of_the_steps_alone(pool, assets, tmp_path):
    config = make_config(assets, tmp_path, save_interval=1, **{**SETTINGS, "eval_interval": 1})
    (printed,) = pool.run(run_with_slow_saves, ONE_PROCESS, config)
    summary = json.loads((tmp_path / FILE_NAME).read_text())
    steps = [record["elapsed_seconds"] for record in records(summary, "metrics")]
    assert len(steps) == 3 and len(set(steps)) == 1 and steps[0] < 10  # looks at the clock
    assert re.findall(r"elapsed time per iteration \(ms\): ([\d.]+)", printed) == [f"{1000 * steps[0]:.1f}"] * 3
    assert summary["time"]["training_seconds"] == sum(steps)
