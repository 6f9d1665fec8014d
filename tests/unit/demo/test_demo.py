import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from laver_megatron.data.index.opening import open_indexes
from laver_megatron.data.read.conversations import parse_conversation
from laver_megatron.data.read.sample_files import SampleFiles
from laver_megatron.demo.make import make_demo
from laver_megatron.demo.photographs import photographs
from tests.programs import run_here

TOOL = Path(__file__).parents[3] / "tools" / "make_demo.py"


def digests(directory):
    # Runs keep the counts of tokens beside the index.
    files = sorted(path for path in directory.rglob("*") if path.is_file() and "counts-" not in path.name)
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_same_bytes_every_time(demo_dir, tmp_path):
    again = make_demo(tmp_path / "again", num_train_samples=96, num_valid_samples=24)
    assert digests(again) == digests(demo_dir)
    assert not list(again.glob(".*"))


def test_what_is_there_is_kept(tmp_path, demo_dir):
    (tmp_path / "model").symlink_to(demo_dir / "model")
    (tmp_path / "shards").symlink_to(demo_dir / "shards")
    before = digests(demo_dir)
    make_demo(tmp_path, num_train_samples=6, num_valid_samples=6)
    assert (tmp_path / "encoder" / "config.json").is_file()
    assert digests(demo_dir) == before


def test_shards_of_another_number_of_samples_are_refused(tmp_path, demo_dir):
    for part in ("model", "encoder"):
        (tmp_path / part).symlink_to(demo_dir / part)
    make_demo(tmp_path, num_train_samples=6, num_valid_samples=6)
    before = digests(tmp_path / "shards")
    done = run_here(TOOL, "--dir", tmp_path, "--num-train-samples", "9")
    assert done.returncode == 2 and "was made with --num-train-samples 6, not 9, --num-valid-samples 6" in done.stderr
    assert digests(tmp_path / "shards") == before


def test_other_encoders(tmp_path, demo_dir):
    for part in ("model", "encoder", "shards"):
        (tmp_path / part).symlink_to(demo_dir / part)
    make_demo(tmp_path, num_train_samples=6, num_valid_samples=6, encoders=["clip", "patches"])
    assert (tmp_path / "encoder_clip" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "encoder_patches" / "config.json").read_text())["model_type"] == "laver_patches"
    done = run_here(TOOL, "--dir", tmp_path, "--encoders", "vit")
    assert done.returncode == 2 and "no demo encoder of kind 'vit'" in done.stderr


def test_other_sizes(tmp_path, demo_dir):
    for part in ("model", "encoder", "shards"):
        (tmp_path / part).symlink_to(demo_dir / part)
    make_demo(tmp_path, models=["32x2", "48x3"])
    for name, width, num_layers in (("32x2", 32, 2), ("48x3", 48, 3)):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"model_{name}")
        assert len(model.model.layers) == num_layers and model.lm_head.weight.shape == (2048, width)
        tokenizers = [path / "tokenizer.json" for path in (tmp_path / f"model_{name}", demo_dir / "model")]
        assert len({path.read_bytes() for path in tokenizers}) == 1
    for size, words in (("40x2", "a multiple of 16"), ("64", "write WIDTHxLAYERS")):
        done = run_here(TOOL, "--dir", tmp_path, "--models", size)
        assert done.returncode == 2 and words in done.stderr
        assert not (tmp_path / f"model_{size}").exists()


def test_the_checkpoint_is_a_qwen(demo_dir):
    config = json.loads((demo_dir / "model" / "config.json").read_text())
    assert config["model_type"] == "qwen2" and config["rope_theta"] == 1e6 and config["tie_word_embeddings"]
    assert config["vocab_size"] % 4 == 0
    tokenizer = AutoTokenizer.from_pretrained(demo_dir / "model")
    model = AutoModelForCausalLM.from_pretrained(demo_dir / "model")
    assert model.config.rope_parameters["rope_theta"] == 1e6
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], return_tensors="pt")["input_ids"]
    assert ids.max() < len(tokenizer) <= config["vocab_size"]
    assert model.generate(ids, max_new_tokens=2).shape[1] <= ids.shape[1] + 2
    with safe_open(demo_dir / "model" / "model.safetensors", "pt") as file:
        assert "model.layers.3.self_attn.q_proj.bias" in file.keys()  # noqa: SIM118
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118


def test_the_template_is_qwens(demo_dir):
    tokenizer = AutoTokenizer.from_pretrained(demo_dir / "model")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    tricky = "Don't  panic:\n\n 1234 naïve 猫 👍🏽 <|image_pad|>\t."
    assert tokenizer.decode(tokenizer(tricky)["input_ids"]) == tricky
    # Qwen2.5 cuts digits one by one.
    assert tokenizer.tokenize("1234") == list("1234")


def test_samples_of_every_kind(demo_dir):
    (index,) = open_indexes(demo_dir / "shards")
    samples = [index.sample(row) for row in range(len(index))]
    assert index.path is not None, "the demo comes with an index"
    assert len(samples) == 96 + 24 and not index.fault_I.any()
    assert {len(sample.images) for sample in samples} == {0, 1, 2}
    assert {member.extension.split(".")[-1] for sample in samples for member in sample.images} == {
        "jpg",
        "png",
    }
    files = SampleFiles()
    contents = [files.read(index.shards[number], s) for number, s in zip(index.shard_I, samples, strict=True)]
    turns = [len(parse_conversation(text, len(pictures), "name").messages) for text, *pictures in contents]
    assert min(turns) == 2 and max(turns) >= 4
    assert len({size for row in range(len(index)) for size in index.image_sizes(row)}) > 50
    texts = {split: {b"".join(content) for s, content in zip(samples, contents, strict=True) if split in s.key}
             for split in ("train", "valid")}  # fmt: skip
    assert len(photographs()) >= 15 and not texts["train"] & texts["valid"]


@pytest.mark.processes
def test_command_line():
    done = subprocess.run([sys.executable, TOOL, "--help"], capture_output=True, text=True, check=True)
    assert "--dir" in done.stdout
