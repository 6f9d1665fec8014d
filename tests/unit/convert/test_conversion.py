"""Hugging Face -> Megatron -> Hugging Face: nothing changes, whatever the files and however the work is divided."""

import io
import json
import random
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as torch_checkpoint
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlavaForConditionalGeneration

from laver_megatron.checkpoint.directory import is_converted
from laver_megatron.checkpoint.manifest import check_files, read_manifest
from laver_megatron.convert import hf_to_megatron as to_megatron_module
from laver_megatron.convert import megatron_to_hf as to_hf_module
from laver_megatron.convert.hf_to_megatron import hf_to_megatron, open_source
from laver_megatron.convert.megatron_to_hf import megatron_to_hf
from laver_megatron.convert.safetensors_writer import SafetensorsWriter, TensorPlace, create_files, plan_safetensors
from laver_megatron.convert.torch_dist import Box, TorchDistReader, write_box, write_metadata
from tests.conversions import (
    VISION_HEAD,
    assert_same_files,
    assert_same_tensors,
    run_tool,
    tensors_of,
    write_laver,
    write_qwen,
)

SMALL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
    "chat_template.jinja",
)  # fmt: skip


def there_and_back(source, directory, **options):
    """Both conversions, into `directory`/megatron and `directory`/back."""
    hf_to_megatron(source, directory / "megatron")
    megatron_to_hf(directory / "megatron", directory / "back", **options)
    return directory / "back"


# --- a text-only Qwen2.5 ---


@pytest.mark.parametrize("max_shard_size, max_file_bytes", [("5GB", 5e9), ("60KB", 5e9), ("60KB", 50_000)])
@pytest.mark.parametrize(
    "tied, num_key_value_heads, dtype",
    [(True, 2, torch.bfloat16), (False, 2, torch.float32), (False, 4, torch.bfloat16), (True, 8, torch.float32)],
)
def test_round_trip(tmp_path, tied, num_key_value_heads, dtype, max_shard_size, max_file_bytes):
    source = write_qwen(
        tmp_path / "hf",
        tied=tied,
        num_key_value_heads=num_key_value_heads,
        dtype=dtype,
        max_shard_size=max_shard_size,
    )
    back = there_and_back(source, tmp_path, max_file_bytes=max_file_bytes)
    assert ("lm_head.weight" in tensors_of(source)) == (not tied)
    assert_same_tensors(tensors_of(back), tensors_of(source))
    for name in SMALL_FILES:
        assert (back / name).read_bytes() == (source / name).read_bytes(), name
    files = sorted(path.name for path in back.glob("*.safetensors*"))
    assert (files == ["model.safetensors"]) == (max_file_bytes == 5e9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf", "megatron"]


@torch.no_grad()
def test_sharded_output_loads_in_transformers(tmp_path):
    """The index names the right file for each tensor, and transformers computes the same with the result."""
    source = write_qwen(tmp_path / "hf")
    (source / "tokenizer_config.json").unlink()  # what the other tests have there is no JSON
    (source / "tokenizer.json").unlink()
    back = there_and_back(source, tmp_path, max_file_bytes=50_000)
    index = json.loads((back / "model.safetensors.index.json").read_text())
    tensors = tensors_of(source)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    files = sorted(path.name for path in back.glob("*.safetensors"))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert set(index["weight_map"].values()) == set(files) and len(files) > 2
    for file in files:
        with safe_open(back / file, framework="pt") as content:
            assert {name for name, f in index["weight_map"].items() if f == file} == set(content.keys())
            sizes = [content.get_tensor(name).nbytes for name in content.keys()]  # noqa: SIM118
            assert sum(sizes) <= 50_000 or len(sizes) == 1
    words = torch.arange(40).view(2, 20)
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (source, back)]
    logits = [model(words).logits for model in models]
    assert_same_tensors(tensors_of(back), tensors)
    # Loaded from other files, the same weights lie otherwise in memory, and kernels sum in another order there.
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
    assert logits[0].std() > 0.1


@pytest.mark.parametrize("num_threads", [1, 3])
def test_blocks_smaller_than_a_tensor(tmp_path, monkeypatch, num_threads):
    """Tensors in several boxes, checkpoints in several files, rows of one tensor from several blocks."""
    source = write_qwen(tmp_path / "hf", num_key_value_heads=4, dtype=torch.bfloat16)
    monkeypatch.setattr(to_megatron_module, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(to_megatron_module, "FILE_BYTES", 20_000)
    monkeypatch.setattr(to_hf_module, "BLOCK_BYTES", 700)
    hf_to_megatron(source, tmp_path / "megatron", num_threads=num_threads)
    assert len(list((tmp_path / "megatron").glob("*.distcp"))) > 3
    boxes = TorchDistReader(tmp_path / "megatron")._boxes
    assert len(boxes["decoder.layers.0.self_attention.linear_qkv.weight"]) > 10
    assert len(boxes["decoder.final_layernorm.weight"]) == 1
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", num_threads=num_threads, max_file_bytes=30_000)
    assert_same_tensors(tensors_of(tmp_path / "back"), tensors_of(source))
    whole = dist_checkpointing_tensors(tmp_path / "megatron")
    for key, weight in open_source(source).weights.items():
        assert torch.equal(whole[key], weight.join([tensors_of(source)[name] for name in weight.hugging_face])), key


def test_a_copy_of_the_tied_embedding_is_left_out(tmp_path):
    """Some published checkpoints have one; transformers ties it."""
    source = write_qwen(tmp_path / "hf", tied=True)
    tensors = load_file(source / "model.safetensors")
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file({**tensors, **head}, source / "model.safetensors", metadata={"format": "pt"})
    back = there_and_back(source, tmp_path)
    assert_same_tensors(tensors_of(back), tensors)


def test_types_may_differ_from_tensor_to_tensor(tmp_path):
    source = write_qwen(tmp_path / "hf", dtype=torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    tensors["model.layers.1.self_attn.o_proj.weight"] = tensors["model.layers.1.self_attn.o_proj.weight"].half()
    save_file(tensors, source / "model.safetensors")
    assert_same_tensors(tensors_of(there_and_back(source, tmp_path)), tensors)


def test_the_checkpoint_is_complete(tmp_path):
    """What a run that loads it looks at: manifest, run.json, the model's small files."""
    source = write_qwen(tmp_path / "hf")
    hf_to_megatron(source, tmp_path / "megatron")
    manifest = read_manifest(tmp_path / "megatron")
    check_files(tmp_path / "megatron", manifest.items())
    present = {str(p.relative_to(tmp_path / "megatron")) for p in (tmp_path / "megatron").rglob("*") if p.is_file()}
    assert manifest.keys() | {"manifest.json"} == present
    assert is_converted(tmp_path / "megatron") and not (tmp_path / "megatron/encoder").exists()
    assert {path.name for path in (tmp_path / "megatron/hf").iterdir()} == set(SMALL_FILES)


def test_equal_inputs_give_equal_files(tmp_path):
    source = write_qwen(tmp_path / "hf")
    for name in ("one", "other"):
        hf_to_megatron(source, tmp_path / name / "megatron", num_threads=2)
        megatron_to_hf(tmp_path / name / "megatron", tmp_path / name / "back", num_threads=2)
    assert_same_files(tmp_path / "one", tmp_path / "other")


# --- with images ---


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def laver(request, tmp_path_factory, demo_dir):
    """(an export with its training state, the checkpoint made of it)."""
    directory = tmp_path_factory.mktemp("laver")
    source = write_laver(directory / "hf", demo_dir, positions="1d", dtype=request.param)
    hf_to_megatron(source, directory / "megatron")
    return source, directory / "megatron"


def test_round_trip_with_training_state(laver, tmp_path):
    source, megatron = laver
    megatron_to_hf(megatron, tmp_path / "back", training_state=True)
    for stem in ("model", "training_state"):
        assert_same_tensors(tensors_of(tmp_path / "back", stem), tensors_of(source, stem))
    dtype = str(tensors_of(source)["language_model.model.norm.weight"].dtype).removeprefix("torch.")
    configs = [json.loads((path / "config.json").read_text()) for path in (tmp_path / "back", source)]
    assert configs[0] == {**configs[1], "dtype": dtype} and list(configs[0]) == list(configs[1])
    for path in source.iterdir():
        if path.suffix != ".safetensors" and path.name != "config.json":
            assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes(), path.name
    assert "training_state.safetensors" in (tmp_path / "back/README.md").read_text()


def test_an_export_of_an_export_is_the_same_to_the_byte(laver, tmp_path):
    """README, chat template, processor and code included; sharded, as large models are."""
    options = {"training_state": True, "max_file_bytes": 200_000}
    megatron_to_hf(laver[1], tmp_path / "first", **options)
    hf_to_megatron(tmp_path / "first", tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "second", **options)
    assert_same_files(tmp_path / "second", tmp_path / "first")
    assert len(list((tmp_path / "first").glob("training_state-*.safetensors"))) > 1
    run = json.loads((tmp_path / "megatron/run.json").read_text())
    assert run == {
        "weights_only": True, "attention": "mixed", "positions": "1d", "encoder_feature_layer": -2,
        "max_image_tokens": None, "vision_head_hidden_size": VISION_HEAD[0], "vision_head_output_size": VISION_HEAD[1],
    }  # fmt: skip


def test_the_training_state_is_no_part_of_the_model(laver, tmp_path):
    megatron_to_hf(laver[1], tmp_path / "plain")
    assert_same_tensors(tensors_of(tmp_path / "plain"), tensors_of(laver[0]))
    assert not list(tmp_path.rglob("training_state*"))
    hf_to_megatron(tmp_path / "plain", tmp_path / "megatron")
    keys = TorchDistReader(tmp_path / "megatron").sizes.keys()
    assert not [key for key in keys if key.startswith(("teacher.", "vision_head.", "mask_token"))]
    assert "vision_head_hidden_size" not in json.loads((tmp_path / "megatron/run.json").read_text())


def test_teacher_weights(laver, tmp_path):
    """The teacher's layers and norm, in the student's type; the student's everything else."""
    source, megatron = laver
    megatron_to_hf(megatron, tmp_path / "teacher", weights="teacher")
    expected, accumulators = tensors_of(source), tensors_of(source, "training_state")
    replaced = 0
    for name, tensor in expected.items():
        of_teacher = name.replace("language_model.model.", "teacher.model.")
        if of_teacher in accumulators:
            expected[name] = accumulators[of_teacher].to(tensor.dtype)
            assert not torch.equal(expected[name], tensor)
            replaced += 1
    assert replaced == 12 * 4 + 1  # tensors of a layer, layers of the demo's model, the final norm
    assert_same_tensors(tensors_of(tmp_path / "teacher"), expected)


def test_exports_load_in_transformers_with_every_weight(laver, tmp_path):
    for format, model_class, options in (
        ("laver", AutoModelForImageTextToText, {"trust_remote_code": True}),
        ("llava", LlavaForConditionalGeneration, {}),
    ):
        megatron_to_hf(laver[1], tmp_path / format, format=format, max_file_bytes=1e6)
        _, info = model_class.from_pretrained(tmp_path / format, output_loading_info=True, **options)
        assert not any(info.values()), (format, info)
    assert_same_tensors(tensors_of(tmp_path / "llava"), tensors_of(laver[0]))
    assert not (tmp_path / "llava/modeling_laver.py").exists()


# --- the programs ---


@pytest.mark.processes
def test_two_processes_write_what_one_writes(tmp_path, demo_dir):
    source = write_laver(tmp_path / "hf", demo_dir)
    hf_to_megatron(source, tmp_path / "megatron-1")
    megatron_to_hf(tmp_path / "megatron-1", tmp_path / "back-1", training_state=True, max_file_bytes=1e6)
    megatron, back = tmp_path / "megatron-2", tmp_path / "back-2"
    there = ("hf_to_megatron", "--hf", source, "--megatron", megatron)
    and_back = ("megatron_to_hf", "--megatron", megatron, "--hf", back, "--training-state", "--max-file-bytes", "1e6")
    for tool, *arguments in (there, (*and_back, "--num-threads", "2")):
        done = run_tool(tool, *arguments, num_processes=2)
        assert done.returncode == 0, done.stderr
        assert len(re.findall(r"tensors, 0\.\d+ GB in", done.stderr)) == 1, done.stderr
    for stem in ("model", "training_state"):
        assert_same_tensors(tensors_of(back, stem), tensors_of(source, stem))
    for name in ("megatron", "back"):
        for path in (tmp_path / f"{name}-1").rglob("*"):
            other = tmp_path / f"{name}-2" / path.relative_to(tmp_path / f"{name}-1")
            # README says the checkpoint's name; strings of a pickle are shared or not.
            if path.is_file() and path.name not in (".metadata", "manifest.json", "README.md"):
                assert path.read_bytes() == other.read_bytes(), path


def test_dry_run_says_everything_and_writes_nothing(tmp_path, demo_dir, capsys):
    source = write_laver(tmp_path / "hf", demo_dir)
    hf_to_megatron(source, tmp_path / "out/megatron", dry_run=True, num_threads=3)
    assert not (tmp_path / "out").exists()
    said = capsys.readouterr().out
    weights = open_source(source).weights
    assert_mapping_is_said(said, weights.keys(), [name for w in weights.values() for name in w.hugging_face])
    num_bytes = sum(t.nbytes for stem in ("model", "training_state") for t in tensors_of(source, stem).values())
    assert f"{len(weights)} tensors, {num_bytes / 1e9:.3f} GB" in said
    assert re.search(r"memory .*: at most \d+ MB \(3 threads, blocks of 64 MiB\)", said)

    hf_to_megatron(source, tmp_path / "megatron")
    before = sorted(tmp_path.rglob("*"))
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", dry_run=True, training_state=True)
    assert sorted(tmp_path.rglob("*")) == before
    said = capsys.readouterr().out
    assert_mapping_is_said(said, weights.keys(), [name for w in weights.values() for name in w.hugging_face])
    assert re.search(r"memory .*: at most \d+ MB", said)
    for target in (tmp_path / "hf", source / "inside"):
        with pytest.raises(ValueError, match="choose another"):
            hf_to_megatron(source, target, dry_run=True)


def assert_mapping_is_said(said, keys, names):
    """Every tensor's name on both sides, layers of one form in one line whose number is their count."""
    lines = [line for line in said.splitlines() if "<->" in line]
    for name in [*keys, *names]:
        form = re.sub(r"layers\.\d+\.", "layers.N.", name)
        assert any(form in re.split(r"[\s+]+", line) for line in lines), form
    counts = {}
    for line in lines:
        number, megatron = re.match(r"\s*(\d+) x (\S+)", line).groups()
        counts[megatron] = counts.get(megatron, 0) + int(number)
    num_layers = sum(key.endswith("mlp.linear_fc2.weight") and key.startswith("decoder.") for key in keys)
    assert counts["decoder.layers.N.mlp.linear_fc2.weight"] == num_layers


# --- files of checkpoints ---


def dist_checkpointing_tensors(directory):
    """All tensors of a checkpoint as torch's own distributed checkpointing reads them."""
    metadata = torch_checkpoint.FileSystemReader(directory).read_metadata().state_dict_metadata
    state = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in metadata.items()}
    torch_checkpoint.load(state, storage_reader=torch_checkpoint.FileSystemReader(directory), no_dist=True)
    return state


@pytest.mark.processes
def test_megatron_core_reads_what_is_written(tmp_path, single_process):
    source = write_qwen(tmp_path / "hf", dtype=torch.bfloat16)
    hf_to_megatron(source, tmp_path / "megatron")
    reader = TorchDistReader(tmp_path / "megatron")
    expected = {
        key: weight.join([tensors_of(source)[name] for name in weight.hugging_face])
        for key, weight in open_source(source).weights.items()
    }
    assert_same_tensors({key: reader.read_rows(key, 0, size[0]) for key, size in reader.sizes.items()}, expected)
    assert_same_tensors(dist_checkpointing_tensors(tmp_path / "megatron"), expected)
    assert_same_tensors(dist_checkpointing.load_plain_tensors(str(tmp_path / "megatron")), expected)


# Name, type and (axis, number of pieces) of tensors as Megatron-Core divides them.
DIVIDED = {
    "rows": (torch.bfloat16, (12, 6), [(0, 4)]),
    "columns": (torch.float32, (7, 12), [(1, 3)]),
    "both": (torch.float16, (8, 6), [(0, 2), (1, 3)]),
    "vector": (torch.float32, (10,), [(0, 5)]),
    "whole": (torch.bfloat16, (5, 3, 2, 2), []),
}


@pytest.fixture(scope="module")
def divided(tmp_path_factory, single_process):
    """(a checkpoint written by Megatron-Core in pieces, its whole tensors)."""
    directory = tmp_path_factory.mktemp("divided")
    torch.manual_seed(0)
    whole = {key: torch.randn(size).to(dtype) for key, (dtype, size, _) in DIVIDED.items()}
    pieces = {}
    for key, (_, _, cuts) in DIVIDED.items():
        places = [[]]
        for axis, count in cuts:
            places = [[*place, (axis, i, count)] for place in places for i in range(count)]
        for place in places:
            piece = whole[key]
            for axis, i, count in place:
                piece = piece.chunk(count, dim=axis)[i]
            pieces[f"{key} {place}"] = ShardedTensor.from_rank_offsets(key, piece.contiguous(), *place)
    # TransformerEngine's notes for fp8, which are no tensors and no part of the model.
    notes = ShardedObject("rows._extra_state", io.BytesIO(b"notes"), (1,), (0,))
    dist_checkpointing.save({**pieces, "notes": notes, "step": 3}, str(directory))
    return directory, whole


@pytest.mark.processes
@settings(deadline=None)
@given(key=st.sampled_from(sorted(DIVIDED)), ends=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_rows_of_what_megatron_core_writes(divided, key, ends):
    directory, whole = divided
    start, stop = sorted(round(end * len(whole[key])) for end in ends)
    reader = TorchDistReader(directory)
    assert reader.sizes == {name: tuple(tensor.shape) for name, tensor in whole.items()}
    assert reader.dtypes == {name: tensor.dtype for name, tensor in whole.items()}
    if start < stop:
        assert torch.equal(reader.read_rows(key, start, stop), whole[key][start:stop])


@pytest.mark.processes
def test_many_threads_read_one_checkpoint(divided):
    directory, whole = divided
    reader = TorchDistReader(directory)
    wanted = [(key, row) for key, tensor in whole.items() for row in range(len(tensor))] * 5
    random.Random(0).shuffle(wanted)
    with ThreadPoolExecutor(8) as threads:
        rows = list(threads.map(lambda w: reader.read_rows(w[0], w[1], w[1] + 1), wanted))
    for (key, row), found in zip(wanted, rows, strict=True):
        assert torch.equal(found, whole[key][row : row + 1])


def test_a_hole_in_a_tensor_is_an_error(tmp_path):
    with (tmp_path / "__0_0.distcp").open("wb") as stream:
        boxes: list[Box] = [write_box(stream, "__0_0.distcp", "weight", (start,), torch.ones(2)) for start in (0, 4)]
    write_metadata(tmp_path, [("weight", (6,), torch.float32)], boxes)
    reader = TorchDistReader(tmp_path)
    assert torch.equal(reader.read_rows("weight", 4, 6), torch.ones(2))
    with pytest.raises(ValueError, match="weight is not stored whole .4 of 6 values"):
        reader.read_rows("weight", 0, 6)


# --- safetensors files ---


def write_safetensors(directory, tensors, max_file_bytes, seed=0):
    """Through the writer, single rows of all tensors in any order from several threads."""
    places = [TensorPlace(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    plan = plan_safetensors(places, "model", max_file_bytes)
    create_files([plan], directory)
    writer = SafetensorsWriter([plan], directory)
    rows = [(place, row) for place in plan.places for row in range(place.size[0])]
    random.Random(seed).shuffle(rows)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda w: writer.write_rows(w[0], w[1], tensors[w[0].name][w[1] : w[1] + 1]), rows))
    writer.close()


def test_bytes_are_those_of_the_safetensors_library(tmp_path):
    """Which orders tensors of one type by name."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tensors = {name: torch.randn(size).to(dtype) for name, size in (("a", (3, 5)), ("b.c", (7,)), ("d", (2, 1, 4)))}
        write_safetensors(tmp_path, tensors, 5e9)
        save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
        assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(
        st.tuples(
            st.lists(st.integers(1, 5), min_size=1, max_size=3),
            st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        ),
        min_size=1,
        max_size=6,
    ),
    max_file_bytes=st.integers(1, 400),
    seed=st.integers(0, 3),
)
def test_any_tensors_in_any_files(tmp_path_factory, sizes, max_file_bytes, seed):
    directory = tmp_path_factory.mktemp("files")
    tensors = {f"t{i}": torch.randn(size).to(dtype) for i, (size, dtype) in enumerate(sizes)}
    write_safetensors(directory, tensors, max_file_bytes, seed)
    assert_same_tensors(tensors_of(directory), tensors)
    has_index = (directory / "model.safetensors.index.json").is_file()
    assert has_index == (len(list(directory.glob("*.safetensors"))) > 1)
