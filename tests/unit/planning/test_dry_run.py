"""A run built without memory: every position of every layout, the parameters of the real model, nothing left behind."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import Qwen2Config, Qwen2ForCausalLM

from laver_megatron.config.fields import Config
from laver_megatron.encoders import encoder_tensor_sizes, read_encoder
from laver_megatron.hf.shape import read_model_shape
from laver_megatron.planning import dry_run as module
from laver_megatron.planning.dry_run import dry_run, dry_run_report, spans
from laver_megatron.planning.memory import state_of_rank
from laver_megatron.planning.simulated_rank import simulated_rank

DECODER = {
    "model_type": "qwen2",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 1024,
}
ENCODER = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 8,
}
SHAPE_72B = {
    "max_position_embeddings": 32768,
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}


def write(directory: Path, content: dict) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(content))
    return directory


@pytest.fixture
def build(tmp_path):
    """The dry run of a small model: build(world_size, decoder's changes, **settings)."""

    def build(world_size, decoder=None, **settings):
        encoder = write(tmp_path / "encoder", ENCODER)
        shape = read_model_shape(write(tmp_path / "model", {**DECODER, **(decoder or {})}))
        defaults = {"data_path": ("none",), "seq_length": 64, "visual_seq_length": 32, "train_iters": 10}
        config = Config.of(**{**defaults, "run_dir": "none", "vision_head_hidden_size": 32, **settings})
        run = dry_run(config, shape, encoder, world_size)
        assert [rank.bytes for rank in run.ranks] == planned(config, shape, encoder, run)
        return run

    return build


def planned(config, shape, encoder, run):
    """The same by arithmetic."""
    of_encoder = read_encoder(encoder), encoder_tensor_sizes(encoder)
    dp = len({rank.dp_rank for rank in run.ranks})
    return [state_of_rank(config, shape, *of_encoder, dp, rank.stage, rank.dp_rank) for rank in run.ranks]


LAYOUTS = {
    "one": (1, {}),
    "tp2-sp-dp3": (6, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "tp4 above the key/value heads": (4, {"tensor_model_parallel_size": 4}),
    "pp4-dp2": (8, {"pipeline_model_parallel_size": 4}),
    "vpp": (4, {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}),
    "uneven": (4, {"pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 1}),
    "tp2-pp2-dp64": (256, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}
VARIANTS = {
    "tied": {},
    "untied": {"decoder": {"tie_word_embeddings": False}},
    "bf16": {"bf16": True},
    "no laver": {"laver": False},
    "everything trains": {"freeze": ()},
    "connector only": {"freeze": ("encoder", "decoder"), "laver": False},
    "frozen decoder": {"freeze": ("encoder", "decoder")},
}
# Their vision heads have a size of their own; they need one stage.
TARGETS = {
    "features": {"mim_target": "features"},
    "pixels": {"mim_target": "pixels"},
}


PAIRS = [(layout, "tied") for layout in LAYOUTS]
PAIRS += [("tp2-sp-dp3", target) for target in TARGETS]
PAIRS += [(layout, variant) for layout in ("vpp", "tp2-pp2-dp64") for variant in VARIANTS if variant != "tied"]


@pytest.mark.parametrize("layout, variant", PAIRS)
def test_every_value_once(build, layout, variant):
    world_size, settings = LAYOUTS[layout]
    changes = {**VARIANTS, **TARGETS}[variant]
    run = build(world_size, **settings, **changes)
    assert run.problems == ()
    assert len(run.ranks) == world_size
    decoder = {**DECODER, **changes.get("decoder", {})}
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**decoder))
    assert run.parameters["language model"] == sum(p.numel() for p in model.parameters())
    if variant in TARGETS:
        size = {"features": 32, "pixels": 3 * 8**2}[variant]
        assert run.parameters["vision head"] == (64 * 32 + 32) + (32 * 32 + 32) + 32 * size


def test_a_tensor_on_no_rank_is_found(build, monkeypatch):
    original = module._build

    def without_last_stage(config, shape, encoder_dir, rank, world_size, found):
        original(config, shape, encoder_dir, rank, world_size, found)
        found.tiles[:] = [tile for tile in found.tiles if "layers.3.mlp.linear_fc2" not in tile.key]

    monkeypatch.setattr(module, "_build", without_last_stage)
    problems = build(2, pipeline_model_parallel_size=2).problems
    assert "decoder.layers.3.mlp.linear_fc2.weight: no rank holds any of it" in problems
    assert len(problems) == 1 + 3 + 1, problems  # student, what its optimizer keeps, teacher


def test_nothing_is_left_behind(build):
    before = torch.cuda.current_device, torch.cuda.synchronize, dist.all_gather_object, torch.get_rng_state()
    build(4, tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    after = torch.cuda.current_device, torch.cuda.synchronize, dist.all_gather_object
    assert after == before[:3]
    assert torch.equal(torch.get_rng_state(), before[3])
    assert torch.zeros(2).device.type == "cpu"
    assert not dist.is_initialized()
    with (
        pytest.raises(ZeroDivisionError),
        simulated_rank(
            3,
            4,
            tensor_model_parallel_size=2,
            pipeline_model_parallel_size=2,
            virtual_pipeline_model_parallel_size=None,
        ),
    ):
        assert (dist.get_rank(), dist.get_world_size()) == (3, 4)
        assert torch.zeros(2, device="cuda").device.type == torch.zeros(2).device.type == "meta"
        raise ZeroDivisionError
    assert torch.cuda.current_device == before[0] and not dist.is_initialized()


def test_bytes_follow_the_settings(build):
    """bf16 halves the weights and adds master weights; without LaVer there is neither teacher nor accumulator."""
    one, bf16, off = (build(1, **settings).ranks[0].bytes for settings in ({}, {"bf16": True}, {"laver": False}))
    assert abs(2 * bf16.weights - one.weights) <= 2 * 128 and 2 * bf16.teacher == one.teacher
    assert bf16.gradients == one.gradients and 2 * bf16.optimizer == 3 * one.optimizer
    assert bf16.accumulators == one.teacher and one.accumulators == 0
    assert off.teacher == off.accumulators == 0 < off.weights < one.weights
    shared = [rank.bytes for rank in build(3, bf16=True).ranks]
    assert sum(held.optimizer for held in shared) == bf16.optimizer
    assert sum(held.accumulators for held in shared) == bf16.accumulators


def test_the_report(build):
    run = build(8, tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    text = dry_run_report(run)
    assert f"{run.parameters['language model']:,}  language model" in text
    rows = [line.split() for line in text.splitlines() if len(line.split()) == 12 and line.split()[0].isdecimal()]
    assert sum(int(row[3]) for row in rows) == 8
    assert len(rows) < 8 and {row[0] for row in rows} == {"0", "1"}


def test_spans():
    assert spans([3, 0, 1, 2, 2, 7]) == "0-3,7"


@pytest.mark.processes
def test_72b_on_128_ranks_in_a_minute_and_a_gigabyte(demo_dir, tmp_path):
    """The command as a user gives it, on a directory with neither weights nor shards. 60 s are promised for two free
    cores; here other tests may share them, so what counts is the processor's time."""
    model = tmp_path / "72b"
    shutil.copytree(demo_dir / "model", model, ignore=shutil.ignore_patterns("*.safetensors"))
    write(model, {**DECODER, **SHAPE_72B})
    encoder = tmp_path / "encoder"
    shutil.copytree(demo_dir / "encoder", encoder, ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "run.yaml").write_text("bf16: true\n")
    command = (
        f"--config {tmp_path}/run.yaml --load hf:{model} --encoder {encoder} --data-path nowhere "
        f"--run-dir {tmp_path}/run --train-iters 10 "
        "--tensor-model-parallel-size 8 --pipeline-model-parallel-size 8 --sequence-parallel --seq-length 4096 "
        "--visual-seq-length 2048 --global-batch-size 128 --dry-run 128"
    )
    program = (
        "import resource, sys; from laver_megatron import launcher\n"
        f"launcher.main({command.split()!r})\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        # Not ru_maxrss, which begins with what the process that started this one held.
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print('used', used.ru_utime + used.ru_stime, int(peak.split()[1]) * 1024)"
    )
    environ = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environ, timeout=300)
    assert done.returncode == 0, done.stderr
    # Qwen2.5-72B's config.json: the published checkpoint has as many.
    assert "72,706,203,648  language model" in done.stdout
    assert "a checkpoint takes " in done.stdout and " GB are free for " in done.stdout
    assert "dry run, nothing wrong: 80 layers of width 8192; 128 processes as TP 8 x PP 8 x DP 2" in done.stdout
    used = done.stdout.splitlines()[-1].split()
    assert float(used[1]) <= 60 and float(used[2]) <= 1e9, used
    assert not (tmp_path / "run").exists()
