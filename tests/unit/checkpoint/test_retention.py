"""Which checkpoints are deleted when a new one is whole."""

import os
import shutil
from unittest import mock

import pytest

from laver_megatron.checkpoint import retention
from laver_megatron.checkpoint.retention import delete_superfluous, superfluous
from laver_megatron.config.reliability_fields import ReliabilityConfig
from tests.attacks import cut, write_checkpoint


@pytest.mark.parametrize(
    "settings, best, gone",
    [
        ({}, None, []),
        ({"keep_every": 20, "keep_best": True}, 10, []),
        ({"keep_last": 2}, None, [10, 20, 30]),
        ({"keep_last": 1}, 10, [20, 30, 40]),
        ({"keep_last": 1, "keep_every": 20}, None, [10, 30]),
        ({"keep_last": 9}, None, []),
    ],
)
def test_what_is_superfluous(settings, best, gone):
    assert superfluous([50, 10, 20, 30, 40], ReliabilityConfig(**settings), best) == gone


def left(directory):
    return sorted(path.name for path in directory.iterdir())


def test_nothing_goes_for_a_checkpoint_that_cannot_be_loaded(tmp_path):
    paths = [write_checkpoint(tmp_path, iteration) for iteration in (10, 20)]
    (paths[1] / "hf" / "config.json").unlink()
    with mock.patch.object(retention, "say") as said:
        delete_superfluous(tmp_path, paths[1], ReliabilityConfig(keep_last=1), {})
    assert left(tmp_path) == ["iter_0000010", "iter_0000020"]
    assert "no old checkpoint is deleted" in said.call_args.args[0]


def test_only_whole_checkpoints_of_this_run_are_deleted(tmp_path):
    runs = tmp_path / "checkpoints"
    paths = {iteration: write_checkpoint(runs, iteration) for iteration in (10, 20, 30, 40, 60)}
    cut(paths[20] / "__0_0.distcp")
    elsewhere = write_checkpoint(tmp_path / "elsewhere", 5)
    (runs / "iter_0000005").symlink_to(elsewhere)
    write_checkpoint(runs, 15).rename(runs / "iter_15")  # not a name of ours
    (runs / "notes").mkdir()
    delete_superfluous(runs, paths[40], ReliabilityConfig(keep_last=1), {})
    assert left(runs) == ["iter_0000005", "iter_0000020", "iter_0000040", "iter_0000060", "iter_15", "notes"]
    assert elsewhere.is_dir()


def test_the_best_validated_stays(tmp_path):
    for iteration in (10, 20, 30, 40):
        newest = write_checkpoint(tmp_path, iteration)
    settings = ReliabilityConfig(keep_last=1, keep_best=True)
    delete_superfluous(tmp_path, newest, settings, {10: 2.0, 20: 1.0, 25: 0.5, 30: 3.0})
    assert left(tmp_path) == ["iter_0000020", "iter_0000040"], "there is no checkpoint of iteration 25"


def test_a_kill_while_deleting_leaves_no_half(tmp_path):
    for iteration in (10, 20):
        newest = write_checkpoint(tmp_path, iteration)
    with (
        mock.patch.object(shutil, "rmtree", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        delete_superfluous(tmp_path, newest, ReliabilityConfig(keep_last=1), {})
    assert left(tmp_path) == [".iter_0000010.deleted", "iter_0000020"], "the next save clears it away"


def test_what_cannot_be_deleted_is_said(tmp_path):
    for iteration in (10, 20):
        newest = write_checkpoint(tmp_path, iteration)
    with (
        mock.patch.object(os, "replace", side_effect=PermissionError("no")),
        mock.patch.object(retention, "say") as say,
    ):
        delete_superfluous(tmp_path, newest, ReliabilityConfig(keep_last=1), {})
    assert "iter_0000010 could not be deleted (no)" in say.call_args[0][0]
