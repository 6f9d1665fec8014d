"""What a run's checkpoints need of the disk, in bytes and words."""

import shutil
from math import prod
from types import SimpleNamespace

import pytest

from laver_megatron.config.fields import Config
from laver_megatron.hf.parts import ModelParts
from laver_megatron.hf.shape import read_model_shape
from laver_megatron.hf.weights import weight_table
from laver_megatron.planning.disk import checkpoint_bytes, room_free, room_needed
from tests.unit.planning.test_dry_run import DECODER, write


def config_of(**settings):
    needed = {"data_path": ("none",), "run_dir": "none", "seq_length": 64, "visual_seq_length": 32, "train_iters": 10}
    return Config.of(**{**needed, "laver": False, "freeze": (), **settings})


@pytest.mark.parametrize("bf16, each", [(False, 4 + 12), (True, 2 + 12)])
@pytest.mark.parametrize("layout", [{}, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}])
def test_a_checkpoint_holds_weights_and_optimizer_whatever_the_layout(tmp_path, bf16, each, layout):
    shape = read_model_shape(write(tmp_path / "model", DECODER))
    values = sum(prod(weight.size) for weight in weight_table(ModelParts(shape)).values())
    width = shape.hidden_size
    values += 2 * width + width * (width + 1)  # the planner counts a connector of one feature without an encoder, too
    size = checkpoint_bytes(config_of(bf16=bf16, **layout), shape, None, {})
    assert size == pytest.approx(each * values, rel=0.01)  # buckets are padded


def test_room_for_one_more_than_are_kept():
    assert room_needed(config_of(), 10**9) == "a checkpoint takes 1.000 GB of disk, and all are kept (--keep-last)"
    said = room_needed(config_of(keep_last=1), 10**9)
    assert "--keep-last 1 needs room for 2, 2.000 GB, as an old one is deleted only when the new one is whole" in said
    assert "3.000 GB, besides those of --keep-every" in room_needed(config_of(keep_last=2, keep_best=True), 10**9)


def test_what_is_free_where_the_run_directory_will_be(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or SimpleNamespace(free=5 * 10**8))
    run_dir = tmp_path / "runs" / "mine"
    assert room_free(run_dir) == f"0.500 GB are free for {run_dir} on this machine"
    assert asked == [tmp_path]
