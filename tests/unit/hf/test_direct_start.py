"""Loading safetensors directories: right to the last weight, and errors that say which file and which tensor."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from laver_megatron.hf.direct_start import load_hugging_face
from laver_megatron.hf.rows import split
from laver_megatron.hf.safetensors_reader import SafetensorsReader
from laver_megatron.hf.weights import ModelParts, weight_table
from laver_megatron.model.build import build_stages
from laver_megatron.runtime.sharded_state import sharding_metadata
from tests.parity import Checkpoints, parity_config, write_checkpoints

pytestmark = pytest.mark.usefixtures("single_process")

NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """One checkpoint in a single file, and the same in several with an index."""
    directory = tmp_path_factory.mktemp("checkpoints")
    single = write_checkpoints(directory / "single", tied=False, num_layers=2)
    several = write_checkpoints(directory / "several", tied=False, num_layers=2, max_shard_size="50KB")
    assert len(list(several.model.glob("model-*.safetensors"))) > 2
    return {"single": single, "several": several}


@pytest.fixture
def damaged(written, tmp_path):
    """A copy of the single-file checkpoint to damage."""
    shutil.copytree(written["single"].model, tmp_path / "model")
    return Checkpoints(tmp_path / "model", written["single"].encoder)


def load(checkpoints, **changes):
    config = parity_config(checkpoints, **changes)
    stages = build_stages(config, checkpoints.shape, checkpoints.encoder, load_encoder=True)
    for stage in stages:
        stage.initialise_new_parts(1)
    load_hugging_face(stages, checkpoints.model, sharding_metadata())
    return stages


def change(checkpoints, edit):
    """Rewrites model.safetensors after `edit(tensors)`."""
    path = checkpoints.model / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("files", ["single", "several"])
def test_every_weight_arrives(written, files):
    (stage,) = load(written[files])
    theirs = {}
    for path in written["single"].model.glob("*.safetensors"):
        theirs.update(load_file(path))
    weights, seen = weight_table(ModelParts(stage.shape)), set()
    for name, parameter in stage.named_parameters():
        if not name.startswith(("decoder.", "embedding.", "output_layer.")):
            continue
        key = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
        weight = weights[key.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")]
        for hf_name, part in zip(weight.hugging_face, split(weight, parameter.detach().cpu()), strict=True):
            assert torch.equal(part, theirs[hf_name]), hf_name
            seen.add(hf_name)
    assert seen == set(theirs)


def test_bf16_files_fill_fp32_weights(damaged):
    change(damaged, lambda t: t.update({name: tensor.bfloat16() for name, tensor in t.items()}))
    (stage,) = load(damaged)
    weight = load_file(damaged.model / "model.safetensors")["model.norm.weight"]
    assert stage.decoder.final_layernorm.weight.dtype == torch.float32
    assert torch.equal(stage.decoder.final_layernorm.weight.cpu(), weight.float())


def test_a_tied_checkpoint_needs_no_lm_head(tmp_path):
    checkpoints = write_checkpoints(tmp_path, tied=True, num_layers=1)
    assert "lm_head.weight" not in load_file(checkpoints.model / "model.safetensors")
    (stage,) = load(checkpoints)
    shared = stage.shared_embedding_or_output_weight()
    assert shared is stage.embedding.word_embeddings.weight and shared.isfinite().all()


def expect_error(checkpoints, *parts):
    with pytest.raises(ValueError) as error:
        load(checkpoints)
    for part in parts:
        assert str(part) in str(error.value), (part, str(error.value))


def test_missing_tensor(damaged):
    change(damaged, lambda t: t.pop(NORM))
    expect_error(damaged, damaged.model, NORM)


def test_surplus_layer(damaged):
    def add_layer(tensors):
        tensors["model.layers.2.input_layernorm.weight"] = tensors[NORM].clone()

    change(damaged, add_layer)
    expect_error(damaged, "model.safetensors", "model.layers.2.input_layernorm.weight", "27 tensors")


def test_missing_part_of_a_fused_tensor(damaged):
    change(damaged, lambda t: t.pop("model.layers.0.self_attn.k_proj.bias"))
    expect_error(damaged, damaged.model, "model.layers.0.self_attn.k_proj.bias")


def test_wrong_shape(damaged):
    change(damaged, lambda t: t.update({NORM: torch.ones(63)}))
    expect_error(damaged, damaged.model, NORM, "(63,)", "(64,)")


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_wrong_shape_in_a_fused_tensor(damaged, part):
    """Also a number of rows that no head divides, and parts that do not fit one another."""
    name = f"model.layers.0.self_attn.{part}_proj.weight"
    for rows, columns in ((33, 64), (48, 64), (64 if part == "q" else 32, 63)):
        change(damaged, lambda t, size=(rows, columns): t.update({name: torch.ones(size)}))
        expect_error(damaged, damaged.model, name, f"({rows}, {columns})")


def test_exchanged_shapes_in_a_fused_tensor(damaged):
    """Query and key of exchanged sizes still make a tensor of the right size; it is the wrong tensor."""

    def exchange(tensors):
        names = [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qk"]
        tensors.update(zip(names, [tensors[name] for name in reversed(names)], strict=True))

    change(damaged, exchange)
    expect_error(damaged, damaged.model, "model.layers.0.self_attn.q_proj.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(damaged, value):
    def spoil(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value

    change(damaged, spoil)
    expect_error(damaged, damaged.model / "model.safetensors", "model.layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize("keep", [0, 5, 100, -10])
def test_truncated_file(damaged, keep):
    path = damaged.model / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:keep])
    expect_error(damaged, path, "damaged")


def test_index_names_a_missing_file(written, tmp_path):
    shutil.copytree(written["several"].model, tmp_path / "model")
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    gone = index["weight_map"][NORM]
    (tmp_path / "model" / gone).unlink()
    expect_error(Checkpoints(tmp_path / "model", written["several"].encoder), tmp_path / "model", gone)


def test_index_names_the_wrong_file(written, tmp_path):
    shutil.copytree(written["several"].model, tmp_path / "model")
    path = tmp_path / "model/model.safetensors.index.json"
    index = json.loads(path.read_text())
    other = next(f for f in index["weight_map"].values() if f != index["weight_map"][NORM])
    index["weight_map"][NORM] = other
    path.write_text(json.dumps(index))
    expect_error(Checkpoints(tmp_path / "model", written["several"].encoder), f"places it in {other}", NORM)


@pytest.mark.parametrize("content", ["{", "[]", '{"metadata": {}}', ""])
def test_unreadable_index(written, tmp_path, content):
    shutil.copytree(written["several"].model, tmp_path / "model")
    path = tmp_path / "model/model.safetensors.index.json"
    path.write_text(content)
    expect_error(Checkpoints(tmp_path / "model", written["several"].encoder), path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/tmp/outside.safetensors"])
def test_index_may_not_leave_the_directory(written, tmp_path, name):
    shutil.copytree(written["several"].model, tmp_path / "model")
    path = tmp_path / "model/model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][NORM] = name
    path.write_text(json.dumps(index))
    expect_error(Checkpoints(tmp_path / "model", written["several"].encoder), path, name)


def test_pickled_weights_alone(damaged):
    (damaged.model / "model.safetensors").rename(damaged.model / "pytorch_model.bin")
    expect_error(damaged, damaged.model, "model.safetensors", "pytorch_model.bin", "save_pretrained")


def test_no_weights_at_all(damaged):
    (damaged.model / "model.safetensors").unlink()
    expect_error(damaged, damaged.model, "model.safetensors.index.json")


def test_files_are_opened_when_needed_and_bytes_counted(written):
    with SafetensorsReader(written["several"].model) as tensors:
        assert tensors._open == {}
        assert tensors.read(NORM, 0, 64).shape == (64,)
        assert len(tensors._open) == 1
        assert tensors.read("model.embed_tokens.weight", 3, 5, slice(8, 24)).shape == (2, 16)
        assert tensors.num_bytes_read == 4 * (64 + 2 * 16)
        with pytest.raises(ValueError, match="no tensor model.layers.9"):
            tensors.size("model.layers.9.input_layernorm.weight")


def test_quantised_weights(damaged):
    change(damaged, lambda t: t.update({NORM: torch.ones(64, dtype=torch.int8)}))
    expect_error(damaged, damaged.model, NORM, "I8", "quantised")


def test_parts_of_one_tensor_in_different_types(damaged):
    name = "model.layers.0.self_attn.k_proj.weight"
    change(damaged, lambda t: t.update({name: t[name].bfloat16()}))
    expect_error(damaged, damaged.model, name, "bfloat16", "float32")
