"""Saving while training goes on: the same checkpoints, one at a time, whole or not there; and disks that are full."""

import contextlib
import errno
import io
import subprocess
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from laver_megatron import train
from laver_megatron.checkpoint import saver, writer
from laver_megatron.checkpoint.choice import quick_problem
from laver_megatron.convert.torch_dist import TorchDistReader
from laver_megatron.encoders import encoder_tensor_sizes, read_encoder
from laver_megatron.hf.shape import read_model_shape
from laver_megatron.planning.disk import checkpoint_bytes
from tests.distributed.build import make_config, make_trainer, synthetic_data
from tests.distributed.harness import Layout
from tests.distributed.test_checkpoint import run

LAYOUT = Layout(tp=2, dp=2)


def config_of(assets, run_dir, layout=LAYOUT, **changes):
    return make_config(assets, run_dir, layout, **{"train_iters": 3, "save_interval": 1, **changes})


def checkpoints(run_dir):
    return sorted(path.name for path in (Path(run_dir) / "checkpoints").iterdir())


def test_checkpoints_written_both_ways_are_equal(pool, assets, tmp_path):
    for name, background in (("background", True), ("at once", False)):
        pool.run(run, LAYOUT, config_of(assets, tmp_path / name, async_save=background))
    expected = [f"iter_000000{iteration}" for iteration in (1, 2, 3)] + ["latest"]
    assert checkpoints(tmp_path / "background") == checkpoints(tmp_path / "at once") == expected
    for name in expected[:3]:
        ours, theirs = (TorchDistReader(tmp_path / way / "checkpoints" / name) for way in ("background", "at once"))
        assert ours.sizes == theirs.sizes and ours.dtypes == theirs.dtypes and len(ours.sizes) > 100
        for key, size in ours.sizes.items():
            if size:
                rows = (key, 0, size[0])
                assert torch.equal(ours.read_rows(*rows), theirs.read_rows(*rows)), (name, key)


def train_beside_a_slow_disk(layout, config):
    """Job: the checkpoint of iteration 2 is not on the disk before the fourth step has begun. Returns the folder after
    each step."""
    seen, begun, train_step, sync = [], threading.Event(), train.train_step, writer._HashedFile.sync

    def step(trainer):
        if trainer.progress.iteration == 3:
            begun.set()
        record = train_step(trainer)
        dist.barrier()
        folder = Path(config.run.run_dir) / "checkpoints"
        seen.append(checkpoints(config.run.run_dir) if folder.is_dir() else [])
        dist.barrier()
        return record

    def slow_sync(file):
        assert begun.wait(60), "the step did not go on"
        sync(file)

    with (
        synthetic_data(),
        mock.patch.object(train, "train_step", step),
        mock.patch.object(writer._HashedFile, "sync", slow_sync),
    ):
        train.train(train.setup(config))
    return seen


def test_training_goes_on_while_a_checkpoint_is_written(pool, assets, tmp_path):
    config = config_of(assets, tmp_path, save_interval=2, train_iters=5)
    for seen in pool.run(train_beside_a_slow_disk, LAYOUT, config):
        assert seen[:4] == [[], [], [".iter_0000002.incomplete"], [".iter_0000002.incomplete"]]
    assert checkpoints(tmp_path) == ["iter_0000002", "iter_0000004", "iter_0000005", "latest"]


FULL = OSError(errno.ENOSPC, "No space left on device", "/disk/file")


def train_with_a_full_disk(layout, config, ranks, times):
    """Job: `train` where the disk of some ranks is full at first; what it says at the end, and what is on the disk."""
    sync, left = writer._HashedFile.sync, [times]

    def full(file):
        if dist.get_rank() in ranks and left[0]:
            left[0] -= 1
            raise FULL
        sync(file)

    error, said = None, io.StringIO()
    full_disk = mock.patch.object(writer._HashedFile, "sync", full)
    with synthetic_data(), full_disk, contextlib.redirect_stderr(said):
        try:
            train.train(train.setup(config))
        except OSError as raised:
            error = str(raised)
    dist.barrier()
    return error, checkpoints(config.run.run_dir), said.getvalue()


@pytest.mark.parametrize("background", [True, False])
def test_a_failed_save_stops_the_run_or_does_not(pool, assets, tmp_path, background):
    def config(policy):
        return config_of(assets, tmp_path / policy, save_failure=policy, async_save=background)

    for error, left, _ in pool.run(train_with_a_full_disk, LAYOUT, config("stop"), (1,), 1):
        assert "rank 1: OSError: [Errno 28] No space left on device; " in error and "GB are free" in error
        assert left == [], "what was written is removed at once"
    results = pool.run(train_with_a_full_disk, LAYOUT, config("continue"), (1,), 1)
    for error, left, _ in results:
        assert error is None and left == ["iter_0000002", "iter_0000003", "latest"]
    assert "WARNING: NO CHECKPOINT was written: could not write the checkpoint" in results[0][2]


def test_the_last_save_has_to_succeed(pool, assets, tmp_path):
    config = config_of(assets, tmp_path, save_failure="continue", save_interval=None)
    for error, left, _ in pool.run(train_with_a_full_disk, LAYOUT, config, (0, 1), 9):
        assert "No space left" in error and left == []


@contextlib.contextmanager
def small_disk(path, size):
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting needs rights that this user lacks")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.processes
@pytest.mark.parametrize("is_known", [True, False], ids=["before", "while writing"])
def test_a_disk_that_is_full(pool, assets, tmp_path, is_known):
    """A real one: what is left is the checkpoint before, and the message says what is needed."""
    layout = Layout(tp=2)
    whole = tmp_path / "whole"
    pool.run(run, layout, config_of(assets, whole, layout, train_iters=1))
    size = sum(path.stat().st_size for path in (whole / "checkpoints/iter_0000001").rglob("*") if path.is_file())
    of_encoder = read_encoder(assets.encoder), encoder_tensor_sizes(assets.encoder)
    shape = read_model_shape(whole / "checkpoints/iter_0000001/hf")
    planned = checkpoint_bytes(config_of(assets, whole, layout), shape, *of_encoder)
    tensors = sum(path.stat().st_size for path in (whole / "checkpoints/iter_0000001").glob("*.distcp"))
    assert tensors == pytest.approx(planned, rel=0.5), "a small model's files are in part names and places"
    with small_disk(tmp_path / "disk", int(1.5 * size)):
        config = config_of(assets, tmp_path / "disk", layout)
        for error, left in pool.run(train_until_full, layout, config, is_known):
            assert "No space left on device; 0.00" in error and "GB are to be written there" in error
            assert "iter_0000002" in error and left == ["iter_0000001", "latest"]


def train_until_full(layout, config, is_known):
    """Job: `train`; how it ends. is_known: whether the space is looked at beforehand."""
    blind = contextlib.nullcontext() if is_known else mock.patch.object(saver, "_check_space")
    with synthetic_data(), blind, pytest.raises(OSError) as raised:
        train.train(train.setup(config))
    dist.barrier()
    return str(raised.value), checkpoints(config.run.run_dir)


def test_old_checkpoints_are_deleted(pool, assets, tmp_path):
    config = config_of(assets, tmp_path, train_iters=6, keep_last=2, keep_every=3)
    pool.run(run, LAYOUT, config)
    assert checkpoints(tmp_path) == ["iter_0000003", "iter_0000005", "iter_0000006", "latest"]


def test_a_resumed_run_needs_nothing_of_the_checkpoint_that_it_deletes(pool, assets, tmp_path):
    """Its tokenizer and config.json were those of the checkpoint that it went on from."""
    for train_iters in (2, 4):
        pool.run(run, LAYOUT, config_of(assets, tmp_path, train_iters=train_iters, keep_last=1))
    assert checkpoints(tmp_path) == ["iter_0000004", "latest"]
    assert not quick_problem(tmp_path / "checkpoints" / "iter_0000004")
    for part in ("hf", "encoder"):
        assert (tmp_path / "checkpoints" / "iter_0000004" / part / "config.json").is_file()
    pool.run(run, LAYOUT, config_of(assets, tmp_path, train_iters=5, keep_last=1))
    assert checkpoints(tmp_path) == ["iter_0000005", "latest"]


def test_the_best_of_the_validated_stays(pool, assets, tmp_path):
    """Of the validations before every save the first has the lowest loss."""
    config = config_of(
        assets, tmp_path, Layout(), train_iters=4, keep_last=1, keep_best=True,
        eval_interval=1, eval_iters=1, valid_data_path=("packs",),
    )  # fmt: skip
    pool.run(train_with_losses, Layout(), config, [1.0, 2.0, 3.0, 4.0])
    assert checkpoints(tmp_path) == ["iter_0000001", "iter_0000004", "latest"]


def train_with_losses(layout, config, losses):
    """Job: `train` whose validations give these losses."""
    results = [{"loss": loss, "lm_loss": loss} for loss in losses]
    with synthetic_data(), mock.patch.object(train, "evaluate", side_effect=results):
        train.train(train.setup(config))


def synced(layout, config):
    """Job: everything that is flushed to the disk before a checkpoint gets its name."""
    seen, fsync, replace = [], saver.os.fsync, saver.os.replace

    def note(handle):
        seen.append(Path(f"/proc/self/fd/{handle}").readlink())
        fsync(handle)

    def stop(source, target):
        if Path(target).name == "iter_0000000":
            seen.append("named")
        replace(source, target)

    trainer = make_trainer(config)
    with mock.patch("os.fsync", note), mock.patch("os.replace", stop):
        train.save(trainer)
    return [str(path) for path in seen[: seen.index("named")]]


def test_everything_is_on_the_disk_before_it_gets_its_name(pool, assets, tmp_path):
    [seen] = pool.run(synced, Layout(), config_of(assets, tmp_path, Layout()))
    path = tmp_path / "checkpoints/iter_0000000"
    before = path.with_name(".iter_0000000.incomplete")
    found = {Path(name).relative_to(before) for name in seen if Path(name).is_relative_to(before)}
    expected = {file.relative_to(path) for file in path.rglob("*")} | {Path()}
    assert expected - {Path("manifest.json")} <= found
    assert any(name.name.startswith(".manifest.json") for name in found), "under another name, and renamed"
