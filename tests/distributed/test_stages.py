"""The three stages in one go, by the demo's own configurations, each at another layout and on real pictures: what is
taken over is the same to the last bit, what is frozen stays so, and the rest begins anew.
"""

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from laver_megatron.checkpoint.directory import latest_checkpoint
from laver_megatron.checkpoint.progress import Progress
from laver_megatron.config.checks import check
from laver_megatron.config.command_line import Invocation
from laver_megatron.config.fields import ConfigError
from laver_megatron.config.modules import MODULES
from laver_megatron.convert.hf_to_megatron import hf_to_megatron
from laver_megatron.run_log.records import read_records
from laver_megatron.runtime.engine import stored_tensors
from laver_megatron.stages.chain import read_stages
from laver_megatron.stages.weight_changes import ModuleChange, changes_of_modules
from laver_megatron.train import setup, train, train_step
from tests.distributed.build import (
    make_config,
    make_trainer,
    snapshot,
    student_shards,
    synthetic_data,
    teacher_shards,
    whole_tensors,
)
from tests.distributed.harness import Layout

ROOT = Path(__file__).resolve().parents[2]
FILES = [str(path) for path in sorted((ROOT / "examples" / "demo_stages").glob("*.yaml"))]
# The layouts of the files; the rest of four processes are data-parallel replicas.
LAYOUTS = (Layout(pp=2, dp=2), Layout(tp=2, pp=2, sp=True), Layout(tp=2, dp=2, sp=True))
NUM_STEPS = 3
TEACHER_PARTS = ("decoder.", "vision_head.")


def state(trainer):
    """This rank's part of all that a stage starts or ends with."""
    return {
        "student": student_shards(trainer),
        "teacher": None if trainer.teacher is None else teacher_shards(trainer),
        "centre": None if trainer.centre is None else trainer.centre.value_K.clone(),
        "progress": vars(trainer.progress).copy(),
        "optimizer": {
            name: tensor
            for name, tensor in snapshot(trainer).items()
            if name.startswith("optimizer") and "master" not in name
        },
    }


def run_stage(layout, config):
    """Job: a whole stage; its state before and after."""
    trainer = setup(config)
    before = state(trainer)
    train(trainer)
    return before, state(trainer)


def start_stage(layout, config):
    """Job: what a stage would start with."""
    return state(setup(config))


def whole(states, part):
    return whole_tensors([one[part] for one in states])


class Stages:
    """The chain, run once for all tests of this file."""

    def __init__(self, pool, demo_dir, directory):
        flags = [
            *("--load", f"hf:{demo_dir}/model", "--encoder", f"{demo_dir}/encoder"),
            *("--data-path", f"{demo_dir}/shards/train-*.tar", "--train-iters", str(NUM_STEPS)),
            *("--lr-warmup-iters", "0", "--num-workers", "0", "--centre-momentum", "0.9"),
        ]
        self.stages = read_stages(FILES, flags, runs=str(directory))
        self.before, self.after = [], []
        for stage, layout in zip(self.stages, LAYOUTS, strict=True):
            sizes = stage.config.parallel.tensor_model_parallel_size, stage.config.parallel.pipeline_model_parallel_size
            assert sizes == (layout.tp, layout.pp)
            results = pool.run(run_stage, layout, stage.config)
            self.before.append([before for before, _ in results])
            self.after.append([after for _, after in results])

    def config(self, number, directory, **changes):
        return self.stages[number - 1].config.replace(run_dir=str(directory), **changes)


@pytest.fixture(scope="module")
def chain(pool, demo_dir, tmp_path_factory):
    return Stages(pool, demo_dir, tmp_path_factory.mktemp("stages"))


def is_of_laver(key):
    return key.startswith(MODULES["heads"])


def test_weights_are_taken_over_to_the_last_bit(chain):
    for number in (1, 2):
        ended, started = whole(chain.after[number - 1], "student"), whole(chain.before[number], "student")
        new = started.keys() ^ ended.keys()
        assert new and all(map(is_of_laver, new)), "made at the start of stage 2, dropped in stage 3"
        assert all(torch.equal(started[key], ended[key]) for key in started.keys() & ended.keys())
    assert any(map(is_of_laver, whole(chain.before[1], "student")))
    assert not any(map(is_of_laver, whole(chain.before[2], "student")))


def test_frozen_weights_stay_the_same_and_all_others_move(chain):
    for stage, before, after in zip(chain.stages, chain.before, chain.after, strict=True):
        frozen = tuple(prefix for module in stage.config.model.freeze for prefix in MODULES[module])
        start, end = whole(before, "student"), whole(after, "student")
        assert start.keys() == end.keys()
        for key in start:
            assert torch.equal(start[key], end[key]) == key.startswith(frozen), (stage.name, key)


def test_files_say_the_same_of_the_weights(chain):
    """The report at the end of a chain reads it from the checkpoints alone."""
    for stage, after in zip(chain.stages, chain.after, strict=True):
        changes = changes_of_modules(stage.config.start.load, stage.config.start.encoder, stage.checkpoint)
        num_tensors = {name: sum(key.startswith(MODULES[name]) for key in whole(after, "student")) for name in MODULES}
        expected = {}
        for module, number in num_tensors.items():
            is_new = (stage.name, module) in {("stage1_align", "connector"), ("stage2_laver", "heads")}
            moved = 0 if module in stage.config.model.freeze or is_new else number
            if number:
                expected[module] = ModuleChange(number, moved, number if is_new else 0)
        assert changes == expected, stage.name


def test_optimizer_place_and_teacher_begin_anew(chain):
    for number, (before, after) in enumerate(zip(chain.before, chain.after, strict=True)):
        for start, end in zip(before, after, strict=True):
            assert all(not tensor.any() for tensor in start["optimizer"].values())
            assert start["progress"] == asdict(Progress(data_fingerprint=end["progress"]["data_fingerprint"]))
            assert end["progress"]["iteration"] == NUM_STEPS and end["progress"]["consumed_packs"] == 8 * NUM_STEPS
            assert (start["teacher"] is not None) == (number == 1)
        assert any(tensor.any() for end in after for tensor in end["optimizer"].values())
    fingerprints = {after[0]["progress"]["data_fingerprint"] for after in chain.after}
    assert len(fingerprints) == 1, "the same data in the same order"


def assert_teacher_is_student(states):
    student, teacher = whole(states, "student"), whole(states, "teacher")
    assert teacher.keys() == {key for key in student if key.startswith(TEACHER_PARTS)}
    assert all(torch.equal(tensor, student[key]) for key, tensor in teacher.items())
    assert not any(one["centre"].any() for one in states if one["centre"] is not None)


def test_the_teacher_is_made_in_stage_2_and_dropped_in_stage_3(chain):
    assert_teacher_is_student(chain.before[1])
    start, end = whole(chain.before[1], "teacher"), whole(chain.after[1], "teacher")
    assert all(not torch.equal(end[key], tensor) for key, tensor in start.items())
    stored = [stored_tensors(stage.checkpoint) for stage in chain.stages]
    kept = [any(is_of_laver(key) or key.startswith("teacher.") for key in keys) for keys in stored]
    assert kept == [False, True, False]


def test_stage_3_may_follow_stage_1(pool, chain, tmp_path):
    config = chain.config(3, tmp_path, load=chain.stages[1].config.start.load)
    started = whole(pool.run(start_stage, LAYOUTS[2], config), "student")
    ended = whole(chain.after[0], "student")
    assert started.keys() == ended.keys()
    assert all(torch.equal(started[key], ended[key]) for key in started)


def test_stage_2_may_follow_stage_2(pool, chain, tmp_path):
    """The student's weights go on, [MASK] and vision head among them; teacher and centre begin anew."""
    config = chain.config(2, tmp_path, load=chain.stages[2].config.start.load)
    states = pool.run(start_stage, LAYOUTS[1], config)
    started, ended = whole(states, "student"), whole(chain.after[1], "student")
    assert started.keys() == ended.keys()
    assert all(torch.equal(started[key], ended[key]) for key in started)
    assert_teacher_is_student(states)
    old_teacher = whole(chain.after[1], "teacher")
    assert any(not torch.equal(tensor, old_teacher[key]) for key, tensor in whole(states, "teacher").items())
    assert all(one["progress"]["iteration"] == 0 for one in states)


def test_attention_and_positions_are_carried(chain, tmp_path):
    for setting, other in (("attention", "causal"), ("positions", "1d"), ("encoder_feature_layer", -1)):
        for number in (2, 3):
            config = chain.config(number, tmp_path, **{setting: other})
            with pytest.raises(ConfigError, match=f"^1 problem .*\n.*--allow-change {setting}$"):
                check(Invocation(config, dry_run_world_size=4))
            check(Invocation(config.replace(allow_change=(setting,)), dry_run_world_size=4))


# --- the command ---------------------------------------------------------------------------------------


@pytest.mark.slow(reason="the chain in the pool, once more as programs")
def test_command_in_processes_of_its_own(demo_dir, tmp_path):
    """Stopped, gone on with, called again, and the other arm."""
    flags = {
        "--load": f"hf:{demo_dir}/model", "--encoder": demo_dir / "encoder", "--runs": tmp_path,
        "--data-path": demo_dir / "shards" / "train-*.tar", "--train-iters": NUM_STEPS, "--lr-warmup-iters": 0,
        "--tensor-model-parallel-size": 1, "--pipeline-model-parallel-size": 1,
    }  # fmt: skip
    words = [str(word) for pair in flags.items() for word in pair]
    command = [sys.executable, ROOT / "tools" / "train_stages.py", *FILES[:2], *words, "--no-sequence-parallel"]
    environment = {**os.environ, "NPROC_PER_NODE": "1"}

    def call(*more):
        return subprocess.run([*command, *more], env=environment, capture_output=True, text=True, timeout=300)

    def names():
        return sorted(path.name for path in tmp_path.iterdir() if latest_checkpoint(path / "checkpoints"))

    stopped = call("--exit-interval", "2")
    assert stopped.returncode == 3, stopped.stderr
    assert "stage 1 of 2, stage1_align: stopped at iteration 2 of 3" in stopped.stderr and names() == ["stage1_align"]
    finished = call("--compare-weights")
    assert finished.returncode == 0, finished.stderr
    assert "stage1_align: resuming at iteration 2" in finished.stderr
    lines = [line for line in finished.stdout.splitlines() if "LM loss" in line]
    assert len(lines) == 2 and all("frozen and the same to the last bit: encoder" in line for line in lines)
    assert "decoder" in lines[0].split("changed:")[0] and "heads (new)" in lines[1]

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert call().returncode == 0 and {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    other = call("--baseline")
    assert other.returncode == 0 and "stage1_align: finished at iteration 3" in other.stderr, other.stderr
    assert names() == ["stage1_align", "stage2_laver", "stage2_laver-baseline"]
    with_laver, without = (
        [
            (record["consumed_samples"], record["num_tokens"])
            for record in read_records(tmp_path / name / "metrics.jsonl")
        ]
        for name in names()[1:]
    )
    assert with_laver == without and len(without) == NUM_STEPS


# --- stage 1 from converted weights --------------------------------------------------------------------


def run_aligned(layout, config):
    """Job: a step, saved; the student before and after."""
    with synthetic_data():
        trainer = setup(config)
        before = student_shards(trainer)
        train(trainer)
    return before, student_shards(trainer)


def test_stage_1_starts_from_converted_text_only_weights(pool, assets, tmp_path):
    """On a pipeline whose second stage has nothing to optimize; what it leaves is whole, and enough for stage 2."""
    layout = Layout(pp=2)
    hf_to_megatron(assets.untied, tmp_path / "converted")
    load = {"load": str(tmp_path / "converted")}
    config = make_config(
        assets, tmp_path / "1", layout, **load, laver=False, freeze=("encoder", "decoder"), train_iters=1
    )
    results = pool.run(run_aligned, layout, config)
    before, after = (whole_tensors([result[i] for result in results]) for i in (0, 1))
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {key for key in before if key.startswith("connector.")} != set()
    assert latest_checkpoint(tmp_path / "1" / "checkpoints") is not None

    checkpoint = {"load": str(tmp_path / "1" / "checkpoints"), "encoder": None, "finetune": True}
    [(record, *_), *_] = pool.run(take_steps, layout, make_config(assets, tmp_path / "2", layout, **checkpoint))
    assert record["iteration"] == 1 and record["mim_loss"] > 0


def take_steps(layout, config):
    """Job: a step of LaVer."""
    return [train_step(make_trainer(config))]
