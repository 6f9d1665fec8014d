"""Bad input: each problem has its message with the numbers, all are found at once, and nothing is written."""

import dataclasses
import functools
import json
import os
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors import torch as safetensors_torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from laver_megatron.checkpoint.directory import MANIFEST_FILE, RUN_FILE, latest_checkpoint
from laver_megatron.config.checks import check, check_run, validate
from laver_megatron.config.command_line import Invocation, read_command_line
from laver_megatron.config.directories import CheckedEncoder
from laver_megatron.config.fields import Config, ConfigError
from laver_megatron.encoders import EncoderShape, read_encoder
from laver_megatron.hf.shape import ModelShape, read_model_shape
from laver_megatron.planning.dry_run_command import show_dry_run
from laver_megatron.start import Resume, find_start
from tests.attacks import renew_manifest

# Qwen2.5-0.5B: heads and key/value heads that few sizes divide.
SHAPE = ModelShape(
    num_layers=24,
    hidden_size=896,
    ffn_hidden_size=4864,
    num_attention_heads=14,
    num_query_groups=2,
    kv_channels=64,
    vocab_size=151936,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    tie_word_embeddings=True,
    max_position_embeddings=32768,
)
ENCODER = CheckedEncoder(
    EncoderShape(
        model_type="siglip_vision_model",
        feature_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_layers=3,
        image_size=(128, 128),
        patch_size=16,
        default_feature_layer=-2,
    ),
    most_image_tokens=64,
)
CONFIG = Config.of(data_path=("shards",), seq_length=256, visual_seq_length=128, train_iters=10, run_dir="runs/test")
MODEL_JSON = {
    "model_type": "qwen2",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
ENCODER_JSON = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 128,
    "patch_size": 16,
}
NATIVE_PREPROCESSOR_JSON = {"image_processor_type": "CLIPImageProcessor", "do_center_crop": False}
PREPROCESSOR_JSON = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 128, "width": 128}}
TOKENIZER_JSON = {
    "added_tokens": [
        {"id": 509 + index, "content": token}
        for index, token in enumerate(("<|vision_start|>", "<|image_pad|>", "<|vision_end|>"))
    ]
}


def problems_with(world_size: int = 1, shape: ModelShape = SHAPE, **changes):
    return validate(CONFIG.replace(**changes), shape, world_size, encoder=ENCODER)


def native_problems(most_image_tokens: int = 2048, **changes) -> list[str]:
    """With an encoder of native resolution and no weights."""
    shape = dataclasses.replace(
        ENCODER.shape, image_size=None, num_layers=0, default_feature_layer=None, model_type="laver_patches"
    )
    encoder = CheckedEncoder(shape, most_image_tokens)
    return validate(CONFIG.replace(**changes), SHAPE, 1, encoder=encoder)


def test_encoders_of_native_resolution():
    """Only what the run itself asks for must fit into a pack: larger pictures than that are left out and counted."""
    assert native_problems() == []
    assert native_problems(128, max_image_tokens=128) == []
    (problem,) = native_problems(129, max_image_tokens=129)
    assert problem.startswith("visual_seq_length 128 cannot hold one image of 129 tokens; lower max_image_tokens")
    (problem,) = native_problems(254, max_image_tokens=254, visual_seq_length=0)
    assert "use 257 at the very least; lower max_image_tokens" in problem
    assert "max_image_tokens is 0, but must be at least 1" in native_problems(max_image_tokens=0)[0]
    (problem,) = native_problems(mask_ratio=1e-4, mask_sampling="fixed")
    assert "masks floor(0.0001 x 2048) = 0 of an image's 2048 tokens" in problem
    assert native_problems(mask_ratio=1e-3, mask_sampling="fixed") == []
    assert "is -1, but an encoder of type laver_patches" in native_problems(encoder_feature_layer=-1)[0]


def test_an_encoder_without_weights_does_not_train():
    freeze = ("connector", "decoder", "heads")
    assert problems_with(freeze=freeze) == []
    (problem,) = native_problems(freeze=freeze)
    assert problem.startswith("freeze names all of connector, decoder, heads: nothing is left to train")


def test_the_base_configuration_is_fine():
    assert problems_with() == []


@pytest.mark.parametrize("tp", [1, 2])
def test_visual_tokens_that_the_data_will_propose(tp):
    changes = {"tensor_model_parallel_size": tp, "sequence_parallel": tp > 1, "global_batch_size": 2}
    assert problems_with(tp, **changes, visual_seq_length=0) == []
    (problem,) = problems_with(tp, **changes, visual_seq_length=0, mask_ratio=1e-5)
    assert "even if every pack held 256 visual tokens" in problem


# --- numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "world_size", "expected"),
    [
        (
            {"tensor_model_parallel_size": 4},
            4,
            ["size 4 does not divide the model's 14 attention heads; sizes that fit this model: 1, 2"],
        ),
        (
            {"tensor_model_parallel_size": 7},
            7,
            [
                "size 7 does not divide its vocabulary of 151936, does not divide its ffn_hidden_size 4864, does not "
                "divide vision_head_hidden_size 2048, neither divides nor is a multiple of its 2 key/value heads"
            ],
        ),
        (
            {"tensor_model_parallel_size": 2, "vision_head_hidden_size": 33, "vision_head_output_size": 31},
            2,
            ["does not divide vision_head_hidden_size 33, does not divide the vision head's 31 logits; sizes"],
        ),
        (
            {"pipeline_model_parallel_size": 5},
            5,
            ["24 layers do not divide into 5 pipeline stages; use 1, 2, 3, 4, 6, 8, 12, 24 stages"],
        ),
        (
            {"pipeline_model_parallel_size": 5, "decoder_first_pipeline_num_layers": 3},
            5,
            ["(first 3) leaves 21 of the model's 24 layers for 4 other pipeline stages"],
        ),
        (
            {
                "pipeline_model_parallel_size": 2,
                "decoder_first_pipeline_num_layers": 10,
                "decoder_last_pipeline_num_layers": 10,
            },
            2,
            ["(first 10, last 10) covers 20 of the model's 24 layers, with 2 stages"],
        ),
        (
            {"pipeline_model_parallel_size": 2, "decoder_last_pipeline_num_layers": 24},
            2,
            ["(last 24) leaves 0 of the model's 24 layers for 1 other"],
        ),
        ({"decoder_first_pipeline_num_layers": 2}, 1, ["needs pipeline_model_parallel_size above 1"]),
        (
            {"num_layers_per_virtual_pipeline_stage": 2},
            1,
            ["num_layers_per_virtual_pipeline_stage 2 needs pipeline_model_parallel_size above 1"],
        ),
        (
            {
                "pipeline_model_parallel_size": 2,
                "num_layers_per_virtual_pipeline_stage": 5,
                "global_batch_size": 2,
            },
            2,
            ["5 does not cut the 12 layers of a stage (24 layers, 2 stages) into equal chunks", ],
        ),
        (
            {
                "pipeline_model_parallel_size": 2,
                "num_layers_per_virtual_pipeline_stage": 12,
                "global_batch_size": 2,
            },
            2,
            ["12 does not cut the 12 layers of a stage"],
        ),
        (
            {
                "pipeline_model_parallel_size": 4,
                "num_layers_per_virtual_pipeline_stage": 2,
                "decoder_first_pipeline_num_layers": 3,
                "global_batch_size": 4,
            },
            4,
            ["num_layers_per_virtual_pipeline_stage and an uneven split of the layers exclude each other"],
        ),
        (
            {
                "pipeline_model_parallel_size": 4,
                "num_layers_per_virtual_pipeline_stage": 2,
                "micro_batch_size": 2,
                "global_batch_size": 24,
            },
            8,
            ["micro-batches, but an iteration has 6; use a global_batch_size that is a multiple of 16"],
        ),
        (
            {"micro_batch_size": 3, "global_batch_size": 8},
            2,
            ["global_batch_size 8 is not a multiple of micro_batch_size 3 x 2 data-parallel replicas = 6"],
        ),
        (
            {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
            6,
            ["6 processes cannot be divided into TP 2 x PP 2 = 4"],
        ),
        (
            {"tensor_model_parallel_size": 2, "sequence_parallel": True, "seq_length": 257},
            2,
            ["seq_length + visual_seq_length = 385 between 2 ranks, but 385 % 2 = 1"],
        ),
        (
            {"tensor_model_parallel_size": 2, "sequence_parallel": True, "seq_length": 257, "visual_seq_length": 127},
            2,
            ["splits visual_seq_length = 127 between 2 ranks, but 127 % 2 = 1"],
        ),
        (
            {"tensor_model_parallel_size": 2, "sequence_parallel": True, "seq_length": 257, "laver": False},
            2,
            ["splits seq_length = 257 between 2 ranks"],
        ),
        ({"sequence_parallel": True}, 1, ["sequence_parallel needs tensor_model_parallel_size above 1"]),
        ({"visual_seq_length": -1}, 1, ["visual_seq_length is -1, but must not be negative"]),
        ({"shuffle_window": 0}, 1, ["shuffle_window is 0, but must be at least 1"]),
        ({"max_bad_fraction": 1.5}, 1, ["max_bad_fraction is 1.5, but must be from 0 to 1"]),
        ({"shard_cache_gb": 0.0}, 1, ["shard_cache_gb is 0.0, but must be above 0"]),
        ({"data_weights": (1.0, 2.0)}, 1, ["data_weights has 2 numbers, but data_path 1 entries"]),
        ({"data_weights": (-1.0,)}, 1, ["data_weights holds -1.0"]),
        ({"data_weights": (float("nan"),)}, 1, ["data_weights holds nan"]),
        ({"data_weights": (0.0,)}, 1, ["data_weights are all 0"]),
        ({"visual_seq_length": 300}, 1, ["visual_seq_length 300 is above seq_length 256"]),
        ({"visual_seq_length": 63}, 1, ["visual_seq_length 63 cannot hold one image of 64 tokens"]),
        (
            {"seq_length": 66, "visual_seq_length": 64},
            1,
            ["seq_length 66 cannot hold one image of 64 tokens with its start, its end and any text; use 67"],
        ),
        ({"mask_ratio": 0.0}, 1, ["mask_ratio 0 never masks a token"]),
        (
            {"mask_ratio": 0.015, "mask_sampling": "fixed"},
            1,
            ["floor(0.015 x 64) = 0 of an image's 64 tokens; use at least 0.0157, or bernoulli"],
        ),
        (
            {"mask_ratio": 0.0158, "mask_sampling": "fixed", "mask_ratio_schedule": "cosine"},
            1,
            # The cosine ends a step before its height: 0.0158 (1 + cos(pi / 10)) / 2 = 0.01541.
            [
                "floor(0.01541 x 64) = 0 of an image's 64 tokens even in the last iteration, at 0.01541; "
                "use at least 0.0161, or bernoulli"
            ],
        ),
        ({"mask_ratio_schedule": "cosine", "train_iters": 1}, 1, ["cosine starts at 0 and train_iters 1 ends there"]),
        # 10 iterations of 128 tokens.
        ({"mask_ratio": 0.99 / 1280}, 1, ["masks less than one token in all 10 iterations"]),
        ({"mask_ratio": 1.5}, 1, ["mask_ratio is 1.5, but must be from 0 to 1"]),
        ({"ema_momentum": -0.1}, 1, ["ema_momentum is -0.1, but must be from 0 to 1"]),
        (
            {"mim_target": "pixels", "mim_loss": "cross-entropy"},
            1,
            ["mim_loss cross-entropy compares two distributions, but mim_target pixels is none"],
        ),
        (
            {"mim_loss": "smooth-l1", "centre_momentum": 0.9},
            1,
            ["centre_momentum 0.9 is of the distribution that mim_loss cross-entropy compares"],
        ),
        (
            {"mim_target": "features", "pipeline_model_parallel_size": 2},
            2,
            ["mim_target features is made on the first pipeline stage"],
        ),
        ({"centre_momentum": 2.0}, 1, ["centre_momentum is 2.0, but must be from 0 to 1"]),
        ({"student_temperature": 0.0}, 1, ["student_temperature is 0.0, but must be above 0"]),
        ({"teacher_temperature": -1.0}, 1, ["teacher_temperature is -1.0, but must be above 0"]),
        ({"adam_beta2": 1.0}, 1, ["adam_beta2 is 1.0, but must be at least 0 and below 1"]),
        ({"lr": -1.0, "min_lr": -2.0}, 1, ["lr is -1.0, but must not be negative", "min_lr is -2.0"]),
        ({"min_lr": 1.0}, 1, ["min_lr 1.0 is above lr 2e-05"]),
        ({"micro_batch_size": 0}, 1, ["micro_batch_size is 0, but must be at least 1"]),
        ({"tensor_model_parallel_size": 0}, 1, ["tensor_model_parallel_size is 0, but must be at least 1"]),
        ({"ema_interval": 0}, 1, ["ema_interval is 0, but must be whole iterations or a share between 0 and 1"]),
        ({"ema_interval": 1.5}, 1, ["ema_interval is 1.5"]),
        ({"ema_interval": 11}, 1, ["ema_interval 11 is above train_iters 10: the teacher would never move"]),
        ({"seed": -1}, 1, ["seed is -1, but must be at least 0 and below 2**63"]),
        ({"seed": 2**63}, 1, ["seed is 9223372036854775808"]),
        ({"seq_length": 32769}, 1, ["seq_length 32769 is above the model's max_position_embeddings 32768"]),
        ({"encoder_lr": 1e-5}, 1, ["encoder_lr is 1e-05, but freeze names the encoder"]),
        ({"freeze": ("decoder",), "decoupled_lr": 1e-5}, 1, ["decoupled_lr is 1e-05, but freeze names the decoder"]),
        ({"lr": 0.0, "connector_lr": 1e-5}, 1, ["connector_lr 1e-05 follows lr in proportion, but lr is 0.0"]),
        (
            {"overlap_grad_reduce": False, "overlap_param_gather": True},
            1,
            ["overlap_param_gather needs overlap_grad_reduce, whose buckets it gathers"],
        ),
        ({"overlap_grad_reduce": False, "ddp_bucket_size": 9}, 1, ["ddp_bucket_size 9 has no use without"]),
        ({"recompute_modules": ("mlp",)}, 1, ["recompute_modules (mlp) are those of", "selective, but it is none"]),
        (
            {"recompute_modules": (), "recompute_granularity": "selective"},
            1,
            ["recompute_modules is empty, so recompute_granularity selective recomputes nothing"],
        ),
        ({"lr_decay_style": "WSD"}, 1, ["lr_decay_style WSD needs the length of its decay"]),
        ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 2.5}, 1, ["lr_wsd_decay_iters is 2.5, but must be whole"]),
        ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 0}, 1, ["lr_wsd_decay_iters is 0, but must be above 0"]),
        (
            {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 0.9, "lr_warmup_iters": 2},
            1,
            ["lr_wsd_decay_iters 0.9 is 9 iterations, but 10 train_iters less 2 of warm-up leave 8; use at most that"],
        ),
        ({"lr_wsd_decay_iters": 5}, 1, ["lr_wsd_decay_iters 5 is WSD's, but lr_decay_style is cosine"]),
        ({"lr_warmup_iters": 10}, 1, ["lr_warmup_iters 10 leaves nothing of 10 train_iters"]),
        ({"eval_interval": 5}, 1, ["eval_interval is 5, but there is no valid_data_path"]),
        ({"inspect_interval": 5}, 1, ["inspect_interval is 5, but nothing is validated; set eval_interval"]),
        (
            {"inspect_interval": 5, "eval_interval": 2, "valid_data_path": ("shards",)},
            1,
            ["inspect_interval 5 must be a multiple of eval_interval, which is 2"],
        ),
        ({"lr_wsd_decay_style": "linear"}, 1, ["lr_wsd_decay_style linear is WSD's, but lr_decay_style is cosine"]),
        ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 1}, 1, ["decay_iters 1 is 1 iteration, which would"]),
        ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 0.1}, 1, ["decay_iters 0.1 is 1 iteration, which"]),
        (
            {"recompute_modules": ("mlp", "core_attn", "mlp"), "recompute_granularity": "selective"},
            1,
            ["recompute_modules names mlp 2 times; name it once"],
        ),
        ({"freeze": ("encoder", "encoder")}, 1, ["freeze names encoder 2 times; name it once"]),
        ({"profile": True}, 1, ["profile_step_start 10 must be below train_iters 10"]),
        ({"profile_step_start": 5, "profile_step_end": 2}, 1, ["start 5 must be below profile_step_end 2"]),
        (
            {"profile_step_start": 0, "profile_step_end": 21},
            1,
            ["end 21 profile 21 iterations, whose events are held in memory; use at most 20, such as"],
        ),
        ({"profile": True, "profile_step_start": 4, "profile_step_end": 4}, 1, ["must be below profile_step_end 4"]),
        ({"finetune": True}, 1, ["finetune takes the weights of --load, but load is not given"]),
        ({"freeze": ("encoder", "connector", "decoder", "heads")}, 1, ["nothing is left to train"]),
        ({"freeze": ("encoder", "connector", "decoder"), "laver": False}, 1, ["nothing is left to train (without"]),
        (
            {"freeze": ("encoder", "connector", "decoder"), "mim_weight": 0.0, "gram_loss": "none"},
            1,
            ["nothing is left to train (without a visual loss"],
        ),
        ({"encoder_feature_layer": -5}, 1, ["-5, but the encoder has 3 layers; use -4 to 3"]),
    ],
)  # fmt: skip
def test_one_problem(changes, world_size, expected):
    problems = problems_with(world_size, **changes)
    for message in expected:
        assert any(message in problem for problem in problems), problems
    for problem in problems:
        assert any(message in problem for message in expected), f"unexpected: {problem}"


@pytest.mark.parametrize(
    ("changes", "world_size"),
    [
        # TP above the number of key/value heads is fine where it is a multiple of it.
        ({"tensor_model_parallel_size": 4}, 4),
        ({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}, 4),
        ({"pipeline_model_parallel_size": 5, "decoder_first_pipeline_num_layers": 4}, 5),
        ({"pipeline_model_parallel_size": 2, "decoder_last_pipeline_num_layers": 7}, 2),
        (
            {
                "pipeline_model_parallel_size": 2,
                "num_layers_per_virtual_pipeline_stage": 3,
                "global_batch_size": 4,
            },
            2,
        ),
        ({"micro_batch_size": 2, "global_batch_size": 8}, 4),
        ({"mask_ratio": 0.0, "mim_weight": 0.0}, 1),
        ({"mask_ratio": 0.0, "laver": False}, 1),
        ({"mask_ratio": 1 / 64, "mask_sampling": "fixed"}, 1),
        ({"mask_ratio": 0.0161, "mask_sampling": "fixed", "mask_ratio_schedule": "cosine"}, 1),
        ({"mask_ratio": 1.01 / 1280}, 1),
        # The vision head learns beside a frozen model.
        ({"freeze": ("encoder", "connector", "decoder"), "mim_weight": 0.0}, 1),
        ({"ema_interval": 10, "seed": 2**63 - 1}, 1),
        ({"ema_interval": 11, "laver": False}, 1),
        ({"ema_momentum": 1.0, "clip_grad": 0.0, "num_workers": 0, "lr": 0.0}, 1),
        ({"ema_interval": 0.5}, 1),
        # An odd length is fine without LaVer's visual streams as long as the sequence itself divides.
        (
            {
                "tensor_model_parallel_size": 2,
                "sequence_parallel": True,
                "visual_seq_length": 127,
                "laver": False,
            },
            2,
        ),
        # Without LaVer there is no vision head to divide.
        ({"tensor_model_parallel_size": 2, "vision_head_hidden_size": 33, "laver": False}, 2),
    ],
)
def test_no_problem(changes, world_size):
    shape = dataclasses.replace(SHAPE, num_attention_heads=16)
    assert problems_with(world_size, shape=shape, **changes) == []


def test_arithmetic_problems_together():
    problems = problems_with(
        8, tensor_model_parallel_size=4, pipeline_model_parallel_size=5, mask_ratio=2.0, train_iters=0
    )
    for expected in ("8 processes", "14 attention heads", "24 layers", "mask_ratio is 2.0", "train_iters is 0"):
        assert any(expected in problem for problem in problems), problems


# --- files ---------------------------------------------------------------------------------------------


def safetensors(num_bytes: int = 24) -> bytes:
    """A file of one tensor: the length of the header, the header, the bytes."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [num_bytes // 4], "data_offsets": [0, num_bytes]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(num_bytes)


def write_model(directory: Path, *, weights: str = "model.safetensors", **changes) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({**MODEL_JSON, **changes}))
    (directory / "tokenizer.json").write_text(json.dumps(TOKENIZER_JSON))
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / weights).write_bytes(safetensors())
    return directory


def write_encoder(directory: Path, **changes) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({**ENCODER_JSON, **changes}))
    (directory / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR_JSON))
    (directory / "model.safetensors").write_bytes(encoder_weights(changes.get("num_hidden_layers", 3)))
    return directory


@functools.cache
def encoder_weights(num_hidden_layers: int) -> bytes:
    """A file with the tensors of ENCODER_JSON, all zero."""
    config = SiglipVisionConfig.from_dict({**ENCODER_JSON, "num_hidden_layers": num_hidden_layers})
    return safetensors_torch.save(
        {name: torch.zeros_like(tensor) for name, tensor in SiglipVisionModel(config).state_dict().items()}
    )


def write_run(path: Path, **changes) -> None:
    run = CONFIG.replace(**{"encoder_feature_layer": -2, **changes})  # a run writes down the layer it has taken
    (path / RUN_FILE).write_text(json.dumps(run.flat()))
    renew_manifest(path)


def write_checkpoint(directory: Path, iteration: int = 10, **changes) -> Path:
    """A whole checkpoint but for its tensors, as a run with `CONFIG` and these changes leaves it."""
    path = directory / f"iter_{iteration:07d}"
    write_model(path / "hf")
    write_encoder(path / "encoder")
    (path / ".metadata").touch()
    write_run(path, **changes)
    (directory / "latest").write_text(f"{iteration}\n")
    return path


@pytest.fixture
def run(tmp_path) -> Config:
    """A configuration whose files are all there."""
    write_model(tmp_path / "model")
    write_encoder(tmp_path / "encoder")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "train-0.tar").write_bytes(b"shard")
    return CONFIG.replace(
        load=f"hf:{tmp_path}/model",
        encoder=f"{tmp_path}/encoder",
        data_path=(f"{tmp_path}/shards/train-*.tar",),
        run_dir=f"{tmp_path}/run",
    )


def found(config: Config, *, dry_run: bool = False) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        check(Invocation(config, dry_run, dry_run_world_size=1))
    return caught.value.problems


def check_one(config: Config) -> ModelShape:
    return check(Invocation(config, dry_run_world_size=1))


def files_below(directory: Path) -> set[Path]:
    return set(directory.rglob("*"))


def test_everything_there(run, tmp_path):
    before = files_below(tmp_path)
    shape = check_one(run)
    assert (shape.num_layers, shape.kv_channels, shape.rope_theta) == (4, 16, 1e6)
    assert files_below(tmp_path) == before


def test_files_and_numbers_together_and_nothing_written(run, tmp_path):
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "encoder" / "config.json").unlink()
    (tmp_path / "shards" / "train-0.tar").write_bytes(b"")
    before = files_below(tmp_path)
    problems = found(run.replace(tensor_model_parallel_size=3, mask_ratio=7.0))
    for expected in (
        f"load {tmp_path}/model has neither model.safetensors nor model.safetensors.index.json",
        f"encoder {tmp_path}/encoder: no config.json in it",
        "train-0.tar is empty (0 bytes)",
        "1 processes cannot be divided into TP 3 x PP 1",
        "does not divide the model's 4 attention heads",
        "mask_ratio is 7.0",
    ):
        assert any(expected in problem for problem in problems), (expected, problems)
    assert files_below(tmp_path) == before


def test_check_run_exits_with_2(run, capsys):
    with pytest.raises(SystemExit) as caught:
        check_run(Invocation(run.replace(mask_ratio=7.0), dry_run_world_size=1))
    assert caught.value.code == 2
    assert "mask_ratio is 7.0" in capsys.readouterr().err


def test_training_itself_makes_no_dry_run(run, capsys):
    with pytest.raises(SystemExit) as caught:
        check_run(Invocation(run, dry_run=True, dry_run_world_size=1))
    assert caught.value.code == 2
    assert "--dry-run is the launcher's" in capsys.readouterr().err


def test_dry_run_needs_neither_weights_nor_shards(run, tmp_path, capsys):
    for path in ("model/model.safetensors", "encoder/model.safetensors", "shards/train-0.tar"):
        (tmp_path / path).unlink()
    config = run.replace(tensor_model_parallel_size=2, global_batch_size=4)
    before = files_below(tmp_path)
    show_dry_run(Invocation(config, dry_run=True, dry_run_world_size=4))
    assert "4 processes as TP 2 x PP 1 x DP 2; 2 micro-batches" in capsys.readouterr().out
    assert files_below(tmp_path) == before
    assert "24 layers" not in found(config, dry_run=True)[0]


@pytest.mark.parametrize("target, size", [("features", 32), ("pixels", 3 * 16**2)])
def test_dry_run_counts_the_head_of_the_target(run, capsys, target, size):
    """As of a latent target with a head of that size: parameters, bytes of every rank, and a checkpoint's."""
    said = []
    for changes in ({"mim_target": target}, {"vision_head_output_size": size}, {}):
        config = run.replace(**changes, vision_head_hidden_size=8192)
        show_dry_run(Invocation(config, dry_run=True, dry_run_world_size=1))
        said.append(capsys.readouterr().out.partition(" GB are free")[0].rpartition("; ")[0])
    assert said[0] == said[1] != said[2]
    sizes = [re.search(r"a checkpoint takes (\S+) GB", text)[1] for text in said]
    assert sizes[0] == sizes[1] != sizes[2]


def test_dry_run_refuses_an_encoder_that_cannot_be_built(run, tmp_path, capsys):
    (tmp_path / "encoder/config.json").write_text(json.dumps({**ENCODER_JSON, "num_attention_heads": 5}))
    with pytest.raises(SystemExit) as caught:
        show_dry_run(Invocation(run, dry_run=True, dry_run_world_size=1))
    assert caught.value.code == 2
    assert "hidden_size 32 is not a multiple of num_attention_heads 5" in capsys.readouterr().err


def test_dry_run_still_checks_the_rest(run):
    assert any("mask_ratio is 7.0" in problem for problem in found(run.replace(mask_ratio=7.0), dry_run=True))
    assert any("no such directory" in problem for problem in found(run.replace(load="hf:/nowhere"), dry_run=True))


def test_nothing_to_load(run, tmp_path):
    problems = found(run.replace(load=None))
    assert problems == (
        "load is missing: weights come from --load hf:DIR or --load CHECKPOINTS (there is no checkpoint in "
        f"{tmp_path}/run/checkpoints to resume from)",
    )


def test_nothing_to_encode_with(run):
    assert found(run.replace(encoder=None))[0].startswith("encoder is missing")


def test_pickled_weights_are_named(run, tmp_path):
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    (problem,) = found(run)
    assert problem.startswith(f"load {tmp_path}/model has neither") and "only pickles (pytorch_model.bin)" in problem


def test_missing_part_of_the_weights(run, tmp_path):
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "model-3.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-3.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "2 of 3 weight files are missing (model-1.safetensors, model-2.safetensors)" in found(run)[0]


@pytest.mark.parametrize("directory", ["model", "encoder"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (safetensors()[:-1], "file not fully covered"),
        (safetensors()[:20], "invalid header length"),
        (b"", "header too small"),
        (b"version https://git-lfs", "header too large"),
        (struct.pack("<Q", 2) + b"[]", "invalid JSON in header"),
        (struct.pack("<Q", 7) + b'{"a":1}', "invalid JSON in header"),
    ],
)
def test_weights_cut_short(run, tmp_path, directory, content, expected):
    file = tmp_path / directory / "model.safetensors"
    file.write_bytes(content)
    (problem,) = found(run)
    assert f"{file} is damaged: " in problem and expected in problem and "copy it again" in problem
    assert check(Invocation(run, dry_run=True, dry_run_world_size=1)), "a dry run needs no weights"


def test_only_the_damaged_part_is_named(run, tmp_path):
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "model-2.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model" / "model-1.safetensors").write_bytes(safetensors()[:-4])
    (tmp_path / "model" / "unrelated.safetensors").write_bytes(b"")
    (problem,) = found(run)
    assert "model-1.safetensors is damaged" in problem


def test_load_without_a_path(run):
    assert found(run.replace(load="hf:")) == ("load hf: names no directory; write --load hf:DIR",)


def test_load_directory_that_is_not_there(run, tmp_path):
    assert any(
        f"{tmp_path}/other: no such directory" in problem for problem in found(run.replace(load=f"hf:{tmp_path}/other"))
    )
    assert any(
        f"load {tmp_path}/other: no such directory" in problem
        for problem in found(run.replace(load=f"{tmp_path}/other", model=f"{tmp_path}/model"))
    )


def test_forgotten_prefix(run, tmp_path):
    assert any(
        f"write --load hf:{tmp_path}/model" in problem
        for problem in found(run.replace(load=f"{tmp_path}/model", model=f"{tmp_path}/model"))
    )


def test_load_checkpoint_folder_or_one_iteration(run, tmp_path):
    path = write_checkpoint(tmp_path / "old")
    for load in (tmp_path / "old", path):
        assert check_one(run.replace(load=str(load), encoder=None)).num_layers == 4


def test_the_highest_whole_folder_is_taken(run, tmp_path):
    """Whatever the file `latest` says."""
    folder = tmp_path / "run" / "checkpoints"
    for iteration in (5, 20, 10_000_000):
        write_checkpoint(folder, iteration)
    (folder / "iter_10000000" / MANIFEST_FILE).unlink()
    write_checkpoint(folder, 30).rename(folder / ".iter_0000030.incomplete")
    for said in (b"5", b"\xff\xfe"):
        (folder / "latest").write_bytes(said)
        assert latest_checkpoint(folder) == folder / "iter_0000020"
        assert check_one(run.replace(load=None, encoder=None)).num_layers == 4
    problem = f"{folder}/iter_10000000 has no {MANIFEST_FILE}: it is not a complete checkpoint of this program"
    assert found(run.replace(load=None, strict_load=True))[0].startswith(problem)


def test_checkpoint_without_its_model(run, tmp_path):
    path = write_checkpoint(tmp_path / "old")
    (path / "hf" / "config.json").unlink()
    problem = found(run.replace(load=str(tmp_path / "old")))[0]
    assert f"{path}/hf/config.json is missing" in problem and "no checkpoint there is whole" in problem
    assert any("not a checkpoint" in problem for problem in found(run.replace(load=str(path))))


def test_own_checkpoint_needs_no_load(run, tmp_path):
    write_checkpoint(tmp_path / "run" / "checkpoints")
    assert check_one(run.replace(load="hf:/gone", encoder="/gone")).num_layers == 4


def test_model_that_is_not_the_checkpoints(run, tmp_path):
    write_checkpoint(tmp_path / "old")
    write_model(tmp_path / "larger", num_hidden_layers=8)
    for load in (f"{tmp_path}/old", f"hf:{tmp_path}/model"):
        problems = found(run.replace(load=load, model=f"{tmp_path}/larger"))
        assert any("num_layers 8 against 4; drop --model" in problem for problem in problems), problems


# --- going on from a checkpoint ------------------------------------------------------------------------

OTHER_MODEL = {"attention": "causal", "positions": "mrope", "encoder_feature_layer": -1}
OTHER_STATE = {
    "centre_momentum": 0.5, "vision_head_hidden_size": 1024, "freeze": (), "seq_length": 250, "visual_seq_length": 100,
    "seed": 7,
}  # fmt: skip


def going_on(run: Config, tmp_path: Path, how: str, **written) -> tuple[Config, Path]:
    """A configuration that goes on from a checkpoint written with `written`, and that checkpoint."""
    folder = tmp_path / "run" / "checkpoints" if how == "resume" else tmp_path / "old"
    path = write_checkpoint(folder, **written)
    return run.replace(load=str(folder), finetune=how == "finetune"), path


@pytest.mark.parametrize("how", ["resume", "load", "finetune"])
def test_model_settings_do_not_change_silently(run, tmp_path, how):
    config, path = going_on(run, tmp_path, how, **OTHER_MODEL)
    assert found(config) == (
        f"attention is mixed, but {path} was trained with causal; set --attention causal, or ask for the change with "
        "--allow-change attention",
        f"positions is 2d, but {path} was trained with mrope; set --positions mrope, or ask for the change with "
        "--allow-change positions",
        f"encoder_feature_layer is -2, but {path} was trained with -1; set --encoder-feature-layer -1, or ask for the "
        "change with --allow-change encoder_feature_layer",
    )
    assert len(found(config.replace(allow_change=("positions",)))) == 2
    assert check_one(config.replace(allow_change=tuple(OTHER_MODEL)))
    assert check_one(config.replace(**OTHER_MODEL))


@pytest.mark.parametrize("how", ["resume", "load"])
def test_state_and_data_do_not_change_silently(run, tmp_path, how):
    config, path = going_on(run, tmp_path, how, **OTHER_STATE, **OTHER_MODEL)
    problems = found(config)
    assert len(problems) == len(OTHER_STATE) + len(OTHER_MODEL)
    start = "start another --run-dir with" if how == "resume" else "give"
    for difference, setting in (
        ("centre_momentum is none, but {} was written with 0.5", "--centre-momentum 0.5"),
        ("vision_head_hidden_size is 2048, but {} was written with 1024", "--vision-head-hidden-size 1024"),
        ("freeze is encoder, but {} was written with none", "--freeze none"),
        ("seq_length is 256, but {} was written with 250", "--seq-length 250"),
        ("visual_seq_length is 128, but {} was written with 100", "--visual-seq-length 100"),
        ("seed is 1234, but {} was written with 7", "--seed 7"),
    ):
        (problem,) = [problem for problem in problems if problem.startswith(difference.format(path))]
        assert f"set {setting}, or {start} --load {path} --finetune, which takes the weights alone" in problem
    assert check_one(config.replace(**OTHER_STATE, **OTHER_MODEL))
    assert len(found(config.replace(allow_change=tuple(OTHER_MODEL)))) == len(OTHER_STATE), "allowed for the model only"


LATENT = {"mim_target": "latent", "vision_head_output_size": None}
TARGETS = {
    "features": {"mim_target": "features", "vision_head_output_size": 32},
    "pixels": {"mim_target": "pixels", "vision_head_output_size": 3 * 16**2},
}


@pytest.mark.parametrize("how", ["resume", "load"])
@pytest.mark.parametrize("then, now", [("latent", "features"), ("pixels", "latent"), ("features", "pixels")])
def test_the_target_of_reconstruction_stays(run, tmp_path, how, then, now):
    """It is refused with the size of its vision head, which the encoder decides, and alone where the sizes agree."""
    config, path = going_on(run, tmp_path, how, **(LATENT if then == "latent" else TARGETS[then]))
    of_size, of_target = found(config.replace(mim_target=now))
    assert of_size.startswith("vision_head_output_size is ") and f"{path} was written with " in of_size
    assert of_target.startswith(
        f"mim_target is {now}, but {path} was written with {then}, and its vision head predicts that; set --mim-target "
        f"{then}, or "
    )
    assert check_one(config.replace(mim_target=then))
    write_run(path, **{**TARGETS["features"], "mim_target": "latent"})
    (problem,) = found(config.replace(mim_target="features"))
    assert problem.startswith(f"mim_target is features, but {path} was written with latent")


def test_finetuning_may_take_another_target_of_the_same_size(run, tmp_path):
    config, path = going_on(run, tmp_path, "finetune", **TARGETS["features"])
    assert check_one(config.replace(vision_head_output_size=32))
    (problem,) = found(config.replace(mim_target="pixels"))
    assert problem.startswith(f"vision_head_output_size is 768, but {path} was written with 32")


def test_laver_is_on_or_off_for_a_whole_run(run, tmp_path):
    config, path = going_on(run, tmp_path, "resume", laver=False, centre_momentum=0.5, vision_head_hidden_size=1024)
    (problem,) = found(config)  # what only LaVer has is not compared on top
    assert problem.startswith(f"laver is on, but {path} was written with off") and "set --no-laver, or" in problem
    assert check_one(config.replace(laver=False))


def test_what_may_change_on_resuming(run, tmp_path):
    config, _ = going_on(run, tmp_path, "resume", vision_head_output_size=64, centre_momentum=0.9)
    # 64 is the model's width, what none stands for; of the centre it matters only that there is one.
    changes = {"global_batch_size": 8, "train_iters": 99, "lr": 1.0, "centre_momentum": 0.5, "mask_ratio": 0.3}
    assert check_one(config.replace(**changes, data_path=run.data.data_path))
    assert "was written with 64" in found(config.replace(centre_momentum=0.9, vision_head_output_size=32))[0]


def test_finetune_compares_only_what_it_takes(run, tmp_path):
    config, path = going_on(run, tmp_path, "finetune", **OTHER_STATE)
    (problem,) = found(config)
    assert problem.startswith(f"vision_head_hidden_size is 2048, but {path} was written with 1024")
    assert problem.endswith("set --vision-head-hidden-size 1024, or train with --no-laver")
    assert check_one(config.replace(laver=False))
    write_run(path, **OTHER_STATE, laver=False)
    assert check_one(config)


def text_only(run: Config, tmp_path: Path, start: str) -> Config:
    """A run from weights without an encoder: of a published model, or of its conversion."""
    if start == "hf":
        return run
    path = write_checkpoint(tmp_path / "converted")
    shutil.rmtree(path / "encoder")
    (path / RUN_FILE).write_text(json.dumps({"weights_only": True}))
    renew_manifest(path)
    return run.replace(load=str(tmp_path / "converted"))


@pytest.mark.parametrize("start", ["hf", "converted"])
@pytest.mark.parametrize("laver", [True, False])
def test_a_later_stage_needs_weights_that_have_learnt_to_see(run, tmp_path, start, laver):
    config = text_only(run, tmp_path, start).replace(laver=laver)
    assert check_one(config), "a first stage makes the connector"
    (problem,) = found(config.replace(finetune=True))
    assert (
        f"but {config.start.load} is text only: it brings no encoder and no connector; load what an earlier" in problem
    )
    assert found(config.replace(finetune=True), dry_run=True) == (problem,)
    write_checkpoint(tmp_path / "run" / "checkpoints", laver=laver)
    assert check_one(config.replace(finetune=True)), "a run of its own goes on"


@pytest.mark.parametrize("how", ["resume", "load", "finetune"])
def test_encoder_that_is_not_the_checkpoints(run, tmp_path, how):
    config, path = going_on(run, tmp_path, how)
    write_encoder(tmp_path / "deeper", num_hidden_layers=5)
    (problem,) = found(config.replace(encoder=f"{tmp_path}/deeper"))
    assert problem.startswith(f"encoder {tmp_path}/deeper is not the encoder of {path}/encoder, which comes with the")
    assert "num_layers 5 against 3; drop --encoder" in problem
    write_encoder(tmp_path / "other", hidden_act="relu", transformers_version="4.0", layer_norm_eps=1e-5)
    (problem,) = found(config.replace(encoder=f"{tmp_path}/other"))
    assert "hidden_act relu against gelu_pytorch_tanh, layer_norm_eps 1e-05 against 1e-06; drop --encoder" in problem
    same = write_encoder(tmp_path / "same", transformers_version="4.0", hidden_act="gelu_pytorch_tanh")
    assert check_one(config.replace(encoder=str(same)))
    processor = {**PREPROCESSOR_JSON, "image_mean": [0.4, 0.5, 0.5], "resample": 2}
    (same / "preprocessor_config.json").write_text(json.dumps(processor))
    (problem,) = found(config.replace(encoder=str(same)))
    assert "image_mean [0.4, 0.5, 0.5] against [0.5, 0.5, 0.5]" in problem and "resample " in problem
    said = find_start(config).encoder_note(config.replace(encoder=str(same)))
    assert said == (
        f"the image encoder is that of {path}/encoder, weights and all; --encoder {same} only served to "
        "check that its settings agree"
    )
    assert find_start(config).encoder_note(config.replace(encoder=None)) == ""
    assert check_one(config.replace(encoder=None)) and check_one(config.replace(encoder="/gone"))


@pytest.mark.parametrize(
    ("then", "changes", "expected"),
    [
        (
            {"laver": False},
            {},
            "taken over: encoder, connector, decoder; new: optimizer, place in the data, [MASK], vision head, teacher "
            "(the student's weights)",
        ),
        (
            {},
            {},
            "taken over: encoder, connector, decoder, [MASK], vision head; new: optimizer, place in the data, teacher "
            "(the student's weights)",
        ),
        (
            {},
            {"laver": False},
            "taken over: encoder, connector, decoder; new: optimizer, place in the data; left behind: [MASK], vision "
            "head, teacher",
        ),
        (
            {"laver": False},
            {"laver": False},
            "taken over: encoder, connector, decoder; new: optimizer, place in the data",
        ),
    ],
)  # fmt: skip
def test_what_a_stage_takes_over(run, tmp_path, then, changes, expected):
    config, _ = going_on(run, tmp_path, "finetune", **then)
    config = config.replace(**changes)
    assert find_start(config).taken_over(config) == expected
    without = config.replace(finetune=False)
    assert find_start(without).taken_over(without) == ""


def schedule_note(config, iteration):
    """The line about other schedules among those of a run's start; empty if there is none."""
    lines = list(find_start(config).messages(config, iteration))
    return next((line for line in lines if line.startswith("--train-iters")), "")


def test_another_end_of_the_schedules(run, tmp_path):
    """By the formulas of `schedules`: at a third of a cosine (step 40 of 120) it stands at 3/4, at the half at 1/2."""
    schedules = {"lr": 1e-3, "min_lr": 0.0, "lr_warmup_iters": 0, "mask_ratio": 0.4, "mask_ratio_schedule": "cosine"}
    config, start = going_on(run, tmp_path, "resume", train_iters=80, **schedules)
    config = config.replace(train_iters=80, **schedules)
    assert schedule_note(config, 40) == ""
    longer = config.replace(train_iters=120)
    assert schedule_note(longer, 40) == (
        f"--train-iters is 120, but {start} was written with 80, and the schedules end there: iteration 41 has "
        "learning rate 0.00075 instead of 0.0005, mask ratio 0.1 instead of 0.2"
    )
    # The old schedule is over; the new one is at its half, and the teacher moves less often.
    over = longer.replace(train_iters=160, laver=False)
    assert schedule_note(over, 80).endswith("iteration 81 has learning rate 0.0005 instead of 0")
    rarely = longer.replace(ema_interval=0.1, mask_ratio_schedule="constant")
    assert schedule_note(rarely, 40).endswith("learning rate 0.00075 instead of 0.0005, EMA interval 12 instead of 8")
    warming = longer.replace(lr_warmup_iters=60, mask_ratio_schedule="constant")
    assert schedule_note(warming, 29).endswith("iteration 30 has for now the same learning rate 0.0005")
    # Nothing is left to do, and what takes weights alone has schedules of its own.
    assert schedule_note(longer, 120) == ""
    tuned = longer.replace(finetune=True, load=str(start), run_dir=str(tmp_path / "tuned"))
    assert schedule_note(tuned, 0) == ""


def test_what_is_taken_over_from_text_only_weights(run, tmp_path):
    config = text_only(run, tmp_path, "converted").replace(laver=False)
    message = "taken over: decoder; new: connector, optimizer, place in the data"
    assert find_start(config).taken_over(config) == message


def test_finetune_says_nothing_on_resuming(run, tmp_path):
    config, _ = going_on(run, tmp_path, "resume", seed=7)
    assert "seed is 1234" in found(config.replace(finetune=True))[0]


@pytest.mark.parametrize("how", ["resume", "load", "finetune"])
@pytest.mark.parametrize("dry_run", [False, True])
def test_checkpoint_that_does_not_say_what_it_is(run, tmp_path, how, dry_run):
    config, path = going_on(run, tmp_path, how)
    file = path / RUN_FILE
    before = file.read_text()
    for content, expected in (
        ("{", f"{file} cannot be read"),
        ("[]", f"{file} is not a JSON object; copy it again"),
        (before.replace('"seed"', '"seat"'), f"{file} does not say seed;"),
    ):
        file.write_text(content)
        renew_manifest(path)
        assert expected in found(config, dry_run=dry_run)[0]
    file.unlink()
    assert f"{file} is missing" in found(config, dry_run=dry_run)[0]
    file.write_text(before)
    (path / MANIFEST_FILE).unlink()
    assert f"{path} has no manifest.json: it is not a complete checkpoint" in found(config, dry_run=dry_run)[0]


@pytest.mark.parametrize("how", ["resume", "load", "finetune"])
@pytest.mark.parametrize(
    "name, value, shown",
    [
        ("freeze", [1], "[1]"),
        ("freeze", 3, "3"),
        ("freeze", None, "None"),
        ("positions", ["2d", 2], "['2d', 2]"),
        ("encoder_feature_layer", {"a": []}, "{'a': []}"),
        ("laver", "yes", "'yes'"),
        ("seed", True, "True"),
        ("seq_length", 192.5, "192.5"),
        ("visual_seq_length", "32", "'32'"),
        ("visual_seq_length", None, "None"),
        ("visual_seq_length", 10**12, "1000000000000"),
        ("vision_head_hidden_size", 10**12, "1000000000000"),
        ("train_iters", "\x1b[2J", "'\\x1b[2J'"),
        ("train_iters", 0, "0"),
        ("centre_momentum", float("nan"), "nan"),
        ("vision_head_hidden_size", [[[]]], "[[[]]]"),
    ],
)
def test_checkpoint_that_says_what_no_run_can_have(run, tmp_path, how, name, value, shown):
    """Though its checksum fits: in words, not from the middle of a comparison."""
    config, path = going_on(run, tmp_path, how)
    file = path / RUN_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))
    renew_manifest(path)
    problem = f"{file} says what no run can have: {name} is {shown}; copy the checkpoint again"
    assert found(config)[0] == problem
    with pytest.raises(ValueError, match=re.escape(problem)):
        Resume(checkpoint=path, model_dir=None, encoder_dir=None).with_data_settings(run.replace(visual_seq_length=0))


# --- tokenizer, architectures, encoders, shards --------------------------------------------------------


def test_chat_template(run, tmp_path):
    (tmp_path / "model" / "chat_template.jinja").unlink()
    assert "its tokenizer has no chat template" in found(run)[0]
    settings = tmp_path / "model" / "tokenizer_config.json"
    settings.write_text("{}")
    assert "its tokenizer has no chat template" in found(run)[0]
    settings.write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert check_one(run)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"size": {"height": 128, "width": 64}}, "makes images of 128 x 64 pixels, but the encoder"),
        ({"size": {"height": 96, "width": 96}}, "of config.json takes 128 x 128"),
        ({"size": {"shortest_edge": 128}}, "no fixed height and width"),
        ({"size": {"shortest_edge": 9}, "crop_size": {"height": 128, "width": 128}, "do_center_crop": True}, None),
        ({"size": 128}, "no fixed height and width ({'shortest_edge': 128})"),
        ({"do_resize": False}, "do_resize is false"),
        ({"image_processor_type": "NoImageProcessor"}, "cannot be read"),
        ([], "is not a JSON object"),
    ],
)
def test_preprocessor(run, tmp_path, content, expected):
    content = {**PREPROCESSOR_JSON, **content} if isinstance(content, dict) else content
    (tmp_path / "encoder" / "preprocessor_config.json").write_text(json.dumps(content))
    if expected is None:
        assert check_one(run)
    else:
        (problem,) = found(run)
        assert expected in problem and "preprocessor_config.json" in problem


def test_tokenizer(run, tmp_path):
    tokenizer = tmp_path / "model" / "tokenizer.json"
    outside = [{**token, "id": token["id"] + 1} for token in TOKENIZER_JSON["added_tokens"]]
    tokenizer.write_text(json.dumps({"added_tokens": outside}))
    assert "<|vision_end|> has the id 512, but config.json's vocab_size is 512" in found(run)[0]
    tokenizer.write_text(json.dumps({"added_tokens": outside[:1]}))
    assert "no <|image_pad|>, <|vision_end|> among the special tokens" in found(run)[0]
    tokenizer.unlink()
    assert "no tokenizer in it" in found(run)[0]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', but only 'qwen2'"),
        ({"model_type": "qwen2_5_vl"}, "model_type is 'qwen2_5_vl'"),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn"}}, "rotary scaling of type 'yarn'"),
        ({"rope_scaling": {"type": "linear"}, "rope_parameters": None, "rope_theta": 1e6}, "of type 'linear'"),
        ({"use_sliding_window": True, "max_window_layers": 2}, "sliding-window attention is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window attention"),
        ({"use_sliding_window": True, "max_window_layers": "2"}, "sliding-window attention"),
        ({"layer_types": 3}, "sliding-window attention"),
        ({"layer_types": [{}]}, "sliding-window attention"),
        ({"rope_parameters": None}, "rope_theta missing or not a number above 0"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling asks for rotary scaling of type 'yarn'"),
        ({"rope_scaling": "yarn"}, "rope_scaling asks for rotary scaling of type 'yarn'"),
        ({"rope_scaling": ["x"]}, "rope_scaling asks for rotary scaling of type ['x']"),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "sets partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_parameters sets full_attention"),
        ({"rope_scaling": {"rope_type": "default"}}, "rope_scaling stands beside rope_parameters"),
        ({"rope_parameters": None, "rope_theta": 1e6, "rope_scaling": {"rope_theta": 5}}, "or sets rope_theta"),
        ({"rope_parameters": {"rope_theta": True}}, "rope_theta missing or not a number above 0"),
        ({"rope_parameters": None, "rope_theta": 0}, "rope_theta missing or not a number above 0"),
        ({"rms_norm_eps": None}, "rms_norm_eps missing or not a number above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps missing or not a number above 0"),
        ({"vocab_size": "many", "hidden_size": 64.0}, "hidden_size, vocab_size missing or not a positive integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers missing or not a positive integer"),
        ({"num_hidden_layers": 1_000_000_000}, "num_hidden_layers is 1000000000, above 10000"),
        ({"hidden_size": 10**12}, "hidden_size is 1000000000000, above 1048576"),
        ({"vocab_size": 10**12, "head_dim": 10**9}, "vocab_size is 1000000000000, above 67108864"),
        ({"intermediate_size": 10**30}, "intermediate_size is 1000000000000000000000000000000, above 16777216"),
        ({"hidden_size": -64}, "hidden_size missing or not a positive integer"),
        ({"vocab_size": 0}, "vocab_size missing or not a positive integer"),
        ({"hidden_size": 1 << 20, "intermediate_size": 1 << 24}, "make a model of at least 2.1e+14 parameters, above"),
        ({"num_attention_heads": 0, "num_key_value_heads": 0}, "heads, num_key_value_heads missing or no"),
        ({"head_dim": "32"}, "head_dim missing or not a positive integer"),
        ({"head_dim": 0}, "head_dim missing or not a positive integer"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', neither true nor false"),
        ({"num_key_value_heads": 3}, "4 attention heads are not a multiple of 3 key/value heads"),
        ({"hidden_size": 66}, "hidden_size 66 is not a multiple of 4 attention heads"),
        ({"quantization_config": {"bits": 4}}, "the weights are quantized"),
    ],
)
def test_architectures_that_are_refused(tmp_path, changes, expected):
    with pytest.raises(ConfigError, match="config.json") as caught:
        read_model_shape(write_model(tmp_path / "other", **changes))
    assert expected in str(caught.value)


def test_model_shapes_old_and_new(tmp_path):
    new = read_model_shape(write_model(tmp_path / "new"))
    old = read_model_shape(write_model(tmp_path / "old", rope_parameters=None, rope_theta=1e6))
    assert new == old
    # Sliding windows that no layer uses, as in Qwen2.5's own files.
    unused = {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 4}
    assert read_model_shape(write_model(tmp_path / "unused", **unused)) == new
    assert read_model_shape(write_model(tmp_path / "wide", head_dim=32)).kv_channels == 32


def test_config_that_is_no_json(tmp_path):
    directory = write_model(tmp_path / "model")
    (directory / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_model_shape(directory)


def test_encoder_shapes(tmp_path):
    alone = read_encoder(write_encoder(tmp_path / "alone"))
    assert alone.num_tokens == 64
    whole = write_encoder(tmp_path / "whole", model_type="siglip", vision_config=ENCODER_JSON)
    assert read_encoder(whole) == alone
    # A border narrower than a patch has no token: 384 pixels in patches of 14 are 27 x 27.
    bordered = write_encoder(tmp_path / "bordered", image_size=384, patch_size=14)
    assert read_encoder(bordered).num_tokens == 729


def test_a_directory_without_weights(run, tmp_path):
    """Encoder-free: nothing but two settings files, and nothing else is asked for."""
    patches = write_encoder(tmp_path / "patches")
    (patches / "config.json").write_text(json.dumps({"model_type": "laver_patches", "patch_size": 16}))
    (patches / "preprocessor_config.json").write_text(json.dumps(NATIVE_PREPROCESSOR_JSON))
    (patches / "model.safetensors").unlink()
    assert check_one(run.replace(encoder=str(patches)))
    assert check_one(run.replace(encoder=str(patches), max_image_tokens=100))
    (patches / "config.json").write_text(json.dumps({"model_type": "laver_patches"}))
    assert "patch_size missing" in found(run.replace(encoder=str(patches)))[0]


def test_images_beyond_the_cap(run):
    assert check_one(run.replace(max_image_tokens=64))
    (problem,) = found(run.replace(max_image_tokens=0))
    assert "max_image_tokens is 0, but must be at least 1" in problem
    (problem,) = found(run.replace(max_image_tokens=63))
    assert "every image has 64 visual tokens, above max_image_tokens 63; raise it or leave it out" in problem


def test_going_on_with_an_encoder_without_layers(run, tmp_path):
    path = write_checkpoint(tmp_path / "run" / "checkpoints", encoder_feature_layer=None)
    (path / "encoder" / "config.json").write_text(json.dumps({"model_type": "laver_patches", "patch_size": 16}))
    (path / "encoder" / "preprocessor_config.json").write_text(json.dumps(NATIVE_PREPROCESSOR_JSON))
    renew_manifest(path)
    run = run.replace(encoder=None)
    assert check_one(run)
    assert "is -2, but an encoder of type laver_patches" in found(run.replace(encoder_feature_layer=-2))[0]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_hidden_layers": 4}, r"lacks 16 tensors, such as .*layers\.3\."),
        ({"num_hidden_layers": 2}, r"is larger than its config.json says, by 16 tensors, such as .*layers\.2\."),
        ({"intermediate_size": 80}, "has, in another size than its config.json says, 12 tensors"),
        ({"image_size": 64, "patch_size": 8}, "has, in another size than its config.json says, 1 tensors"),
        ({"hidden_act": "none"}, "transformers builds no image encoder from it"),
    ],
)
def test_weights_of_another_encoder(run, tmp_path, changes, expected):
    """Seen in the headers, before data are counted. SigLIP's own head counts as a fourth layer's MLP."""
    settings = tmp_path / "encoder" / "config.json"
    settings.write_text(json.dumps({**ENCODER_JSON, **changes}))
    size = changes.get("image_size", 128)
    processor = {**PREPROCESSOR_JSON, "size": {"height": size, "width": size}}
    (tmp_path / "encoder" / "preprocessor_config.json").write_text(json.dumps(processor))
    (problem,) = found(run)
    assert re.search(expected, problem) and str(tmp_path / "encoder") in problem
    if "hidden_act" not in changes:
        check(Invocation(run, dry_run=True, dry_run_world_size=1))  # which does not look at weights


def test_heads_that_nobody_asked_for(run, tmp_path):
    file = tmp_path / "encoder" / "model.safetensors"
    file.write_bytes(
        safetensors_torch.save({**safetensors_torch.load(file.read_bytes()), "classifier.weight": torch.zeros(3, 32)})
    )
    assert check_one(run)


def test_encoders_that_are_refused(run, tmp_path):
    write_encoder(tmp_path / "naflex", model_type="siglip2_vision_model")
    assert (
        "model_type is 'siglip2_vision_model', but the encoder must be one of siglip, siglip_vision_model"
        in found(run.replace(encoder=f"{tmp_path}/naflex"))[0]
    )
    (tmp_path / "encoder" / "preprocessor_config.json").unlink()
    assert "no preprocessor_config.json" in found(run)[0]
    assert "encoder /nowhere: no such directory" in found(run.replace(encoder="/nowhere"))[0]


def test_shards(run, tmp_path):
    problems = found(
        run.replace(
            data_path=(f"{tmp_path}/none-*.tar", f"{tmp_path}/gone.tar"), valid_data_path=(f"{tmp_path}/model",)
        )
    )
    assert f"data_path: no file matches {tmp_path}/none-*.tar" in problems
    assert f"data_path: {tmp_path}/gone.tar does not exist" in problems
    assert f"valid_data_path: the directory {tmp_path}/model holds no .tar file" in problems


def test_file_in_the_way_of_the_run_directory(run, tmp_path):
    (tmp_path / "file").write_text("")
    for run_dir in (f"{tmp_path}/file", f"{tmp_path}/file/below/it"):
        assert f"{tmp_path}/file is in the way, it is not a directory" in found(run.replace(run_dir=run_dir))[0]


def test_run_directory_without_permission(run, tmp_path, monkeypatch):
    # os.access is replaced because a test may run as root, whom no mode stops.
    (tmp_path / "locked").mkdir()
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked" and allowed(path, mode))
    assert found(run.replace(run_dir=f"{tmp_path}/locked/new")) == (
        f"run_dir {tmp_path}/locked/new: no permission to write in {tmp_path}/locked",
    )


@pytest.mark.skipif(not Path("/proc/self/mounts").exists(), reason="the system does not tell what is mounted")
def test_run_directory_where_the_kernel_lives(run):
    # Root may write there by its mode bits, and yet nothing can be made.
    problems = found(run.replace(run_dir="/proc/laver/run"))
    assert "run_dir /proc/laver/run: /proc belongs to the kernel's proc, where nothing can be written" in problems


def test_logging_packages(run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    problems = found(run.replace(tensorboard=True, wandb_project="p"))
    assert [problem.split(":")[0] for problem in problems] == [
        "--tensorboard needs the package tensorboard", "--wandb-project needs the package wandb"
    ]  # fmt: skip
    # A dry run may be made elsewhere.
    assert check(Invocation(run.replace(tensorboard=True), dry_run=True, dry_run_world_size=1))


def test_demo_configuration_fits_the_demo(demo_dir, tmp_path):
    demo_yaml = Path(__file__).resolve().parents[3] / "examples" / "demo.yaml"
    paths = [
        "--load", f"hf:{demo_dir}/model", "--encoder", f"{demo_dir}/encoder", "--run-dir", f"{tmp_path}/run",
        "--data-path", f"{demo_dir}/shards/train-*.tar", "--valid-data-path", f"{demo_dir}/shards/valid-*.tar",
    ]  # fmt: skip
    invocation = read_command_line(["--config", str(demo_yaml), *paths])
    check(dataclasses.replace(invocation, dry_run_world_size=4))
    assert invocation.config.objective.mask_ratio >= 0.3
