"""Comparing a Hugging Face directory with a Megatron checkpoint: the same is found the same, and any change is found.

The checkpoints are written here through Megatron-Core's own `save`, one whole tensor after the other, so
neither converter has a part in them.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from PIL import Image
from safetensors.torch import load_file, save_file

from laver_megatron.checkpoint.manifest import describe, files_of, write_manifest
from laver_megatron.convert.export.description import REMOTE_CODE, export_config, processor_config
from laver_megatron.convert.verification import verify as verify_module
from laver_megatron.convert.verification.forward import (
    TEACHER,
    input_problems,
    megatron_outputs,
    run_transformers,
    transformers_outputs,
)
from laver_megatron.convert.verification.pair import key_problems, open_pair, setting_problems, value_problems
from laver_megatron.convert.verification.probes import PICTURE_PROMPTS, TEXT_PROMPTS, make_probes, pack_probes
from laver_megatron.convert.verification.verify import compare_outputs, grid, layout_problem, verify
from laver_megatron.convert.verification.workers import WorkerFailed
from laver_megatron.demo.encoders import save_encoder
from laver_megatron.demo.models import save_language_model
from laver_megatron.hf.parts import ModelSettings, parts_of_megatron
from laver_megatron.hf.shape import read_model_shape
from laver_megatron.hf.weights import ModelParts, weight_table
from tests.exports import add_processor
from tests.programs import python_path, run_here

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parents[4]
LAYER = "model.layers.2."
SIGLIP = {"model_type": "siglip_vision_model"}


@dataclass(frozen=True)
class Directories:
    hugging_face: Path
    megatron: Path


def large_weights(tensors, seed):
    """Random values large enough that a wrong head, mask or position shows, in place of a fresh model's."""
    generator = torch.Generator().manual_seed(seed)
    changed = {}
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator)
        scale = 0.5 if tensor.ndim == 1 else 1.5 * tensor[0].numel() ** -0.5
        gain = "norm" in name and name.endswith("weight")
        changed[name] = 1 + 0.3 * noise if gain else scale * noise
    return changed


def write_checkpoint(directory, table, tensors, run, *, beside=None):
    """A weights-only checkpoint of the tensors; beside: further tensors by checkpoint key."""
    whole = {key: weight.join([tensors[name] for name in weight.hugging_face]) for key, weight in table.items()}
    whole.update(beside or {})
    state = {key: ShardedTensor.from_rank_offsets(key, tensor.contiguous()) for key, tensor in whole.items()}
    dist_checkpointing.save(state, str(directory))
    (directory / "run.json").write_text(json.dumps({"weights_only": True, **run}))
    write_manifest(directory, {str(file.relative_to(directory)): describe(file) for file in files_of(directory)})


def describe_export(export, megatron, format, **settings):
    """Writes config.json of an export with the models of a checkpoint."""
    configs = [json.loads((megatron / part / "config.json").read_text()) for part in ("hf", "encoder")]
    added = json.loads((megatron / "hf" / "tokenizer.json").read_text())["added_tokens"]
    (image_pad,) = (token["id"] for token in added if token["content"] == "<|image_pad|>")
    settings |= {"feature_layer": -2, "image_token_id": image_pad, "dtype": "float32"}
    description = export_config(format, *configs, **settings)
    (export / "config.json").write_text(json.dumps(description))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A tied Qwen2.5 of four layers, four heads and two key/value heads, with its tokenizer."""
    directory = tmp_path_factory.mktemp("qwen")
    save_language_model(directory, [])
    file = directory / "model.safetensors"
    save_file(large_weights(load_file(file), 1), file, metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def text(single_process, model_dir, tmp_path_factory):
    megatron = tmp_path_factory.mktemp("text") / "iter_0000000"
    shutil.copytree(model_dir, megatron / "hf", ignore=shutil.ignore_patterns("*.safetensors"))
    table = weight_table(ModelParts(read_model_shape(model_dir)))
    write_checkpoint(megatron, table, load_file(model_dir / "model.safetensors"), {})
    return Directories(model_dir, megatron)


@pytest.fixture(scope="module")
def images(single_process, model_dir, tmp_path_factory):
    """An export with images, mixed attention and 2d positions, and its checkpoint, whose teacher is another."""
    directory = tmp_path_factory.mktemp("images")
    export, megatron = directory / "export", directory / "iter_0000000"
    save_encoder(directory / "encoder")
    for source, target in ((model_dir, "hf"), (directory / "encoder", "encoder")):
        shutil.copytree(source, megatron / target, ignore=shutil.ignore_patterns("*.safetensors"))
    encoder = load_file(directory / "encoder" / "model.safetensors")
    names = {name.removeprefix("vision_model."): tuple(tensor.shape) for name, tensor in encoder.items()}
    shape = read_model_shape(model_dir)
    table = weight_table(ModelParts(shape, names, "siglip_vision_model", feature_size=64))
    sizes = {n: size for w in table.values() for n, size in zip(w.hugging_face, w.sizes, strict=True)}
    tensors = large_weights({name: torch.empty(size) for name, size in sizes.items()}, 2)
    run = {"attention": "mixed", "positions": "2d", "encoder_feature_layer": -2}
    teacher = {
        f"teacher.{key}": 0.5 * weight.join([tensors[name] for name in weight.hugging_face])
        for key, weight in table.items() if key.startswith("decoder.")
    }  # fmt: skip
    write_checkpoint(megatron, table, tensors, run, beside={**teacher, "mask_token": torch.ones(128)})
    export.mkdir()
    save_file(tensors, export / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(REMOTE_CODE, export)
    describe_export(export, megatron, "laver", attention="mixed", positions="2d")
    (export / "processor_config.json").write_text(json.dumps(processor_config("laver", SIGLIP, patch_size=8)))
    add_processor(export, model_dir, directory / "encoder")
    return Directories(export, megatron)


def compare(pair, probes):
    """What `verify` compares, both sides in this process."""
    packed = pack_probes(probes)
    theirs = transformers_outputs(pair.hugging_face, probes)
    ours = megatron_outputs(pair.megatron, probes, packed, (1, 1))
    return compare_outputs("here", probes, theirs, [ours], 1e-4)


def probes_of(pair):
    return make_probes(pair.megatron.checkpoint / "hf", pair.megatron.encoder_dir, (), ())


# --- the same is the same ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "images"])
def test_the_same_model_is_found_the_same(kind, request):
    pair = open_pair(*vars(request.getfixturevalue(kind)).values(), "student")
    assert key_problems(pair) == () and setting_problems(pair) == ()
    probes = probes_of(pair)
    assert input_problems(pair.hugging_face, probes) == []
    row = compare(pair, probes)
    assert row.problems == ()
    assert (row.difference.images is not None) == (kind == "images")
    # Nothing is compared that is zero on both sides.
    assert row.difference.logits > 0 and row.difference.hidden > 0


@pytest.mark.parametrize("same", [True, False])
def test_the_tool(text, images, tmp_path, same):
    """A grid of two processes for text, as a program; one process with pictures."""
    directories = text if same else replace(images, hugging_face=changed(images, tmp_path, negate("linear_2.bias")))
    picture = tmp_path / "picture.png"
    Image.radial_gradient("L").resize((90, 50)).save(picture)
    options = ["--grid", "--max-processes", "2"] if same else ["--image", picture, "--prompt", "A <image>!", "B C"]
    options += ["--hf", directories.hugging_face, "--megatron", directories.megatron]
    if same:
        command = [sys.executable, ROOT / "tools/verify_conversion.py", *options]
        environment = {**os.environ, "PYTHONPATH": python_path()}
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    else:
        done = run_here("tools/verify_conversion.py", *options)
    assert done.returncode == (0 if same else 1), done.stdout + done.stderr
    lines = done.stdout.splitlines()
    rows = [line for line in lines if line.endswith(("same", "DIFFERS"))]
    assert lines[-1] == ("the two hold the same model" if same else "the two DIFFER")
    if same:
        assert [row.split("  ")[0] for row in rows] == [
            "names and shapes", "values", "tokens and pixels", "TP1 x PP1", "TP1 x PP2", "TP2 x PP1",
        ]  # fmt: skip
        assert all(row.endswith("same") for row in rows)
        assert "leaving out TP2 x PP2: needs 4 processes, at most 2 are allowed" in lines
    else:
        assert [row.split()[-1] for row in rows] == ["same", "DIFFERS", "same", "DIFFERS"]
        assert any("those at images differ by" in line for line in lines)


def test_bfloat16_files_are_compared_in_fp32(text, tmp_path):
    """Rounded alike on both sides, as a conversion that moves rows leaves them."""
    export = changed(text, tmp_path, lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items()}))
    megatron = tmp_path / "iter_0000000"
    shutil.copytree(text.megatron / "hf", megatron / "hf")
    table = weight_table(ModelParts(read_model_shape(megatron / "hf")))
    write_checkpoint(megatron, table, load_file(export / "model.safetensors"), {})
    pair = open_pair(export, megatron, "student")
    probes = probes_of(pair)
    assert compare(pair, probes).problems == ()
    assert compare(open_pair(text.hugging_face, megatron, "student"), probes).problems, "bf16 rounding must show"


def test_llava_exports_of_causal_models_are_compared(images, tmp_path):
    export = tmp_path / "llava"
    shutil.copytree(images.hugging_face, export)
    describe_export(export, images.megatron, "llava", attention="causal", positions="1d")
    (export / "processor_config.json").write_text(json.dumps(processor_config("llava", SIGLIP, patch_size=8)))
    pair = open_pair(export, images.megatron, "student")
    assert len(setting_problems(pair)) == 2  # the checkpoint was trained with mixed attention and 2d positions
    pair = replace(pair, megatron=replace(pair.megatron, settings=ModelSettings("causal", "1d", -2)))
    assert setting_problems(pair) == ()
    assert compare(pair, probes_of(pair)).problems == ()
    assert input_problems(export, probes_of(pair)) == []


def test_llava_exports_of_mixed_models_are_refused(images, tmp_path):
    describe_export(tmp_path, images.megatron, "llava", attention="mixed", positions="1d")
    with pytest.raises(ValueError, match="mixed attention, which transformers' own Llava does not compute"):
        open_pair(tmp_path, images.megatron, "student")


def test_the_teacher_is_compared_where_it_was_exported(images, tmp_path):
    def halve(tensors):
        for name in tensors:
            if "language_model.model.layers." in name or name == "language_model.model.norm.weight":
                tensors[name] = 0.5 * tensors[name]

    export = changed(images, tmp_path, halve)
    teacher = open_pair(export, images.megatron, TEACHER)
    assert key_problems(teacher) == ()
    probes = probes_of(teacher)
    assert compare(teacher, probes).problems == ()
    assert compare(open_pair(export, images.megatron, "student"), probes).problems


def test_a_teacher_in_fp32_is_rounded_as_training_rounds_it(images, tmp_path):
    """A bf16 run keeps its teacher in fp32 and computes with bf16; so does whoever loads the export."""
    megatron, export = tmp_path / "iter_0000000", tmp_path / "export"
    for part in ("hf", "encoder"):
        shutil.copytree(images.megatron / part, megatron / part)
    shutil.copytree(images.hugging_face, export)
    tensors = {name: t.bfloat16() for name, t in load_file(export / "model.safetensors").items()}
    table = weight_table(parts_of_megatron(megatron, {}))
    teacher = {
        key: 0.9 * weight.join([tensors[name].float() for name in weight.hugging_face])
        for key, weight in table.items() if key.startswith("decoder.")
    }  # fmt: skip
    run = json.loads((images.megatron / "run.json").read_text())
    write_checkpoint(megatron, table, tensors, run, beside={f"teacher.{key}": t for key, t in teacher.items()})
    for key in teacher:
        for name in table[key].hugging_face:
            tensors[name] = (0.9 * tensors[name].float()).bfloat16()
    save_file(tensors, export / "model.safetensors", metadata={"format": "pt"})
    pair = open_pair(export, megatron, TEACHER)
    assert compare(pair, probes_of(pair)).problems == ()


def test_a_checkpoint_without_a_teacher_is_told(text):
    (problem,) = key_problems(open_pair(text.hugging_face, text.megatron, TEACHER))
    assert problem.startswith("Megatron's checkpoint lacks tensors: 29, teacher.decoder.final_layernorm.weight,")


# --- every change is found -----------------------------------------------------------------------------


def changed(directories, tmp_path, edit):
    """A copy of the Hugging Face directory after `edit(tensors)`."""
    copy = tmp_path / "changed"
    shutil.copytree(directories.hugging_face, copy)
    tensors = load_file(copy / "model.safetensors")
    edit(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def negate(ending):
    def edit(tensors):
        (name,) = (name for name in tensors if name.endswith(ending) and "layers" not in name)
        tensors[name] = -tensors[name]

    return edit


def one_value(tensors):
    tensors[f"{LAYER}mlp.down_proj.weight"][3, 5] += 0.1


def swap_query_and_key(tensors):
    """The second query heads' rows and the key's, as a wrong order of the fused tensor would have it."""
    query, key = tensors[f"{LAYER}self_attn.q_proj.weight"], tensors[f"{LAYER}self_attn.k_proj.weight"]
    kept = key.clone()
    key.copy_(query[64:])
    query[64:] = kept


def swap_gate_and_up(tensors):
    gate, up = (f"{LAYER}mlp.{name}_proj.weight" for name in ("gate", "up"))
    tensors[gate], tensors[up] = tensors[up], tensors[gate]


@pytest.mark.parametrize("edit", [one_value, swap_query_and_key, swap_gate_and_up])
def test_values_that_differ(text, tmp_path, edit):
    pair = open_pair(changed(text, tmp_path, edit), text.megatron, "student")
    assert key_problems(pair) == ()
    row = compare(pair, probes_of(pair))
    assert row.problems[0].startswith("logits differ by") and row.problems[1].startswith("hidden states differ by")


def test_an_image_part_that_differs_shows_at_images(images, tmp_path):
    pair = open_pair(changed(images, tmp_path, negate("linear_1.weight")), images.megatron, "student")
    probes = probes_of(pair)
    row = compare(pair, probes)
    assert row.difference.images > 1e-2
    text_only = [probe for probe in probes if not probe.pixels]
    assert compare(pair, text_only).problems == ()


@pytest.mark.parametrize("setting", [{"attention": "causal"}, {"positions": "mrope"}, {"feature_layer": -1}])
def test_settings_that_differ(images, tmp_path, setting):
    """Both in words, and in the outputs."""
    export = tmp_path / "export"
    shutil.copytree(images.hugging_face, export)
    name, value = next(iter(setting.items()))
    config = json.loads((export / "config.json").read_text())
    config["vision_feature_layer" if name == "feature_layer" else name] = value
    (export / "config.json").write_text(json.dumps(config))
    pair = open_pair(export, images.megatron, "student")
    assert f"is {value} in {export}" in setting_problems(pair)[0]
    assert compare(pair, probes_of(pair)).difference.images > 1e-2


def test_a_text_config_that_differs(text, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(text.hugging_face, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rope_theta": 1e4}))
    pair = open_pair(copy, text.megatron, "student")
    assert setting_problems(pair) == (f"rope_theta is 10000.0 in {copy}, but 1000000.0 in {text.megatron}",)
    assert compare(pair, probes_of(pair)).problems


def test_a_tensor_that_the_hugging_face_side_lacks(text, tmp_path):
    missing = f"{LAYER}self_attn.k_proj.bias"
    copy = changed(text, tmp_path, lambda tensors: tensors.pop(missing))
    pair = open_pair(copy, text.megatron, "student")
    assert key_problems(pair) == (f"the Hugging Face directory lacks tensors: 1, {missing}",)
    assert transformers_outputs(copy, probes_of(pair)).unread == [missing]


def test_tensors_beyond_the_model_and_of_another_shape(text, tmp_path):
    def edit(tensors):
        tensors["model.layers.9.extra"] = torch.zeros(2)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()  # tied: may be stored once more
        tensors["model.norm.weight"] = torch.zeros(3)

    assert key_problems(open_pair(changed(text, tmp_path, edit), text.megatron, "student")) == (
        "the Hugging Face directory holds tensors of another shape: 1, model.norm.weight ((3,), not (128,))",
        "the Hugging Face directory holds tensors without a counterpart in the other: 1, model.layers.9.extra",
    )


def test_a_tensor_that_the_checkpoint_lacks(text, tmp_path):
    """Named as missing, and as a weight that nobody wrote; NaN on one side is a difference."""
    megatron = tmp_path / "iter_0000000"
    shutil.copytree(text.megatron / "hf", megatron / "hf")
    table = weight_table(ModelParts(read_model_shape(text.hugging_face)))
    missing = "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight"
    del table[missing]
    write_checkpoint(
        megatron, table, load_file(text.hugging_face / "model.safetensors"), {}, beside={"odd": torch.ones(2)}
    )
    pair = open_pair(text.hugging_face, megatron, "student")
    assert key_problems(pair) == (
        f"Megatron's checkpoint lacks tensors: 1, {missing}",
        "Megatron's checkpoint holds tensors without a counterpart in the other: 1, odd",
    )
    row = compare(pair, probes_of(pair))
    assert row.problems[0] == f"weights never written (still NaN after loading): 1, {missing}"
    assert row.difference.logits != row.difference.logits and row.problems[1].startswith("logits differ by nan")


def test_encoder_and_connector_that_nobody_wrote_are_named(images, tmp_path):
    """They are built with numbers, which must not pass for the checkpoint's."""
    pair = open_pair(images.hugging_face, images.megatron, "student")
    megatron = tmp_path / "iter_0000000"
    for part in ("hf", "encoder"):
        shutil.copytree(images.megatron / part, megatron / part)
    shape = read_model_shape(megatron / "hf")
    table = {key: weight for key, weight in weight_table(ModelParts(shape)).items() if not key.startswith("odd")}
    tensors = load_file(images.hugging_face / "model.safetensors")
    tensors = {name.removeprefix("language_model."): tensor for name, tensor in tensors.items()}
    write_checkpoint(megatron, table, tensors, {})
    packed = pack_probes(probes := [probe for probe in probes_of(pair) if not probe.pixels])
    unread = megatron_outputs(replace(pair.megatron, checkpoint=megatron), probes, packed, (1, 1)).unread
    assert {key.split(".")[0] for key in unread} == {"encoder", "connector"}


def swap_two_letters(tokenizer):
    content = json.loads(tokenizer)
    vocabulary = content["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
    return json.dumps(content)


@pytest.mark.parametrize(
    "file, edit, problem",
    [
        ("preprocessor_config.json", lambda text: text.replace("0.5", "0.4"), "pixels of"),
        ("chat_template.jinja", lambda text: text.replace("assistant", "helper").replace("Qwen", "Q"), "other tokens"),
        ("tokenizer.json", swap_two_letters, "other tokens"),
        ("tokenizer.json", lambda text: "", "AutoProcessor cannot load the directory"),
    ],
)
def test_prompts_and_pictures_that_are_prepared_otherwise(images, tmp_path, file, edit, problem):
    export = tmp_path / "export"
    shutil.copytree(images.hugging_face, export)
    text = (export / file).read_text()
    assert edit(text) != text
    (export / file).write_text(edit(text))
    probes = probes_of(open_pair(images.hugging_face, images.megatron, "student"))
    assert any(problem in found for found in input_problems(export, probes))


def test_the_verdict_needs_numbers(text):
    report = verify_module.Report(1e-4, [verify_module.Row("names and shapes")])
    assert not report.is_same, "no outputs were compared"


# --- probes --------------------------------------------------------------------------------------------


def test_packed_probes_lie_apart_and_whole(images):
    probes = probes_of(open_pair(images.hugging_face, images.megatron, "student"))
    assert [probe.prompt for probe in probes] == [*TEXT_PROMPTS, *PICTURE_PROMPTS]
    packed = pack_probes(probes)
    assert len(packed.packs) < len(probes)
    documents = set()
    for probe, (pack, start) in zip(probes, packed.places, strict=True):
        batch, slots = packed.packs[pack], slice(start, start + len(probe))
        assert torch.equal(batch.tokens_BS[0, slots], probe.sample.tokens_T)
        (document,) = set(batch.document_BS[0, slots].tolist())
        documents.add((pack, document))
    assert len(documents) == len(probes)


def test_own_prompts_stand_in_for_those_of_their_kind(images, tmp_path):
    pair = open_pair(images.hugging_face, images.megatron, "student")
    files = [tmp_path / f"{i}.png" for i in range(2)]
    for file, colour in zip(files, ("red", "blue"), strict=True):
        Image.new("RGB", (40, 30), colour).save(file)
    arguments = (pair.megatron.checkpoint / "hf", pair.megatron.encoder_dir)
    probes = make_probes(*arguments, ["one <image>", "two <image><image>"], files)
    assert [probe.prompt for probe in probes] == [*TEXT_PROMPTS, "one <image>", "two <image><image>"]
    red, blue = probes[-2].pixels[0], probes[-1].pixels[0]
    assert not torch.equal(red, blue) and torch.equal(probes[-1].pixels[1], red)
    assert [probe.prompt for probe in make_probes(*arguments, ["hello"], files)] == ["hello", *PICTURE_PROMPTS]
    with pytest.raises(ValueError, match="cannot decode"):
        make_probes(*arguments, [], [pair.megatron.checkpoint / "run.json"])
    with pytest.raises(ValueError, match="text only"):
        make_probes(arguments[0], None, ["a <image>"], [])
    with pytest.raises(ValueError, match="has no tokens"):
        make_probes(arguments[0], None, [""], [])


# --- bad input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hugging_face": Path("nowhere")}, "nowhere: no such directory"),
        ({"megatron": Path("nowhere")}, "nowhere is not a checkpoint"),
        ({"tolerance": 0.0}, "must be above 0"),
        ({"tolerance": float("nan")}, "must be above 0"),
        ({"layouts": [(3, 1)]}, "TP3 x PP1: 3 does not divide the model's 4 attention heads"),
        ({"layouts": [(1, 3)]}, "TP1 x PP3: 4 layers do not divide into 3 stages"),
        ({"layouts": [(0, 1)]}, "at least 1"),
        ({"prompts": ["<image>"]}, "text only"),
        ({"layouts": None, "max_processes": 0}, "no layout to compare; allow more than 0 processes"),
    ],
)
def test_what_cannot_be_compared_is_refused(text, change, message):
    with pytest.raises(ValueError, match=message):
        verify(**{**vars(text), "layouts": [(1, 1)], **change})


def test_directories_of_different_kinds_are_refused(text, images):
    with pytest.raises(ValueError, match="only the Megatron directory has an image encoder"):
        open_pair(text.hugging_face, images.megatron, "student")


@pytest.mark.parametrize("options, code", [(["--hf", "nowhere", "--megatron", "nowhere"], 2), (["--help"], 0), ([], 2)])
def test_exit_codes_of_the_tool(options, code, capsys):
    namespace = {"__name__": "tool"}
    exec(compile((ROOT / "tools" / "verify_conversion.py").read_text(), "verify_conversion.py", "exec"), namespace)
    try:
        returned = namespace["main"](options)
    except SystemExit as error:
        returned = error.code
    assert returned == code
    written = capsys.readouterr()
    assert ("--tolerance X" in written.out) == (code == 0)


def test_the_grid_has_what_fits(text):
    shape, said = read_model_shape(text.hugging_face), []
    assert grid(shape, 4, said.append) == [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)]
    assert len(said) == 12 - 6
    assert layout_problem(replace(shape, num_query_groups=3), (4, 1)) == (
        "4 neither divides nor is a multiple of its 3 key/value heads"
    )


def test_what_failed_is_a_difference_and_not_the_end(monkeypatch, text):
    """A layout that fails is reported, and the next one is still tried."""

    def answer(function, num_workers, *arguments, **types):
        if function is run_transformers:
            return [(transformers_outputs(*arguments), [])]
        raise WorkerFailed("no memory")

    monkeypatch.setattr(verify_module, "run_workers", answer)
    report = verify(**vars(text), layouts=[(1, 1), (2, 1)], say=lambda message: None)
    assert [row.problems for row in report.rows[3:]] == [("no memory",)] * 2 and not report.is_same
    assert isinstance(report.table(), str) and report.table().endswith("the two DIFFER")


def test_values_that_no_prompt_reaches(images, tmp_path):
    """A tensor that the outputs do not depend on, and rows in the middle of one."""
    assert value_problems(open_pair(images.hugging_face, images.megatron, "student")) == ()
    for name in ("vision_tower.vision_model.post_layernorm.bias", "language_model.model.layers.3.mlp.up_proj.weight"):
        export = changed(images, tmp_path / name, lambda tensors, name=name: tensors[name][7:8].add_(1))
        problem = f"tensors of other values: 1, {name}"
        assert value_problems(open_pair(export, images.megatron, "student")) == (problem,)
    decoder = value_problems(open_pair(images.hugging_face, images.megatron, "teacher"))
    assert "tensors of other values: 49, " in decoder[0], "four layers of twelve tensors, and the final norm"
