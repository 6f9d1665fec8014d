"""Weights between Hugging Face and Megatron at every division of the model: starting, exporting, going on.

A run that starts from a converted checkpoint, one that starts from an export, and a run that reads the Hugging Face
directory itself hold the same bits; what an export says in transformers is what the trained model says.
"""

import gc
import itertools
import json
import shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import xxhash
from megatron.core import dist_checkpointing, parallel_state
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from laver_megatron import train
from laver_megatron.checkpoint.directory import latest_checkpoint
from laver_megatron.checkpoint.manifest import describe, files_of, write_manifest
from laver_megatron.checkpoint.state import load_weights
from laver_megatron.convert.hf_to_megatron import hf_to_megatron
from laver_megatron.convert.megatron_to_hf import megatron_to_hf, open_checkpoint
from laver_megatron.convert.safetensors_writer import SafetensorsWriter, TensorPlace, create_files, plan_safetensors
from laver_megatron.hf.direct_start import load_hugging_face
from laver_megatron.hf.rows import row_blocks
from laver_megatron.hf.safetensors_reader import SafetensorsReader
from laver_megatron.hf.shape import read_model_shape
from laver_megatron.hf.weights import ModelParts, weight_table
from laver_megatron.model.build import build_stages
from laver_megatron.runtime.sharded_state import sharded_tensors, sharding_metadata
from tests.conversions import assert_same_files, assert_same_tensors, tensors_of, write_qwen
from tests.distributed.build import (
    GRID,
    IMAGE_SIZE,
    IMAGE_TOKEN,
    SEQ_LENGTH,
    Shard,
    assert_same_bits,
    make_config,
    make_trainer,
    snapshot,
    student_shards,
    whole_tensors,
)
from tests.distributed.encoders import save_encoder
from tests.distributed.harness import Layout, Pool, join
from tests.packs import pack, padding
from tests.parity import TOLERANCE, model_outputs

NUM_STEPS = 2
FOUR = Layout(tp=2, pp=2, sp=True)
IN_OTHERS = pytest.mark.slow(reason="a division that others of these hold")
LAYOUTS = [
    pytest.param(Layout(), marks=IN_OTHERS),
    pytest.param(Layout(tp=2), marks=IN_OTHERS),
    Layout(tp=4),  # more ranks than key/value groups
    pytest.param(Layout(pp=2), marks=IN_OTHERS),
    Layout(pp=2, vpp_layers=1),
    Layout(pp=2, first_layers=1),
    FOUR,
]


# --- starting ------------------------------------------------------------------------------------------


def in_bf16(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, target / "model.safetensors")
    return target


@pytest.fixture(scope="module")
def pairs(files, tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """(Hugging Face directory, its converted checkpoint): tied in fp32, untied in bf16."""
    directory = tmp_path_factory.mktemp("pairs")
    sources = {"tied fp32": files.tied, "untied bf16": in_bf16(files.untied, directory / "bf16")}
    for name, source in sources.items():
        hf_to_megatron(source, directory / name)
    return {name: (source, directory / name) for name, source in sources.items()}


def leave():
    """Lets another trainer follow in the same job."""
    gc.collect()
    parallel_state.destroy_model_parallel()


def starts_alike(layout, configs):
    """Job: for each pair of configurations, whether two trainers start with the same bits; number of tensors."""
    counts = []
    for first, second in configs:
        expected = snapshot(make_trainer(first))
        leave()
        found = snapshot(make_trainer(second))
        leave()
        assert_same_bits(found, expected)
        counts.append(len(found))
    return counts


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_converted_checkpoint_starts_as_the_hugging_face_directory_does(pool, files, pairs, tmp_path, layout):
    configs = []
    for name, bf16 in (("tied fp32", False), ("untied bf16", True)):
        source, converted = pairs[name]
        config = make_config(files, tmp_path, layout, bf16=bf16, load=f"hf:{source}")
        configs.append((config, config.replace(load=str(converted))))
    for counts in pool.run(starts_alike, layout, configs):
        assert all(count > 10 for count in counts)


def read_directly(layout, config):
    """Job: reads the weights; the bytes this rank asked for, by the function and by tensor, and the size of all."""
    join(layout)
    stages = build_stages(config, read_model_shape(config.start.model), Path(config.start.encoder), load_encoder=True)
    for stage in stages:
        stage.initialise_new_parts(1)
    bytes_of: dict[str, int] = defaultdict(int)
    read = SafetensorsReader.read

    def counted(self, name, start, stop, columns=None):
        block = read(self, name, start, stop, columns)
        bytes_of[name] += block.nbytes
        return block

    with mock.patch.object(SafetensorsReader, "read", counted):
        num_bytes = load_hugging_face(stages, config.start.model, sharding_metadata())
    return num_bytes, dict(bytes_of)


def test_a_direct_start_reads_every_byte_once(pool, files, tmp_path):
    """At TP2 x PP2: each rank its rows and columns, what is the same on all ranks of a group only the first."""
    config = make_config(files, tmp_path, FOUR, model=str(files.untied))
    results = pool.run(read_directly, FOUR, config)
    tensors = tensors_of(files.untied)
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert sum(num_bytes for num_bytes, _ in results) <= 1.1 * size
    assert all(num_bytes == sum(by_name.values()) <= 0.4 * size for num_bytes, by_name in results)
    norms = 0
    for name, tensor in tensors.items():
        assert sum(by_name.get(name, 0) for _, by_name in results) == tensor.nbytes, name
        if "norm" in name:
            assert sum(name in by_name for _, by_name in results) == 1, name
            norms += 1
    assert norms == 2 * 4 + 1


# --- there and back at every division -------------------------------------------------------------------


def load_and_save(layout, config, pairs):
    """Job: for each (checkpoint, target), loads the weights of a text-only checkpoint and writes them anew at a
    layout; the bytes of this rank's weights."""
    join(layout, num_layers=4 if layout.vpp_layers else None)
    sizes = []
    for source, target in pairs:
        of_source = config.replace(model=str(source / "hf"), bf16=config.training.bf16 or "bfloat16" in source.name)
        stages = build_stages(of_source, read_model_shape(source / "hf"))
        load_weights(stages, source)
        metadata = sharding_metadata()
        state = {f"model{i}": stage.sharded_state_dict(metadata=metadata) for i, stage in enumerate(stages)}
        if torch.distributed.get_rank() == 0:
            target.mkdir()
        torch.distributed.barrier()
        dist_checkpointing.save(state, str(target))
        sizes.append(sum(parameter.nbytes for stage in stages for parameter in stage.parameters()))
    return sizes


def complete(target: Path, source: Path) -> None:
    """Adds what stands beside the weights, so that the converter takes what `load_and_save` wrote."""
    shutil.copytree(source / "hf", target / "hf")
    shutil.copy(source / "run.json", target)
    write_manifest(target, {str(path.relative_to(target)): describe(path) for path in files_of(target)})


@pytest.fixture(scope="module")
def shape_classes(tmp_path_factory) -> tuple[dict[Path, Path], dict[Path, Path]]:
    """Converted checkpoint to its Hugging Face directory, for all of 2, 4 and 8 key/value heads, tied and untied,
    fp32 and bf16: in two halves, each with every number of heads tied and untied, in fp32 and in bf16."""
    directory = tmp_path_factory.mktemp("classes")
    found: tuple[dict[Path, Path], dict[Path, Path]] = ({}, {})
    for kv_heads in (2, 4, 8):
        for tied, dtype in itertools.product((False, True), (torch.float32, torch.bfloat16)):
            half = (tied + (dtype == torch.bfloat16) + (kv_heads == 4)) % 2
            name = f"kv{kv_heads} {'tied' if tied else 'untied'} {str(dtype).removeprefix('torch.')}"
            sizes = {"num_key_value_heads": kv_heads, "num_hidden_layers": 4}
            source = write_qwen(directory / f"{name}.hf", tied=tied, dtype=dtype, **sizes)
            hf_to_megatron(source, directory / name)
            found[half][directory / name] = source
    return found


@pytest.mark.parametrize(
    "half",
    [
        0,
        pytest.param(1, marks=pytest.mark.slow(reason="the same numbers of heads, in the other type")),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_there_and_back_by_way_of_every_division(pool, files, shape_classes, tmp_path, layout, half):
    """HF -> Megatron -> a run's ranks -> Megatron -> HF, bit by bit, config.json as it came."""
    pairs = [(source, tmp_path / source.name) for source in shape_classes[half]]
    pool.run(load_and_save, layout, make_config(files, tmp_path, layout, laver=False), pairs)
    for converted, target in pairs:
        complete(target, converted)
        back, source = tmp_path / "back" / target.name, shape_classes[half][converted]
        megatron_to_hf(target, back)
        assert_same_tensors(tensors_of(back), tensors_of(source))
        assert (back / "config.json").read_bytes() == (source / "config.json").read_bytes()


# --- trained checkpoints -------------------------------------------------------------------------------


def state_shards(trainer) -> list[Shard]:
    """All that an export with its training state holds, under checkpoint keys: the student, the teacher's
    accumulators, the centre."""
    state = dict(trainer.teacher.sharded_state(sharding_metadata(), is_loading=False))
    if trainer.centre is not None:
        group = parallel_state.get_tensor_model_parallel_group()
        state["centre"] = trainer.centre.sharded_state(group, parallel_state.get_data_parallel_rank())
    shards = [
        Shard(t.key, tuple(t.global_shape), tuple(t.global_offset), t.data.view(t.local_shape).clone())
        for t in sharded_tensors(state)
    ]
    return student_shards(trainer) + shards


DOCUMENTS = ([3, (GRID, GRID), 2, (GRID, GRID), (GRID, GRID), 4], [(GRID, GRID), 5], [9])


def prompts():
    """Three images that partly touch, an image first, text alone."""
    return [pack(document, image_size=IMAGE_SIZE, seed=seed) for seed, document in enumerate(DOCUMENTS)]


def micro_batches():
    """The prompts as packs of one document each; nothing is masked."""
    packs = []
    for seed, document in enumerate(DOCUMENTS):
        length = sum(part if isinstance(part, int) else part[0] * part[1] for part in document)
        packs.append(pack(document, padding(SEQ_LENGTH - length), image_size=IMAGE_SIZE, seed=seed))
    for padded, alone in zip(packs, prompts(), strict=True):
        padded.tokens_BS[:, : alone.tokens_BS.shape[1]] = alone.tokens_BS
        padded.pixels[0][:] = alone.pixels[0]
    packs.append(packs[0])  # the interleaved schedule wants a multiple of the stages
    return [(p, torch.zeros_like(p.image_BS, dtype=torch.bool)) for p in packs]


def train_and_save(layout, config):
    """Job: a few steps and a checkpoint; what it holds, and this rank's outputs for the prompts."""
    trainer = make_trainer(config)
    for _ in range(NUM_STEPS):
        train.train_step(trainer)
    train.save(trainer)
    state = state_shards(trainer)
    outputs = model_outputs(trainer.stages, micro_batches()) if not config.training.bf16 else None
    return state, outputs


def trained_tensors(checkpoint, state):
    """The tensors of an export that a trainer's state means, by name; fp32."""
    whole = whole_tensors(state)
    assert whole.keys() == checkpoint.weights.keys()
    tensors = {}
    for key, weight in checkpoint.weights.items():
        # By its own join from row numbers: the converter's splitting is what is tested here.
        numbers = weight.join(list(torch.arange(weight.size[0]).split([size[0] for size in weight.sizes])))
        ordered = torch.empty_like(whole[key])
        ordered[numbers] = whole[key]
        rows = ordered.split([size[0] for size in weight.sizes])
        tensors.update(zip(weight.hugging_face, rows, strict=True))
    return tensors


def state_after_starts(layout, configs):
    """Job: this rank's state after starting with each configuration."""
    states = []
    for config in configs:
        states.append(state_shards(make_trainer(config)))
        leave()
    return states


TRAINED = [
    pytest.param(Layout(), "tied", {}, marks=IN_OTHERS),
    (Layout(tp=2), "untied", {"bf16": True}),
    (Layout(tp=4), "tied", {"positions": "1d", "centre_momentum": None, "mim_target": "pixels"}),
    pytest.param(Layout(pp=2), "tied", {"bf16": True}, marks=IN_OTHERS),
    (Layout(pp=2, vpp_layers=1), "untied", {}),
    (Layout(pp=2, first_layers=1), "tied", {"attention": "causal"}),
    (FOUR, "untied", {"positions": "mrope", "vision_head_output_size": 48}),
]


@pytest.mark.parametrize("layout, model, settings", TRAINED, ids=str)
def test_trained_checkpoints(pool, files, tmp_path, layout, model, settings):
    """Export, conversion back, exports again, and starts from all of these at another layout."""
    start = {"load": f"hf:{getattr(files, model)}", **settings}
    config = make_config(files, tmp_path / "run", layout, **start)
    results = pool.run(train_and_save, layout, config)
    state, outputs = [state for state, _ in results], [output for _, output in results if output is not None]
    written = latest_checkpoint(tmp_path / "run/checkpoints")
    check_exports(written, state, tmp_path, bf16=config.training.bf16)
    if not config.training.bf16:
        assert len(outputs) == layout.tp
        for output in outputs:
            check_outputs(tmp_path / "export", output)
    other = Layout(pp=2) if layout == FOUR else FOUR
    loads = {"load": f"hf:{tmp_path / 'export'}"}, {"load": str(tmp_path / written.name)}
    configs = [make_config(files, tmp_path / "other", other, **{**start, **load}) for load in loads]
    expected = whole_tensors(state)
    started = pool.run(state_after_starts, other, configs)
    for number in range(len(configs)):
        found = whole_tensors([states[number] for states in started])
        assert_same_tensors(found, expected)


_CROP = {"do_center_crop": True, "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
OTHER_ENCODERS = {
    "clip": (Layout(tp=2), {"image_processor_type": "CLIPImageProcessor", **_CROP}),
    "qwen2_5_vl": (FOUR, {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 4, "merge_size": 2}),
    "patches": (Layout(pp=2), {"image_processor_type": "CLIPImageProcessor", "do_center_crop": False}),
}


@pytest.mark.parametrize("kind", OTHER_ENCODERS)
def test_trained_checkpoints_with_other_encoders(pool, files, tmp_path, kind):
    """With a class token, of native resolution, and without weights; the encoder trains along, if it has any."""
    layout, processor = OTHER_ENCODERS[kind]
    save_encoder(tmp_path / "encoder", kind)
    (tmp_path / "encoder/preprocessor_config.json").write_text(json.dumps(processor))
    with_encoder = replace(files, encoder=tmp_path / "encoder")
    start = {"load": f"hf:{files.tied}", "freeze": (), "mask_sampling": "bernoulli"}
    config = make_config(with_encoder, tmp_path / "run", layout, **start)
    results = pool.run(train_and_save, layout, config)
    state, outputs = [state for state, _ in results], [output for _, output in results if output is not None]
    written = latest_checkpoint(tmp_path / "run/checkpoints")
    check_exports(written, state, tmp_path, bf16=False)
    for output in outputs:
        check_outputs(tmp_path / "export", output)
    other = Layout(pp=2) if layout == FOUR else FOUR
    again = make_config(with_encoder, tmp_path / "other", other, **{**start, "load": f"hf:{tmp_path / 'export'}"})
    (found,) = zip(*pool.run(state_after_starts, other, [again]), strict=True)
    assert_same_tensors(whole_tensors(list(found)), whole_tensors(state))


def check_exports(written: Path, state, directory: Path, *, bf16: bool):
    """What training holds is in directory/export; from there back to directory/iter_*, and again to the same bytes."""
    options = {"training_state": True, "max_file_bytes": 100_000}
    megatron_to_hf(written, directory / "export", **options)
    checkpoint = open_checkpoint(written)
    expected = trained_tensors(checkpoint, state)
    exported = {**tensors_of(directory / "export"), **tensors_of(directory / "export", "training_state")}
    of_teacher = {name for name in exported if name.startswith("teacher.")}
    for name, tensor in exported.items():
        assert tensor.dtype == (torch.bfloat16 if bf16 and name not in of_teacher else torch.float32), name
    assert_same_tensors({name: tensor.float() for name, tensor in exported.items()}, expected)

    hf_to_megatron(directory / "export", directory / written.name)
    megatron_to_hf(directory / written.name, directory / "again", **options)
    assert_same_files(directory / "again", directory / "export")

    megatron_to_hf(written, directory / "teacher", weights="teacher")
    teacher = tensors_of(directory / "teacher")
    student = tensors_of(directory / "export")
    averaged = {name for name in student if name.startswith("language_model.model.layers.")}
    averaged.add("language_model.model.norm.weight")
    for name, tensor in student.items():
        accumulator = expected.get(name.replace("language_model.model.", "teacher.model."))
        assert torch.equal(teacher[name], accumulator.to(tensor.dtype) if name in averaged else tensor), name
    assert any(not torch.equal(teacher[name], tensor) for name, tensor in student.items()), "the teacher lags behind"


@torch.no_grad()
def check_outputs(export: Path, outputs):
    """transformers computes with the export what the trained model computed: logits, and hidden states of images."""
    model = AutoModelForImageTextToText.from_pretrained(export, trust_remote_code=True, dtype=torch.float32).eval()
    for number, prompt in enumerate(prompts()):
        tokens_BL = torch.where(prompt.image_BS >= 0, IMAGE_TOKEN, prompt.tokens_BS)
        pixels = model.image_inputs(prompt.pixels[0]) if prompt.pixels[0] else {}
        theirs = model(input_ids=tokens_BL, **pixels, output_hidden_states=True)
        length = tokens_BL.shape[1]
        logits_LW, hidden_LH = (whole[number, :length] for whole in (outputs.language_logits_BSW, outputs.hidden_BSH))
        is_image_L = prompt.image_BS[0] >= 0
        for ours, other in (
            (logits_LW, theirs.logits[0]),
            (hidden_LH[is_image_L], theirs.hidden_states[-1][0][is_image_L]),
        ):
            assert ours.shape == other.shape
            assert ours.numel() == 0 or ours.std() > 0.1, "too small for the tolerance to mean anything"
            assert ours.numel() == 0 or (ours - other).abs().max() <= TOLERANCE


def test_without_training_state_the_new_parts_begin_anew(pool, files, tmp_path):
    """The student is the exported one; [MASK] and vision head are those of the seed, the teacher is the student."""
    layout = Layout(tp=2)
    config = make_config(files, tmp_path / "run", layout)
    state = whole_tensors([state for state, _ in pool.run(train_and_save, layout, config)])
    megatron_to_hf(latest_checkpoint(tmp_path / "run/checkpoints"), tmp_path / "export")
    hf_to_megatron(tmp_path / "export", tmp_path / "converted")
    loads = [f"hf:{files.tied}", f"hf:{tmp_path / 'export'}", str(tmp_path / "converted")]
    configs = [make_config(files, tmp_path / "other", FOUR, load=load) for load in loads]
    results = pool.run(state_after_starts, FOUR, configs)
    fresh, *starts = (whole_tensors([states[number] for states in results]) for number in range(len(loads)))
    for started in starts:
        assert started.keys() == state.keys()
        for key, tensor in started.items():
            if key == "teacher.centre":
                assert not tensor.any() and state[key].any()
            elif key.startswith(("mask_token", "vision_head.", "teacher.vision_head.")):
                assert torch.equal(tensor, fresh[key]), key
            else:
                assert torch.equal(tensor, state[key.removeprefix("teacher.")]), key
    assert not torch.equal(fresh["mask_token"], state["mask_token"])


# --- sizes of 72B --------------------------------------------------------------------------------------

# Qwen2.5-72B cut to two of its 80 layers: 4.25 billion weights.
WIDTHS_OF_72B = {
    "num_hidden_layers": 2, "hidden_size": 8192, "intermediate_size": 29568, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 152064, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "tie_word_embeddings": False, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"],
}  # fmt: skip


def write_random_weights(directory: Path, config: dict) -> dict[str, str]:
    """A model of random bits in bf16, in files of 4 GB; the checksum of each tensor."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    weights = weight_table(ModelParts(read_model_shape(directory)))
    named = [pair for weight in weights.values() for pair in weight.hugging_face_sizes()]
    plan = plan_safetensors([TensorPlace(name, size, torch.bfloat16) for name, size in named], "model", 4_000_000_000)
    create_files([plan], directory)
    writer, generator, checksums = SafetensorsWriter([plan], directory), np.random.default_rng(72), {}
    for place in plan.places:
        digest = xxhash.xxh3_128()
        for start, stop in row_blocks(place.size, place.dtype, 256 << 20):
            bits = np.frombuffer(generator.bytes((stop - start) * place.row_bytes), np.uint8).view(np.int16).copy()
            bits &= ~0x4000  # the highest bit of the exponent: what is left is below 2
            digest.update(bits)
            writer.write_rows(place, start, torch.from_numpy(bits).view(torch.bfloat16).view(-1, *place.size[1:]))
        checksums[place.name] = digest.hexdigest()
    writer.close()
    return checksums


def checksums_of(directory: Path) -> dict[str, str]:
    """Of every tensor, read by the safetensors library."""
    checksums = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                digest = xxhash.xxh3_128()
                for rows in tensors.get_tensor(name).split(1 << 12):
                    digest.update(rows.view(torch.int16).numpy())
                checksums[name] = digest.hexdigest()
    return checksums


@pytest.mark.slow(reason="there and back, at large sizes")
def test_widths_of_72b(assets, tmp_path):
    """There and back by way of eight ranks at TP4 x PP2. Needs 17 GB of disk and 14 GB of memory;
    takes minutes."""
    layout = Layout(tp=4, pp=2)
    expected = write_random_weights(tmp_path / "hf", WIDTHS_OF_72B)
    hf_to_megatron(tmp_path / "hf", tmp_path / "converted")
    shutil.rmtree(tmp_path / "hf")
    config = make_config(assets, tmp_path, layout, laver=False, bf16=True)
    pool = Pool(layout.world_size)
    try:
        pairs = [(tmp_path / "converted", tmp_path / "trained")]
        sizes = [size for (size,) in pool.run(load_and_save, layout, config, pairs, timeout=1200)]
    finally:
        pool.close()
    assert sum(sizes) > 8.4e9 and max(sizes) < 1.1 * min(sizes), "every rank has an eighth"
    complete(tmp_path / "trained", tmp_path / "converted")
    shutil.rmtree(tmp_path / "converted")
    megatron_to_hf(tmp_path / "trained", tmp_path / "back")
    shutil.rmtree(tmp_path / "trained")
    assert checksums_of(tmp_path / "back") == expected
    shutil.rmtree(tmp_path / "back")
