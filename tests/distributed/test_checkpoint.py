"""Checkpoints: nothing is lost between saving and loading, at any layout, and a broken one is refused by name."""

import contextlib
import errno
import io
import json
import os
import re
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from laver_megatron import train
from laver_megatron.checkpoint import saver, writer
from laver_megatron.checkpoint import state as checkpoint
from laver_megatron.checkpoint.directory import latest_checkpoint
from laver_megatron.checkpoint.progress import Progress
from tests.distributed.build import (
    PACKS_PER_STEP,
    SyntheticReader,
    assert_same_bits,
    make_config,
    make_trainer,
    moment_shards,
    relative_distance,
    snapshot,
    student_shards,
    synthetic_data,
    teacher_shards,
    whole_tensors,
)
from tests.distributed.harness import Layout

WRITTEN_AT = 3  # the iteration of the checkpoint; runs go on to 6
ALL_FOUR = Layout(tp=2, pp=2, sp=True)


def run(layout, config):
    """Job: `train` from wherever the run directory stands; this rank's state before and after."""
    with synthetic_data():
        trainer = train.setup(config)
        before = snapshot(trainer)
        train.train(trainer)
    return before, snapshot(trainer)


def metrics(run_dir):
    """What was logged of each iteration, without what depends on the clock."""
    fields = (
        "loss", "lm_loss", "mim_loss", "gram_loss", "grad_norm", "teacher_entropy", "learning_rate", "ema_momentum",
        "num_masked_tokens", "consumed_packs", "consumed_samples", "skipped_iterations",
    )  # fmt: skip
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["iteration"]: {name: line[name] for name in fields} for line in lines}


SCHEDULED = {
    "ema_momentum_schedule": "cosine", "ema_interval": 2, "mask_ratio_schedule": "cosine", "mask_ratio": 0.9,
    "lr_warmup_iters": 3, "weight_decay": 0.1,
}  # fmt: skip
# Only the connector trains: later pipeline stages, also virtual ones, have nothing to optimize, and still have to save
# and load.
CONNECTOR_ONLY = {"laver": False, "freeze": ("encoder", "decoder")}


@pytest.mark.parametrize(
    "layout, settings",
    [
        (ALL_FOUR, SCHEDULED),
        (Layout(dp=2, pp=2, vpp_layers=1), SCHEDULED),
        (Layout(tp=2, dp=2), {"bf16": True}),
        pytest.param(Layout(pp=2), CONNECTOR_ONLY, marks=pytest.mark.slow(reason="it is so with virtual stages, too")),
        pytest.param(ALL_FOUR, CONNECTOR_ONLY, marks=pytest.mark.slow(reason="TP adds nothing to an idle stage")),
        (Layout(dp=2, pp=2, vpp_layers=1), CONNECTOR_ONLY),
    ],
    ids=[
        "TP2-PP2-SP",
        "PP2-VPP-DP2",
        "bf16-TP2-DP2",
        "connector-only-PP2",
        "connector-only-TP2-PP2-SP",
        "connector-only-PP2-VPP-DP2",
    ],  # fmt: skip
)
def test_six_steps_are_three_and_three(pool, assets, tmp_path, layout, settings):
    def config(name, **changes):
        return make_config(assets, tmp_path / name, layout, train_iters=2 * WRITTEN_AT, **settings, **changes)

    straight = pool.run(run, layout, config("straight"))
    first = pool.run(run, layout, config("parted", exit_interval=WRITTEN_AT))
    assert latest_checkpoint(tmp_path / "parted" / "checkpoints").name == f"iter_{WRITTEN_AT:07d}"
    second = pool.run(run, layout, config("parted"))

    for rank in range(layout.world_size):
        assert_same_bits(second[rank][0], first[rank][1])
        assert_same_bits(second[rank][1], straight[rank][1])
    assert metrics(tmp_path / "parted") == metrics(tmp_path / "straight")


# --- other layouts -------------------------------------------------------------------------------------


def run_and_listen(layout, config):
    """Job: `train`; what it says."""
    said = io.StringIO()
    with synthetic_data(), contextlib.redirect_stderr(said):
        train.train(train.setup(config))
    return said.getvalue()


def test_a_longer_run_says_what_its_schedules_become(pool, assets, tmp_path):
    def config(**changes):
        return make_config(assets, tmp_path, lr=1e-3, mask_ratio_schedule="constant", **changes)

    (first,) = pool.run(run_and_listen, Layout(), config(train_iters=4, exit_interval=2))
    (second,) = pool.run(run_and_listen, Layout(), config(train_iters=6, exit_interval=3))
    assert "the schedules end there" not in first
    # A half of one cosine, a third of the other.
    told = "iteration 3 has learning rate 0.00075 instead of 0.0005"
    assert f"was written with 4, and the schedules end there: {told}" in second
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()[2:]
    assert json.loads(line)["learning_rate"] == pytest.approx(0.00075, rel=1e-12)


def whole_state(trainer):
    """This rank's shards of all that does not depend on the layout."""
    return {
        "student": student_shards(trainer),
        "teacher": teacher_shards(trainer),
        "exp_avg": moment_shards(trainer, "exp_avg"),
        "exp_avg_sq": moment_shards(trainer, "exp_avg_sq"),
        "centre": None if trainer.centre is None else trainer.centre.value_K.clone(),
    }


def whole_centre(states, layout):
    """Of the last pipeline stage, whose tensor-parallel ranks hold parts of it."""
    return torch.cat([state["centre"] for state in states if state["centre"] is not None][: layout.tp])


def write_and_go_on(layout, config):
    """Job: three steps, a checkpoint, its contents, three more steps without saving."""
    trainer = make_trainer(config)
    for _ in range(WRITTEN_AT):
        train.train_step(trainer)
    train.save(trainer)
    state = whole_state(trainer)
    records = [train.train_step(trainer) for _ in range(WRITTEN_AT)]
    return state, records, whole_state(trainer)


def load_and_go_on(layout, config):
    """Job: what the checkpoint of the run directory holds, and three steps from there."""
    trainer = make_trainer(config)
    assert trainer.progress.iteration == WRITTEN_AT
    if (reader := trainer.training_data.reader) is not None:  # it need not plan what lies before
        assert reader.plan.went_on_from == reader.plan.mark(WRITTEN_AT * PACKS_PER_STEP)
    state = whole_state(trainer)
    records = [train.train_step(trainer) for _ in range(WRITTEN_AT)]
    return state, records, whole_state(trainer)


@pytest.fixture(scope="module")
def written(pool, assets, tmp_path_factory):
    """A run that wrote a checkpoint at TP2 (with two data-parallel ranks) and went on: (run_dir, results)."""
    layout, run_dir = Layout(tp=2, dp=2), tmp_path_factory.mktemp("written")
    return run_dir, pool.run(write_and_go_on, layout, make_config(assets, run_dir, layout))


@pytest.mark.parametrize("layout", [Layout(pp=2), Layout(), Layout(pp=2, vpp_layers=1, dp=2)], ids=str)
def test_a_checkpoint_loads_at_other_layouts(pool, assets, written, layout):
    run_dir, of_writer = written
    results = pool.run(load_and_go_on, layout, make_config(assets, run_dir, layout))

    for part in ("student", "teacher", "exp_avg", "exp_avg_sq"):
        saved = whole_tensors([state[part] for state, _, _ in of_writer])
        loaded = whole_tensors([state[part] for state, _, _ in results])
        assert saved.keys() == loaded.keys()
        assert [key for key in saved if not torch.equal(saved[key], loaded[key])] == [], part
    centre = whole_centre([state for state, _, _ in of_writer], Layout(tp=2, dp=2))
    assert centre.any() and torch.equal(centre, whole_centre([state for state, _, _ in results], layout))
    for (_, records, _), (_, wanted, _) in zip(results, of_writer, strict=False):
        for record, expected in zip(records, wanted, strict=True):
            for name in ("loss", "lm_loss", "mim_loss", "gram_loss", "teacher_entropy", "grad_norm"):
                assert record[name] == pytest.approx(expected[name], rel=1e-5), (name, record["iteration"])
            assert record["consumed_samples"] == expected["consumed_samples"]
    end, wanted_end = (whole_tensors([r[2]["student"] for r in rs], rtol=1e-5) for rs in (results, of_writer))
    for key, tensor in end.items():
        assert relative_distance(tensor, wanted_end[key]) <= 1e-5, key


# Another value for every number.
PROGRESS = {
    number.name: number.type(17 + 3 * place)
    for place, number in enumerate(fields(Progress))
    if number.type in (int, float)
}


def write_progress(layout, config):
    """Job: a checkpoint of a run that stands at PROGRESS."""
    trainer = make_trainer(config)
    for name, value in PROGRESS.items():
        setattr(trainer.progress, name, value)
    train.save(trainer)


def read_progress(layout, config):
    """Job: where a run stands that goes on from there, and the samples its limit of bad ones counts."""
    trainer = make_trainer(config)
    return asdict(trainer.progress), trainer.training_data.num_samples, trainer.training_data.num_bad_samples


def test_every_count_is_kept(pool, assets, tmp_path):
    """Also those that nothing is computed from in the few steps of the other tests."""
    config = make_config(assets, tmp_path, train_iters=100)
    pool.run(write_progress, Layout(), config)
    results = pool.run(read_progress, Layout(tp=2), make_config(assets, tmp_path, Layout(tp=2)))
    for progress, num_samples, num_bad_samples in results:
        assert {name: progress[name] for name in PROGRESS} == PROGRESS
        assert progress["data_fingerprint"] == "synthetic" and progress["data_mark"]
        assert num_bad_samples == PROGRESS["bad_samples"]
        assert num_samples == PROGRESS["consumed_samples"] + PROGRESS["bad_samples"]


def test_other_data_are_refused(pool, assets, tmp_path):
    """A position in one order of packs says nothing in another."""
    config = make_config(assets, tmp_path)
    pool.run(write_progress, Layout(), config)
    with pytest.raises(AssertionError, match=r"is at pack \d+ of other data"):
        pool.run(read_other_data, Layout(), config)


def read_other_data(layout, config):
    """Job: the same on data of another fingerprint."""
    with mock.patch.object(SyntheticReader, "fingerprint", "other"):
        make_trainer(config)


def finetune(layout, config):
    """Job: setup from another run's checkpoint, and a step; the teacher and the moments it starts with."""
    trainer = make_trainer(config)
    teacher = teacher_shards(trainer)
    moments = [tensor for name, tensor in snapshot(trainer).items() if "exp_avg" in name or name.endswith("step")]
    return teacher, moments, train.train_step(trainer)


def test_finetune_takes_the_weights_alone(pool, assets, written, tmp_path):
    run_dir, of_writer = written
    layout = Layout(pp=2)
    config = make_config(assets, tmp_path, layout, load=str(run_dir / "checkpoints"), finetune=True)
    results = pool.run(finetune, layout, config)
    teacher = whole_tensors([teachers for teachers, _, _ in results])
    saved = whole_tensors([state["student"] for state, _, _ in of_writer])
    assert all(torch.equal(tensor, saved[key]) for key, tensor in teacher.items()), "teacher(0) is student(0)"
    assert all(moments and not any(moment.any() for moment in moments) for _, moments, _ in results)
    assert results[0][2]["iteration"] == 1 and results[0][2]["consumed_packs"] == 8


def finetune_in_bf16(layout, config):
    """Job: the weights and the teacher that a run starts with, and the weights after a step of almost nothing."""
    trainer = make_trainer(config)
    student, teacher = student_shards(trainer), teacher_shards(trainer)
    train.train_step(trainer)
    return student, teacher, student_shards(trainer)


def test_finetune_in_bf16_begins_with_the_masters_of_its_weights(pool, assets, written, tmp_path):
    """The optimizer's fp32 masters were made before the weights were loaded; a step writes them over the weights."""
    run_dir, of_writer = written
    layout = Layout(dp=2)
    settings = {"load": str(run_dir / "checkpoints"), "finetune": True, "bf16": True, "lr": 1e-9}
    results = pool.run(finetune_in_bf16, layout, make_config(assets, tmp_path, layout, **settings))
    student, teacher, after = (whole_tensors(list(shards)) for shards in zip(*results, strict=True))
    saved = whole_tensors([state["student"] for state, _, _ in of_writer])
    for key, tensor in student.items():
        assert torch.equal(tensor, saved[key].bfloat16().float()), key
        # Adam's step of 1e-9 is far below what bf16 can tell of a weight, but for one at 0.
        torch.testing.assert_close(after[key], tensor, rtol=0, atol=1e-7, msg=key)
    assert all(torch.equal(tensor, student[key]) for key, tensor in teacher.items())


def test_laver_starts_from_a_checkpoint_without_it(pool, assets, tmp_path):
    """Stage 2 of the official recipe takes up stage 1, which trains without LaVer; stage 3 goes on without."""
    layout = Layout(tp=2)

    def config(number, **changes):
        return make_config(assets, tmp_path / str(number), layout, train_iters=1, **changes)

    def from_stage(number, **changes):
        return {"load": str(tmp_path / str(number) / "checkpoints"), **changes}

    pool.run(run, layout, config(1, laver=False))
    pool.run(run, layout, config(2, **from_stage(1, finetune=True)))
    assert metrics(tmp_path / "2")[1]["mim_loss"] > 0
    pool.run(run, layout, config(3, laver=False, **from_stage(2, finetune=True)))
    assert metrics(tmp_path / "3")[1]["mim_loss"] is None
    # Going on as if nothing had changed is an error in both directions.
    for number, laver, words in ((1, True, "lacks"), (2, False, "has no place for")):
        with pytest.raises(AssertionError, match=f"{words}.*--finetune takes the weights alone"):
            pool.run(run, layout, config("refused", laver=laver, **from_stage(number)))


# --- broken checkpoints --------------------------------------------------------------------------------


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


BREAKAGES = {
    "payload": ("*.distcp", flip_a_byte, "is damaged"),
    "metadata": (".metadata", flip_a_byte, "is damaged"),
    "length": ("*.distcp", cut, "bytes, the manifest says"),
    "payload-missing": ("*.distcp", Path.unlink, "is missing"),
    "config-missing": ("hf/config.json", Path.unlink, "is missing"),
    "manifest-missing": ("manifest.json", Path.unlink, "manifest.json"),
}


def load_broken(layout, config, directories):
    """Job: tries to go on from each directory and to start from its weights; the messages, after which nothing has
    changed."""
    trainer = make_trainer(config)
    before, messages = snapshot(trainer), {"going on": {}, "starting": {}}
    for name, directory in directories.items():
        with pytest.raises(ValueError) as going_on:
            checkpoint.load_checkpoint(Path(directory), trainer.state)
        with pytest.raises(ValueError) as starting:
            checkpoint.start_from_weights(Path(directory), trainer.state, take_teacher=True)
        messages["going on"][name], messages["starting"][name] = str(going_on.value), str(starting.value)
    assert_same_bits(snapshot(trainer), before)
    return messages


def test_broken_checkpoints_are_refused_by_name(pool, assets, written, tmp_path):
    whole = latest_checkpoint(written[0] / "checkpoints")
    directories, broken_files = {}, {}
    for name, (pattern, breaks, _) in BREAKAGES.items():
        directories[name] = tmp_path / name
        shutil.copytree(whole, directories[name])
        broken_files[name] = max(directories[name].glob(pattern), key=lambda path: path.stat().st_size)
        breaks(broken_files[name])
    layout = Layout(pp=2)
    for messages in pool.run(load_broken, layout, make_config(assets, tmp_path / "run", layout), directories):
        assert messages["going on"].keys() == BREAKAGES.keys()
        for name, message in (item for said in messages.values() for item in said.items()):
            assert BREAKAGES[name][2] in message, message
            assert str(broken_files[name]) in message or name == "manifest-missing", message
            assert str(directories[name]) in message


# --- interrupted saves ---------------------------------------------------------------------------------

# (module, function, which of its calls): where `save_checkpoint` is stopped, in order.
MOMENTS = (
    (saver, "plan_save", 1),
    (Path, "write_bytes", 1),  # of the model's small files
    (Path, "write_bytes", 3),
    (os, "replace", 1),  # the run's settings
    (os, "replace", 2),  # who wrote it
    (saver, "finish_save", 1),
    (os, "replace", 3),  # the manifest
    (os, "replace", 4),  # the whole directory
    (os, "replace", 5),  # `latest`
    (saver, "sync_directory", 3),  # after those of the checkpoint
)


class Killed(BaseException):
    """Stands for a kill: nothing in the program catches it."""


def interrupted_saves(layout, config):
    """Job: a checkpoint at iteration 1, then saves at iteration 2 that end at each moment. Returns which
    checkpoint a restart finds after each; each is loaded and trained on."""
    run_dir, found = Path(config.run.run_dir), []
    trainer = make_trainer(config)
    train.train_step(trainer)
    train.save(trainer)
    train.train_step(trainer)
    second = snapshot(trainer)
    for module, name, number in MOMENTS:
        original, calls = getattr(module, name), []

        def stop(*args, original=original, calls=calls, number=number, **kwargs):
            calls.append(args)
            if len(calls) == number:
                raise Killed
            return original(*args, **kwargs)

        with mock.patch.object(module, name, stop), pytest.raises(Killed):
            train.save(trainer)
        path = latest_checkpoint(run_dir / "checkpoints")
        found.append(path.name)
        checkpoint.load_checkpoint(path, trainer.state)
        if trainer.progress.iteration == 1:
            train.train_step(trainer)
        assert_same_bits(snapshot(trainer), second)
    train.save(trainer)
    return found, sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_an_interrupted_save_leaves_the_checkpoint_before(pool, assets, tmp_path):
    config = make_config(assets, tmp_path, ema_interval=1)
    [(found, left)] = pool.run(interrupted_saves, Layout(), config)
    assert found == ["iter_0000001"] * 8 + ["iter_0000002"] * 2
    assert left == ["iter_0000001", "iter_0000002", "latest"], "a later save clears away what the broken ones left"


def failing_save(layout, config):
    """Job: a save that fails on one rank, then one that does not."""
    trainer = make_trainer(config)
    sync = writer._HashedFile.sync

    def fail_on_one_rank(file):
        sync(file)
        if dist.get_rank() == 1:
            raise OSError(errno.ENOSPC, "No space left on device", str(file.path))

    with mock.patch.object(writer._HashedFile, "sync", fail_on_one_rank), pytest.raises(OSError) as raised:
        train.save(trainer)
    after_failure = sorted((Path(config.run.run_dir) / "checkpoints").iterdir())
    dist.barrier()
    train.save(trainer)
    return str(raised.value), after_failure, latest_checkpoint(Path(config.run.run_dir) / "checkpoints")


def test_a_save_that_fails_on_one_rank_fails_on_all(pool, assets, tmp_path):
    layout = Layout(tp=2)
    for message, after_failure, at_the_end in pool.run(failing_save, layout, make_config(assets, tmp_path, layout)):
        assert re.search(
            r"rank 1: OSError: \[Errno 28\] No space left on device; 0\.\d+ GB are to be written there and \d+\.\d+ GB "
            r"are free .*: '.*/\.iter_0000000\.incomplete/__1_0\.distcp'",
            message,
        )
        assert after_failure == [] and at_the_end is not None
