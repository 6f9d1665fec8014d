"""Conversions that must fail: each names file and tensor, and leaves the disk as it was."""

import contextlib
import errno
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from laver_megatron.checkpoint.manifest import check_files, describe, files_of, read_manifest, write_manifest
from laver_megatron.convert import hf_to_megatron as to_megatron_module
from laver_megatron.convert import megatron_to_hf as to_hf_module
from laver_megatron.convert import safetensors_writer, torch_dist
from laver_megatron.convert.command import run_conversion
from laver_megatron.convert.hf_to_megatron import hf_to_megatron
from laver_megatron.convert.megatron_to_hf import megatron_to_hf
from laver_megatron.convert.torch_dist import TorchDistReader
from laver_megatron.hf.tokenizer import load_tokenizer
from tests.attacks import poison_metadata, renew_manifest
from tests.conversions import (
    ROOT,
    assert_same_files,
    assert_same_tensors,
    command,
    copy,
    environment,
    run_tool,
    tensors_of,
    write_laver,
    write_qwen,
)

NORM = "model.layers.1.input_layernorm.weight"
GATE = "model.layers.0.mlp.gate_proj.weight"
KEY = "decoder.layers.0.mlp.linear_fc1.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model and its checkpoint; copied before they are damaged."""
    directory = tmp_path_factory.mktemp("whole")
    write_qwen(directory / "hf")
    write_qwen(directory / "sharded", max_shard_size="60KB")
    hf_to_megatron(directory / "hf", directory / "megatron")
    return directory


@pytest.fixture
def hf(whole, tmp_path):
    return copy(whole / "hf", tmp_path / "hf")


@pytest.fixture
def sharded(whole, tmp_path):
    return copy(whole / "sharded", tmp_path / "hf")


@pytest.fixture
def megatron(whole, tmp_path):
    return copy(whole / "megatron", tmp_path / "megatron")


@pytest.fixture(scope="module")
def laver(tmp_path_factory, demo_dir):
    """(a checkpoint with images, teacher and 2d positions, one without training state)."""
    directory = tmp_path_factory.mktemp("laver")
    for name, training_state in (("whole", True), ("plain", False)):
        source = write_laver(directory / f"{name}-hf", demo_dir, training_state=training_state)
        hf_to_megatron(source, directory / name)
    return directory / "whole", directory / "plain"


def everything(directory):
    """Every path below a directory, with the content of files."""
    return {path: path.read_bytes() if path.is_file() else None for path in directory.rglob("*")}


def refused(convert, source, target, *words, error=ValueError, **options):
    """The conversion fails, says all of `words`, and nothing below the target's directory has changed."""
    top = source.parent if source.parent in target.parents else target.parent
    before = everything(top)
    with pytest.raises(error) as raised:
        convert(source, target, **options)
    for word in words:
        assert str(word) in str(raised.value), f"{word} is not in: {raised.value}"
    after = everything(top)
    assert after.keys() == before.keys(), after.keys() ^ before.keys()
    assert after == before


def change(directory, edit):
    """Rewrites model.safetensors after `edit(tensors)`."""
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


def change_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- Hugging Face directories that are not right ---


@pytest.mark.parametrize("keep", [0, 5, 100, -10])
def test_truncated_safetensors(hf, tmp_path, keep):
    path = hf / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(hf_to_megatron, hf, tmp_path / "out/megatron", path, "damaged")


@pytest.mark.parametrize("header", [b"{not json" + b" " * 7, b"[]" + b" " * 14, b"\xff" * 16])
def test_corrupt_header(hf, tmp_path, header):
    path = hf / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:8] + header + content[8 + len(header) :])
    refused(hf_to_megatron, hf, tmp_path / "out/megatron", path, "damaged")


def test_index_names_a_missing_file(sharded, tmp_path):
    gone = sorted(sharded.glob("model-*.safetensors"))[1]
    gone.unlink()
    refused(hf_to_megatron, sharded, tmp_path / "out", gone.name, sharded / "model.safetensors.index.json")


def test_a_tensor_in_two_files(sharded, tmp_path):
    """transformers would take the last one it reads."""
    first, last = (sorted(sharded.glob("*.safetensors"))[place] for place in (0, -1))
    tensors, name = load_file(last), next(iter(load_file(first)))
    save_file({**tensors, name: load_file(first)[name] + 1}, last)
    refused(hf_to_megatron, sharded, tmp_path / "out", last.name, name, f"the index places it in {first.name}")


def test_a_tensor_that_the_index_does_not_name(sharded, tmp_path):
    last = sorted(sharded.glob("*.safetensors"))[-1]
    save_file({**load_file(last), "model.more": torch.zeros(3)}, last)
    refused(hf_to_megatron, sharded, tmp_path / "out", last.name, "model.more", "the index does not name it")


def test_one_file_and_an_index(sharded, whole, tmp_path):
    """Which of the two is the model? transformers would take the one file."""
    shutil.copy(whole / "hf/model.safetensors", sharded)
    refused(hf_to_megatron, sharded, tmp_path / "out", "model.safetensors and model.safetensors.index.json both")


def test_one_of_several_files_is_truncated(sharded, tmp_path):
    cut = sorted(sharded.glob("model-*.safetensors"))[2]
    cut.write_bytes(cut.read_bytes()[:-3])
    refused(hf_to_megatron, sharded, tmp_path / "out", cut, "damaged")


def test_unreadable_index(sharded, tmp_path):
    path = sharded / "model.safetensors.index.json"
    path.write_text("{")
    refused(hf_to_megatron, sharded, tmp_path / "out", path, "not an index")


def test_missing_tensor(hf, tmp_path):
    change(hf, lambda t: t.pop(NORM))
    refused(hf_to_megatron, hf, tmp_path / "out", hf, NORM, "lacks 1 tensors")


def test_unexpected_tensor(hf, tmp_path):
    change(hf, lambda t: t.update({"model.layers.2.input_layernorm.weight": t[NORM].clone()}))
    refused(hf_to_megatron, hf, tmp_path / "out", hf / "model.safetensors", "model.layers.2.input_layernorm.weight")


def test_a_head_beside_embeddings_that_are_not_tied(hf, tmp_path):
    change_json(hf / "config.json", tie_word_embeddings=False)
    change(hf, lambda t: t.pop("lm_head.weight"))
    refused(hf_to_megatron, hf, tmp_path / "out", "lm_head.weight", hf / "config.json")


@pytest.mark.parametrize("change_head", [lambda head: head * 2, lambda head: head[1:]])
def test_a_head_that_is_not_the_tied_embedding(tmp_path, change_head):
    """transformers does not tie such a head, so leaving it out would make another model."""
    source = write_qwen(tmp_path / "hf", tied=True)

    def add_head(tensors):
        tensors["lm_head.weight"] = change_head(tensors["model.embed_tokens.weight"]).clone()

    change(source, add_head)
    words = "model.safetensors", "lm_head.weight", "config.json", "tie_word_embeddings"
    refused(hf_to_megatron, source, tmp_path / "out", *words)


@pytest.mark.parametrize("number", [0, -1, float("nan")])
def test_file_sizes_that_are_none(megatron, tmp_path, number):
    refused(megatron_to_hf, megatron, tmp_path / "out", "max-file-bytes", str(number), max_file_bytes=number)


@pytest.mark.parametrize("size", [(63,), (64, 1), (65,)])
def test_wrong_shape(hf, tmp_path, size):
    change(hf, lambda t: t.update({NORM: torch.ones(size)}))
    refused(hf_to_megatron, hf, tmp_path / "out", hf / "model.safetensors", NORM, size, (64,))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64])
def test_types_that_are_no_weights(hf, tmp_path, dtype):
    change(hf, lambda t: t.update({GATE: t[GATE].to(dtype)}))
    refused(hf_to_megatron, hf, tmp_path / "out", hf / "model.safetensors", GATE, "quantised")


def test_parts_of_one_tensor_in_two_types(hf, tmp_path):
    change(hf, lambda t: t.update({GATE: t[GATE].half()}))
    refused(hf_to_megatron, hf, tmp_path / "out", hf, GATE, "float16", "float32")


@pytest.mark.parametrize("model_type", ["llama", "qwen2_vl", None])
def test_another_architecture(hf, tmp_path, model_type):
    change_json(hf / "config.json", model_type=model_type)
    refused(hf_to_megatron, hf, tmp_path / "out", hf / "config.json", repr(model_type), "qwen2")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickles_alone(hf, tmp_path, name):
    (hf / "model.safetensors").rename(hf / name)
    refused(hf_to_megatron, hf, tmp_path / "out", hf, name, "save_pretrained")


def test_no_config(hf, tmp_path):
    (hf / "config.json").unlink()
    refused(hf_to_megatron, hf, tmp_path / "out", hf, "config.json")


def test_no_such_directory(tmp_path):
    refused(hf_to_megatron, tmp_path / "nothing", tmp_path / "out", tmp_path / "nothing", "no such directory")
    refused(megatron_to_hf, tmp_path / "nothing", tmp_path / "out", tmp_path / "nothing", "not a checkpoint")


def test_a_damaged_training_state(laver, tmp_path):
    megatron_to_hf(laver[0], tmp_path / "hf", training_state=True)
    path = tmp_path / "hf/training_state.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    refused(hf_to_megatron, tmp_path / "hf", tmp_path / "out", path, "damaged")
    path.write_bytes(content)
    tensors = load_file(path)
    save_file({name: t for name, t in tensors.items() if name != "mask_token"}, path)
    refused(hf_to_megatron, tmp_path / "hf", tmp_path / "out", "mask_token")


# --- values that are not finite ---


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite(hf, tmp_path, capsys, value):
    """Copied with a warning that names them, or an error with --strict; in both directions."""

    def spoil(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4:6] = value

    change(hf, spoil)
    path, name = hf / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    refused(hf_to_megatron, hf, tmp_path / "out", path, name, "2 NaN or infinite", "--strict", strict=True)
    capsys.readouterr()
    hf_to_megatron(hf, tmp_path / "megatron")
    said = capsys.readouterr().err
    assert f"warning: {path}, tensor {name}, holds 2 NaN or infinite values" in said

    key = "decoder.layers.1.mlp.linear_fc1.weight"
    refused(megatron_to_hf, tmp_path / "megatron", tmp_path / "out", key, "2 NaN or infinite", "--strict", strict=True)
    capsys.readouterr()
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    said = capsys.readouterr().err
    assert said.count("warning: ") == 1
    assert f"{tmp_path / 'megatron'}, tensor {key}, holds 2 NaN or infinite values" in said
    spoilt = tensors_of(tmp_path / "back")[name]
    assert torch.equal(spoilt.view(torch.int32), tensors_of(hf)[name].view(torch.int32))


def test_large_values_are_no_warning(hf, tmp_path, capsys):
    """Sums beyond the type's range are not taken for values that are."""
    largest = torch.finfo(torch.float16).max
    change(hf, lambda t: t.update({name: tensor.half() for name, tensor in t.items()}))
    change(hf, lambda t: t.update({NORM: torch.full((64,), largest, dtype=torch.float16)}))
    hf_to_megatron(hf, tmp_path / "megatron", strict=True)
    assert "warning" not in capsys.readouterr().err


# --- Megatron checkpoints that are not right ---


def change_metadata(directory, edit):
    path = directory / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    edit(metadata)
    path.write_bytes(pickle.dumps(metadata))
    renew_manifest(directory)


@pytest.mark.processes
def test_no_flipped_byte_passes(whole, megatron, tmp_path):
    """At many places of a file: an error that names the file, or a byte without meaning and the same tensors."""
    path = megatron / "__0_0.distcp"
    content = path.read_bytes()
    expected, num_refused = tensors_of(whole / "hf"), 0
    places = random.Random(1)
    for _ in range(40):
        damaged = bytearray(content)
        damaged[places.randrange(len(content))] ^= 1 << places.randrange(8)
        path.write_bytes(damaged)
        try:
            megatron_to_hf(megatron, tmp_path / "out", overwrite=True)
        except ValueError as error:
            assert str(path) in str(error) and "damaged" in str(error), str(error)
            num_refused += 1
        else:
            assert_same_tensors(tensors_of(tmp_path / "out"), expected)
    assert num_refused > 20, "most bytes of the file are values"


def test_flipped_byte_of_a_value(megatron, tmp_path):
    boxes = TorchDistReader(megatron)._boxes
    box = boxes[KEY][0]
    content = bytearray((megatron / box.file).read_bytes())
    content[box.start + box.length // 2] ^= 1
    (megatron / box.file).write_bytes(content)
    refused(megatron_to_hf, megatron, tmp_path / "out", megatron / box.file, KEY, "checksum")


def test_truncated_distcp(megatron, tmp_path):
    path = megatron / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-100])
    refused(megatron_to_hf, megatron, tmp_path / "out", path, "the manifest says")
    renew_manifest(megatron)
    refused(megatron_to_hf, megatron, tmp_path / "out", path, "damaged", "output_layer.weight")
    path.write_bytes(b"")
    renew_manifest(megatron)
    refused(megatron_to_hf, megatron, tmp_path / "out", path, "cannot be read")


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "hf/config.json", "run.json"])
def test_missing_file(megatron, tmp_path, name):
    (megatron / name).unlink()
    expected = (megatron, "not a checkpoint") if name == "hf/config.json" else (megatron / name, "missing")
    refused(megatron_to_hf, megatron, tmp_path / "out", *expected)


def test_a_file_that_no_manifest_misses(megatron, tmp_path):
    (megatron / "__0_0.distcp").unlink()
    renew_manifest(megatron)
    refused(megatron_to_hf, megatron, tmp_path / "out", megatron / "__0_0.distcp", ".metadata names it")


@pytest.mark.parametrize("name", [".metadata", "hf/config.json", "run.json", "common.pt"])
def test_flipped_byte_of_a_small_file(megatron, tmp_path, name):
    content = bytearray((megatron / name).read_bytes())
    content[len(content) // 2] ^= 1
    (megatron / name).write_bytes(content)
    refused(megatron_to_hf, megatron, tmp_path / "out", megatron / name, "damaged")


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps({"a": 1})])
def test_unreadable_metadata(megatron, tmp_path, content):
    (megatron / ".metadata").write_bytes(content)
    renew_manifest(megatron)
    refused(megatron_to_hf, megatron, tmp_path / "out", megatron, ".metadata cannot be read")


def test_metadata_that_run_code(megatron, tmp_path):
    path = poison_metadata(megatron, tmp_path / "made")
    refused(megatron_to_hf, megatron, tmp_path / "out", path, "names posix.mkdir")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_manifest(megatron, tmp_path, content):
    path = megatron / "manifest.json"
    path.unlink() if content is None else path.write_text(content)
    refused(megatron_to_hf, megatron, tmp_path / "out", megatron, "manifest.json")


def test_missing_key(megatron, tmp_path):
    change_metadata(megatron, lambda m: m.state_dict_metadata.pop(KEY))
    refused(megatron_to_hf, megatron, tmp_path / "out", megatron, KEY, "lacks 1 tensors")


def test_unknown_key(megatron, tmp_path):
    def add(metadata):
        metadata.state_dict_metadata["decoder.layers.9.mlp.router.weight"] = metadata.state_dict_metadata[KEY]
        for index, stored in list(metadata.storage_data.items()):
            if index.fqn == KEY:
                other = type(index)("decoder.layers.9.mlp.router.weight", index.offset, index.index)
                metadata.storage_data[other] = stored

    change_metadata(megatron, add)
    refused(megatron_to_hf, megatron, tmp_path / "out", megatron, "decoder.layers.9.mlp.router.weight", "no place")


def test_sizes_of_another_model(megatron, tmp_path):
    change_json(megatron / "hf/config.json", intermediate_size=81)
    renew_manifest(megatron)
    refused(megatron_to_hf, megatron, tmp_path / "out", megatron, KEY, (160, 64), (162, 64))


def test_boxes_that_are_not_what_the_metadata_says(megatron, tmp_path):
    """Two tensors of one size and type in each other's place cannot be seen; another size can."""

    def exchange(metadata):
        places = metadata.storage_data
        one, other = (next(i for i in places if i.fqn == key) for key in (KEY, "embedding.word_embeddings.weight"))
        places[one], places[other] = places[other], places[one]

    change_metadata(megatron, exchange)
    refused(megatron_to_hf, megatron, tmp_path / "out", megatron / "__0_0.distcp", ".metadata says", "tensor")


# --- what a checkpoint has not ---


def test_parts_that_are_not_there(megatron, laver, tmp_path):
    out, plain = tmp_path / "out", laver[1]
    refused(megatron_to_hf, megatron, out, megatron, "no teacher", weights="teacher")
    refused(megatron_to_hf, plain, out, plain, "no teacher", weights="teacher")
    refused(megatron_to_hf, megatron, out, megatron, "--training-state", training_state=True)
    refused(megatron_to_hf, plain, out, plain, "--training-state", training_state=True)
    for format in ("llava", "laver"):
        refused(megatron_to_hf, megatron, out, megatron, "text only", f"--format {format}", format=format)
    refused(megatron_to_hf, laver[0], out, "student", weights="teacher", training_state=True)
    refused(megatron_to_hf, laver[0], out, "'both'", weights="both")


def test_llava_has_no_2d_positions(laver, tmp_path):
    refused(megatron_to_hf, laver[0], tmp_path / "out", "2d", "--format laver", format="llava")
    refused(megatron_to_hf, laver[0], tmp_path / "out", "format is 'onnx'; choose from laver, llava", format="onnx")


# --- full disks ---


@pytest.mark.parametrize("convert", [hf_to_megatron, megatron_to_hf])
def test_too_little_space_is_known_beforehand(whole, tmp_path, monkeypatch, convert):
    source = whole / ("hf" if convert is hf_to_megatron else "megatron")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(convert, source, tmp_path / "out/of/space", tmp_path / "out/of/space", "0.00 GB left")


def failing_after(number, function):
    """The function, until it has been called `number` times; then as on a full disk."""
    calls = []

    def call(*args, **kwargs):
        calls.append(args)
        if len(calls) > number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("number", [0, 3, 10])
def test_the_disk_is_full_in_the_middle(whole, tmp_path, monkeypatch, number):
    words = ("No space left",)
    with monkeypatch.context() as patch:
        patch.setattr(torch_dist.torch, "save", failing_after(number, torch.save))
        refused(hf_to_megatron, whole / "hf", tmp_path / "a/megatron", *words, error=OSError)
    with monkeypatch.context() as patch:
        patch.setattr(safetensors_writer.os, "pwrite", failing_after(number, os.pwrite))
        refused(megatron_to_hf, whole / "megatron", tmp_path / "a/hf", *words, error=OSError, num_threads=2)


@pytest.mark.parametrize("name", ["write_manifest", "write_metadata", "copy_model_files"])
def test_the_disk_is_full_at_the_end(whole, tmp_path, monkeypatch, name):
    monkeypatch.setattr(to_megatron_module, name, failing_after(0, None))
    refused(hf_to_megatron, whole / "hf", tmp_path / "a/megatron", "No space left", error=OSError)


@pytest.mark.processes
def test_files_that_the_system_does_not_let_grow(whole, tmp_path):
    """A real error of writing, in the middle of a tensor, as a program's user sees it."""
    limit = 60_000  # bytes of a file: some tensors fit

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    for tool, file, *arguments in (
        ("hf_to_megatron", ".a.incomplete/__0_0.distcp", "--hf", whole / "hf", "--megatron", tmp_path / "out/a"),
        (
            "megatron_to_hf",
            ".b.incomplete/model.safetensors",
            "--megatron",
            whole / "megatron",
            "--hf",
            tmp_path / "out/b",
        ),
    ):
        done = subprocess.run(
            command(tool, *arguments), env=environment(), capture_output=True, text=True, preexec_fn=limited, timeout=60
        )
        assert done.returncode == 1, done.stderr
        assert "File too large: " in done.stderr and file in done.stderr
        assert "Traceback" not in done.stderr
        assert list(tmp_path.iterdir()) == []


# --- exports and checkpoints that somebody has changed ---


@pytest.fixture
def export(tmp_path, demo_dir):
    return write_laver(tmp_path / "export", demo_dir)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"positions": "3d"}, "positions is '3d', but must be one of 2d, 1d, mrope"),
        ({"positions": [1]}, "positions is [1], but must be one of"),
        ({"attention": "full"}, "attention is 'full', but must be one of mixed, causal"),
        ({"attention": None}, "does not say attention"),
        ({"vision_feature_layer": 50}, "vision_feature_layer is 50, but must be from -"),
        ({"vision_feature_layer": "-2"}, "vision_feature_layer is '-2', but must be from"),
        ({"vision_feature_layer": None}, "does not say vision_feature_layer"),
        ({"image_token_id": 7}, "image_token_id is 7, but <|image_pad|> is "),
        ({"image_token_id": None}, "image_token_id is None, but"),
        # What is left out is what transformers assumes.
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "but the encoder of config.json takes 224 x 224"),
    ],
)
def test_settings_of_an_export(export, tmp_path, changes, words):
    change_json(export / "config.json", **changes)
    refused(hf_to_megatron, export, tmp_path / "out", "config.json", words)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"hidden_size": "64"}, "hidden_size missing from the vision model's settings"),
        ({"image_size": None}, "image_size missing"),
        ({"image_size": [64, 64]}, "image_size missing"),
        ({"patch_size": 0}, "patch_size missing"),
        ({"num_attention_heads": 7}, "hidden_size 64 is not a multiple of num_attention_heads 7"),
    ],
)
def test_vision_settings_of_an_export(export, tmp_path, changes, words):
    vision = json.loads((export / "config.json").read_text())["vision_config"]
    change_json(export / "config.json", vision_config={**vision, **changes})
    refused(hf_to_megatron, export, tmp_path / "out", "config.json", words)


COMPANIONS = [
    ("preprocessor_config.json", None, "no preprocessor_config.json"),
    ("chat_template.jinja", None, "no chat template"),
    ("tokenizer.json", None, "no tokenizer in it"),
    ("tokenizer.json", "{}", "tokenizer.json: cannot be read as a tokenizer"),
    ("tokenizer.json", '{"added_tokens": []}', "no <|vision_start|>, <|image_pad|>, <|vision_end|>"),
]


@pytest.mark.parametrize("name, content, words", COMPANIONS)
def test_an_export_needs_its_companions(export, tmp_path, name, content, words):
    remove(export, name, content)
    refused(hf_to_megatron, export, tmp_path / "out", words)


@pytest.mark.parametrize("name, content, words", COMPANIONS)
def test_a_checkpoint_with_images_needs_its_companions(laver, tmp_path, name, content, words):
    checkpoint = copy(laver[0], tmp_path / "checkpoint")
    remove(checkpoint / ("encoder" if name == "preprocessor_config.json" else "hf"), name, content)
    write_manifest(checkpoint, {str(path.relative_to(checkpoint)): describe(path) for path in files_of(checkpoint)})
    refused(megatron_to_hf, checkpoint, tmp_path / "out", words)


def remove(directory, name, content):
    """Takes a file away, or leaves other content in it; a tokenizer and a template stand in several."""
    for other in (
        name,
        *{"tokenizer.json": ("vocab.json",), "chat_template.jinja": ("chat_template.json",)}.get(name, ()),
    ):
        (directory / other).unlink(missing_ok=True)
    if name == "chat_template.jinja":
        change_json(directory / "tokenizer_config.json", chat_template=None)
    if content is not None:
        (directory / name).write_text(content)


def test_training_states(export, tmp_path):
    """Each names the tensor; a file of another name beside it is nobody's."""
    path, head = export / "training_state.safetensors", "vision_head.linear_3.weight"
    tensors = load_file(path)
    shutil.copy(path, export / "training_state.safetensors.bak")
    shutil.copy(path, export / "training_state_old.safetensors")
    hf_to_megatron(export, tmp_path / "fine")
    save_file({**tensors, head: tensors[head].flatten().clone()}, path)
    refused(hf_to_megatron, export, tmp_path / "out", head, "not a matrix")
    save_file({name: tensor for name, tensor in tensors.items() if name != head}, path)
    refused(hf_to_megatron, export, tmp_path / "out", "training state", f"lacks {head}")
    save_file({**tensors, "teacher.more": torch.zeros(2)}, path)
    refused(hf_to_megatron, export, tmp_path / "out", "teacher.more", "has no place in the training state of")


def test_an_export_s_tokenizer_runs_no_code_of_it(export, monkeypatch):
    """transformers would ask whether to run it, on every rank of a run."""

    def ask(*_):
        raise AssertionError("asked to run code")

    monkeypatch.setattr("builtins.input", ask)
    (export / "modeling_laver.py").write_text("raise AssertionError('was run')")
    assert load_tokenizer(export).convert_tokens_to_ids("<|image_pad|>") > 0


def test_a_run_directory_is_told_where_its_checkpoints_are(whole, tmp_path):
    copy(whole / "megatron", tmp_path / "run/checkpoints/iter_0000003")
    refused(megatron_to_hf, tmp_path / "run", tmp_path / "out", f"{tmp_path / 'run/checkpoints'} does")


# --- targets ---


@pytest.mark.parametrize("convert", [hf_to_megatron, megatron_to_hf])
def test_overwrite(whole, tmp_path, convert):
    source = copy(whole / ("hf" if convert is hf_to_megatron else "megatron"), tmp_path / "source")
    out = tmp_path / "deep/er/out"
    convert(source, out)
    copy(out, tmp_path / "expected")
    refused(convert, source, out, out, "--overwrite")
    (out / "model-00007-of-00009.safetensors" if convert is megatron_to_hf else out / "__9_0.distcp").write_text("")
    convert(source, out, overwrite=True)
    assert_same_files(out, tmp_path / "expected")
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_overwrite_spares_what_is_no_directory_of_weights(whole, tmp_path):
    hf, out = whole / "hf", tmp_path / "out"
    out.mkdir()
    refused(hf_to_megatron, hf, out, out, "exists")
    hf_to_megatron(hf, out, overwrite=True)  # an empty one
    (tmp_path / "things").mkdir()
    (tmp_path / "things/notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(out)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("things", "file", "link", "dangling"):
        refused(hf_to_megatron, hf, tmp_path / name, tmp_path / name, "exists")
        refused(hf_to_megatron, hf, tmp_path / name, tmp_path / name, "not a directory of weights", overwrite=True)
    refused(hf_to_megatron, hf, tmp_path / "file/out", "not a directory that you may write to")


def test_overwrite_spares_what_only_looks_like_weights(whole, tmp_path):
    """A project and a web page with files of these names, weights with notes beside them, a run's own checkpoint."""
    project, page, noted, trained = (tmp_path / name for name in ("project", "page", "noted", "run/iter_0000003"))
    for directory, files in ((project, ("config.json", "src/thesis.txt")), (page, ("manifest.json", "app.js"))):
        for file in files:
            (directory / file).parent.mkdir(parents=True, exist_ok=True)
            (directory / file).write_text("{}")
    copy(whole / "hf", noted)
    (noted / "notes.txt").write_text("mine")
    copy(whole / "megatron", trained)
    change_json(trained / "run.json", weights_only=False)
    for directory, words in (
        (project, "holds other things than weights (src)"),
        (page, "is not a converted checkpoint"),
        (noted, "holds other things than weights (notes.txt)"),
        (trained, "a run may resume from it"),
    ):
        refused(megatron_to_hf, whole / "megatron", directory, directory, words, overwrite=True)


def test_the_working_directory_is_not_replaced(whole, tmp_path, monkeypatch):
    hf_to_megatron(whole / "hf", tmp_path / "out")
    for inside in ("out", "out/hf"):
        monkeypatch.chdir(tmp_path / inside)
        refused(hf_to_megatron, whole / "hf", tmp_path / "out", "the working directory", overwrite=True)


def test_a_relative_target_means_what_it_meant_at_the_start(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finish = to_megatron_module.write_manifest

    def finish_elsewhere(*arguments):
        finish(*arguments)
        monkeypatch.chdir("/")

    monkeypatch.setattr(to_megatron_module, "write_manifest", finish_elsewhere)
    hf_to_megatron(whole / "hf", Path("out"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_places_where_nothing_can_be_made(whole, tmp_path):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    refused(hf_to_megatron, whole / "hf", tmp_path / "dangling/out", "dangling is a link to nowhere")
    with pytest.raises(ValueError, match="belongs to the kernel's proc"):
        hf_to_megatron(whole / "hf", Path("/proc/out"))


def test_too_many_open_files(whole, tmp_path, monkeypatch):
    """What was opened before is closed again, so that the directory can be removed anywhere."""
    opened, closed, open_file, close_file = [], [], os.open, os.close

    def open_two(path, *arguments, **options):
        if str(path).endswith(".safetensors"):
            if len(opened) == 2:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
            opened.append(open_file(path, *arguments, **options))
            return opened[-1]
        return open_file(path, *arguments, **options)

    def close(handle):
        closed.append(handle)
        close_file(handle)

    monkeypatch.setattr(safetensors_writer.os, "open", open_two)
    monkeypatch.setattr(safetensors_writer.os, "close", close)
    words = "Too many open files", "model-00003-of-"
    refused(megatron_to_hf, whole / "megatron", tmp_path / "out", *words, error=OSError, max_file_bytes=1)
    assert set(opened) <= set(closed)


def test_a_failure_spares_what_it_would_have_replaced(whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    hf_to_megatron(whole / "hf", out)
    with monkeypatch.context() as patch:
        patch.setattr(torch_dist.torch, "save", failing_after(2, torch.save))
        refused(hf_to_megatron, whole / "hf", out, "No space left", error=OSError, overwrite=True)
    replace = os.replace

    def fail_to_put_in_place(source, target):
        if str(source).endswith(".incomplete"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_to_put_in_place)
    refused(hf_to_megatron, whole / "hf", out, "Input/output error", error=OSError, overwrite=True)


def test_targets_in_and_around_the_input(whole, tmp_path):
    around = tmp_path / "around"  # so that nothing but it lies beside the targets
    hf, megatron = (copy(whole / name, around / name) for name in ("hf", "megatron"))
    (around / "link").symlink_to(hf)
    for overwrite in (False, True):
        for target in (hf, hf / "inside", hf / "a/b", around, around / "link", around / "link/inside"):
            refused(hf_to_megatron, hf, target, target, "which is read", overwrite=overwrite)
        for target in (megatron, megatron / "hf", around):
            refused(megatron_to_hf, megatron, target, target, "which is read", overwrite=overwrite)


def test_a_checkpoints_folder_is_protected_with_its_newest(whole, tmp_path):
    folder = tmp_path / "run/checkpoints"
    folder.mkdir(parents=True)
    copy(whole / "megatron", folder / "iter_0000003")
    (folder / "latest").write_text("3")
    for target in (folder / "iter_0000003", folder / "out", tmp_path / "run"):
        refused(megatron_to_hf, folder, target, target, "which is read", overwrite=True)
    megatron_to_hf(folder, tmp_path / "out")
    assert_same_tensors(tensors_of(tmp_path / "out"), tensors_of(whole / "hf"))


def test_a_target_that_appears_meanwhile_is_not_replaced(whole, tmp_path, monkeypatch):
    finish, out = to_megatron_module._finish, tmp_path / "out"

    def finish_late(*args):
        finish(*args)
        out.mkdir()
        (out / "config.json").write_text("of another conversion")

    monkeypatch.setattr(to_megatron_module, "_finish", finish_late)
    with pytest.raises(ValueError, match="meanwhile"):
        hf_to_megatron(whole / "hf", out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["config.json"]


def test_a_killed_conversion_is_not_mistaken_for_nothing(whole, tmp_path):
    """What it left is named and stays: it might be another conversion's."""
    (tmp_path / ".out.incomplete").mkdir()
    refused(hf_to_megatron, whole / "hf", tmp_path / "out", tmp_path / ".out.incomplete", "remove it")


# --- exit status ---


@pytest.mark.parametrize(
    "error, status, words",
    [
        (ValueError("wrong input"), 2, "error: wrong input"),
        (OSError(errno.ENOSPC, "No space left"), 1, "No space left"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_exit_status(capsys, monkeypatch, error, status, words):
    def fail():
        raise error

    monkeypatch.setattr("os._exit", sys.exit)
    with pytest.raises(SystemExit) as raised:
        run_conversion(fail)
    assert raised.value.code == status
    assert words in capsys.readouterr().err


@pytest.mark.processes
def test_programs_say_one_line(tmp_path):
    for tool, *arguments in (
        ("hf_to_megatron", "--hf", tmp_path / "no", "--megatron", tmp_path / "out"),
        ("megatron_to_hf", "--megatron", tmp_path / "no", "--hf", tmp_path / "out"),
    ):
        done = run_tool(tool, *arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, done.stderr


# --- signals, and two at once ---


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """A model of 0.8 GB (of zeros: its file takes no room) that takes seconds to convert, and its checkpoint."""
    directory = tmp_path_factory.mktemp("slow")
    sizes = {"vocab_size": 100_000, "hidden_size": 1024, "intermediate_size": 64, "num_hidden_layers": 1}
    source = directory / "hf"
    write_qwen(source, **{**sizes, "vocab_size": 8})
    change_json(source / "config.json", **sizes)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors_of(source).items()}
    places = [
        safetensors_writer.TensorPlace(name, (100_000, 1024) if size[0] == 8 else size, torch.float32)
        for name, size in sorted(shapes.items())
    ]
    safetensors_writer.create_files([safetensors_writer.plan_safetensors(places, "model", 5_000_000_000)], source)
    hf_to_megatron(source, directory / "megatron", num_threads=1)
    yield directory
    shutil.rmtree(directory)


@contextlib.contextmanager
def started(directory, tool, target):
    """The tool, once it has begun to write."""
    source, options = directory / ("hf" if tool == "hf_to_megatron" else "megatron"), ("--num-threads", "1")
    names = (
        ("--hf", source, "--megatron", target) if tool == "hf_to_megatron" else ("--megatron", source, "--hf", target)
    )
    process = subprocess.Popen(
        command(tool, *names, *options), env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        incomplete, deadline = target.with_name(f".{target.name}.incomplete"), time.monotonic() + 60
        while not (incomplete.is_dir() and any(incomplete.iterdir())):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.005)
        yield process
    finally:
        process.kill()
        process.communicate()


OTHER_TOOL = pytest.mark.slow(reason="signals that the other tool is sent")


@pytest.mark.processes
@pytest.mark.parametrize(
    "tool, signals",
    [
        ("hf_to_megatron", ["SIGTERM"]),
        ("megatron_to_hf", ["SIGHUP"]),
        ("hf_to_megatron", ["SIGINT", "SIGTERM", "SIGINT"]),
        pytest.param("megatron_to_hf", ["SIGINT"], marks=OTHER_TOOL),
        pytest.param("megatron_to_hf", ["SIGTERM", "SIGTERM"], marks=OTHER_TOOL),
    ],
    ids=str,
)
def test_stopped_in_the_middle(slow, tmp_path, tool, signals):
    """Also by a second signal while it tidies up, as under torchrun, which passes on what the terminal has sent."""
    with started(slow, tool, tmp_path / "new/out") as process:
        for number in signals:
            process.send_signal(getattr(signal, number))
            time.sleep(0.05)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130, said
        assert "stopped" in said and "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def own_memory(process):
    """Bytes that the process holds itself, mapped files not counted; 0 once it has ended."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon"))


@pytest.mark.processes
@pytest.mark.parametrize("tool", ["hf_to_megatron", "megatron_to_hf"])
def test_memory_is_what_a_dry_run_says(slow, tmp_path, capsys, tool):
    """Some blocks of rows, where each of the two large tensors has 410 MB."""
    if tool == "hf_to_megatron":
        hf_to_megatron(slow / "hf", tmp_path / "out", dry_run=True, num_threads=1)
    else:
        megatron_to_hf(slow / "megatron", tmp_path / "out", dry_run=True, num_threads=1)
    said = capsys.readouterr().out
    bound = int(re.search(r"at most (\d+) MB", said).group(1)) * 1e6
    assert bound < 0.8 * 410e6
    with started(slow, tool, tmp_path / "out") as process:
        before = most = own_memory(process)
        while process.poll() is None:
            most = max(most, own_memory(process))
            time.sleep(0.01)
        assert process.returncode == 0
    shutil.rmtree(tmp_path / "out")
    assert before > 0 and most - before <= bound


@pytest.mark.processes
def test_two_at_once(slow, tmp_path):
    """The second is refused and does not disturb the first."""
    with started(slow, "hf_to_megatron", tmp_path / "out") as process:
        second = run_tool("hf_to_megatron", "--hf", slow / "hf", "--megatron", tmp_path / "out")
        assert second.returncode == 2, second.stderr
        # On a busy machine the first may be through before the second has begun.
        assert "another conversion is writing it" in second.stderr or "--overwrite" in second.stderr
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    check_files(tmp_path / "out", read_manifest(tmp_path / "out").items())
    assert_same_files(tmp_path / "out", slow / "megatron")
    shutil.rmtree(tmp_path / "out")


# --- torchrun ---

FAILING_RANK = """
import errno, os, runpy, sys
from laver_megatron.convert import hf_to_megatron, megatron_to_hf, safetensors_writer, torch_dist
hf_to_megatron.FILE_BYTES = 20_000  # several files, so that every rank has some
tool, what = sys.argv[1:3]
def fail(*args, **kwargs):
    raise (ValueError("cannot be opened") if what == "open" else OSError(errno.ENOSPC, "No space left on device"))
if os.environ["RANK"] == "1":
    if what == "open":
        hf_to_megatron.open_source = megatron_to_hf.open_checkpoint = fail
    else:
        torch_dist.torch.save = safetensors_writer.os.pwrite = fail
sys.argv[1:] = sys.argv[3:]
runpy.run_path(tool, run_name="__main__")
"""


@pytest.mark.processes
@pytest.mark.parametrize(
    "tool, what, words",
    [
        ("hf_to_megatron", "open", "cannot be opened"),
        pytest.param(
            "hf_to_megatron",
            "write",
            "rank 1: OSError: [Errno 28] No space left on device",
            marks=pytest.mark.slow(reason="the other tool's files are written and agreed on alike"),
        ),
        ("megatron_to_hf", "write", "rank 1: OSError: [Errno 28] No space left on device"),
    ],
)
def test_a_failure_on_one_rank_ends_both(whole, tmp_path, tool, what, words):
    program = tmp_path / "failing.py"
    program.write_text(FAILING_RANK)
    hf, megatron, out = whole / "hf", whole / "megatron", tmp_path / "new/out"
    names = ("--hf", hf, "--megatron", out) if tool == "hf_to_megatron" else ("--megatron", megatron, "--hf", out)
    begun = time.monotonic()
    done = run_tool(str(program), ROOT / f"tools/{tool}.py", what, *names, num_processes=2)
    assert done.returncode != 0 and words in done.stderr, done.stderr
    assert time.monotonic() - begun < 60, "a rank that waits for another one waits for half an hour"
    assert [path.name for path in tmp_path.iterdir()] == ["failing.py"]


def test_the_damage_was_done_to_copies(whole):
    check_files(whole / "megatron", read_manifest(whole / "megatron").items())
    assert to_hf_module.open_checkpoint(whole / "megatron").weights
