"""Converters and checks with an encoder of each family: from its own directory through a training model to an export.

The checkpoint is written by the training model itself, which reads the encoder as a run does.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from laver_megatron.checkpoint.manifest import describe, files_of, write_manifest
from laver_megatron.convert.export import modeling_laver
from laver_megatron.convert.export.modeling_laver import LaverConfig
from laver_megatron.convert.hf_to_megatron import hf_to_megatron, open_source
from laver_megatron.convert.megatron_to_hf import megatron_to_hf
from laver_megatron.convert.verification.forward import (
    MegatronModel,
    input_problems,
    megatron_outputs,
    transformers_outputs,
)
from laver_megatron.convert.verification.pair import key_problems, open_pair, setting_problems, value_problems
from laver_megatron.convert.verification.probes import make_probes, pack_probes
from laver_megatron.convert.verification.verify import difference_of
from laver_megatron.demo.models import save_language_model
from laver_megatron.encoders import open_preprocessor, read_encoder
from laver_megatron.hf.direct_start import load_hugging_face
from laver_megatron.hf.files import copy_model_files
from laver_megatron.hf.parts import settings_of_checkpoint, settings_of_export
from laver_megatron.hf.shape import TEXT_PART, VISION_PART, read_model_shape
from laver_megatron.model.build import build_stages
from laver_megatron.runtime.sharded_state import sharding_metadata
from tests.conversions import assert_same_files, tensors_of
from tests.exports import published_name
from tests.unit.convert.encoders import FEATURE_LAYERS, KINDS, NATIVE, load_vision_model, save_encoder

# Megatron-Core writes the checkpoints, in processes of its own.
pytestmark = [pytest.mark.usefixtures("single_process"), pytest.mark.processes]

# fp32, sums of some hundred products in either order through ten layers.
TOLERANCE = 1e-4
# Fewer visual tokens than the image processors of the native encoders allow.
CAP = 20


@dataclass(frozen=True)
class Trained:
    """A checkpoint of the training model, what it was built from, and its export."""

    model: MegatronModel
    encoder: Path
    export: Path


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    """A Qwen2.5 with large weights, so that a wrong mask or position shows."""
    directory = tmp_path_factory.mktemp("qwen")
    save_language_model(directory, ["Describe this picture in one sentence."])
    tensors, generator = load_file(directory / "model.safetensors"), torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            tensors[name] = 1.2 * tensor.shape[1] ** -0.5 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    """Wide, high, small, and longer than any cap."""
    directory, found = tmp_path_factory.mktemp("pictures"), []
    for number, size in enumerate([(90, 80), (40, 120), (9, 7), (3000, 20)]):
        found.append(directory / f"{number}.png")
        Image.radial_gradient("L").resize(size).rotate(30 * number).convert("RGB").save(found[-1])
    return found


@pytest.fixture(scope="module")
def trained(model_dir, tmp_path_factory):
    """By the encoder's kind and settings of the run."""
    made = {}

    def make(kind: str, **settings) -> Trained:
        key = kind, *settings.items()
        if key not in made:
            made[key] = _train(kind, model_dir, tmp_path_factory.mktemp("trained"), settings)
        return made[key]

    return make


@torch.no_grad()
def _train(kind: str, model_dir: Path, directory: Path, settings: dict) -> Trained:
    """A training model from two Hugging Face directories, written as a run would, and its export."""
    encoder_dir, megatron = save_encoder(kind, directory / "encoder"), directory / "iter_0000003"
    run = {"weights_only": True, "attention": "mixed", "positions": "2d", "max_image_tokens": None, **settings}
    run["encoder_feature_layer"] = read_encoder(encoder_dir).feature_layer(None)
    megatron.mkdir()
    (megatron / "run.json").write_text(json.dumps(run))
    copy_model_files(model_dir, megatron / "hf", TEXT_PART)
    copy_model_files(encoder_dir, megatron / "encoder", VISION_PART)
    model = MegatronModel(megatron, "student", settings_of_checkpoint(megatron))
    config = model.config(pack_probes(make_probes(model_dir, None, ["a"], [])), 1, 1)
    (stage,) = build_stages(config, read_model_shape(model_dir), encoder_dir, load_encoder=True)
    stage.initialise_new_parts(1)
    load_hugging_face([stage], model_dir, sharding_metadata())
    torch.manual_seed(2)
    for parameter in stage.connector.parameters():
        parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    dist_checkpointing.save(stage.sharded_state_dict(metadata=sharding_metadata()), str(megatron))
    write_manifest(megatron, {str(file.relative_to(megatron)): describe(file) for file in files_of(megatron)})
    megatron_to_hf(megatron, directory / "export", max_file_bytes=400_000)
    return Trained(model, encoder_dir, directory / "export")


RUNS = [(kind, {"max_image_tokens": CAP} if kind in NATIVE else {}) for kind in KINDS] + [
    ("qwen2_5_vl", {"positions": "mrope"}),
    ("aimv2", {"positions": "1d", "attention": "causal"}),
]


@pytest.mark.parametrize(("kind", "settings"), RUNS, ids=str)
def test_an_export_computes_what_the_training_model_computes(kind, settings, trained, pictures):
    """Tokens, pixels, logits and hidden states, at text and at images of different sizes."""
    found = trained(kind, **settings)
    pair = open_pair(found.export, found.model.checkpoint, "student")
    assert key_problems(pair) == () == setting_problems(pair) and not value_problems(pair)
    cap = found.model.settings.max_image_tokens
    prompts = ["Text alone.", "<image>", "Two, <image> and <image>:", "<image><image> touch"]
    probes = make_probes(found.model.checkpoint / "hf", found.model.encoder_dir, prompts, pictures, cap)
    assert input_problems(found.export, probes) == []
    theirs = transformers_outputs(found.export, probes)
    ours = megatron_outputs(found.model, probes, pack_probes(probes), (1, 1))
    assert not theirs.unread and not ours.unread
    difference = difference_of(probes, theirs, ours)
    print(f"{kind} {settings}: {difference}")
    assert 0 < difference.logits <= TOLERANCE and 0 < difference.images <= TOLERANCE and difference.hidden <= TOLERANCE
    assert min(logits.std() for logits in theirs.logits_TW) > 0.1
    sizes = {int(probe.visual_T.sum()) for probe in probes if len(probe.pixels) == 1}
    assert max(sizes) <= (cap or 64)


@pytest.mark.parametrize("kind", KINDS)
def test_the_encoder_s_tensors_arrive_under_published_names(kind, trained):
    """Of whole checkpoints the vision model's alone."""
    found = trained(kind, **dict(RUNS)[kind] if kind in NATIVE else {})
    exported = {name: t for name, t in tensors_of(found.export).items() if name.startswith("vision_tower.")}
    model = load_vision_model(kind, found.encoder)
    state = {} if model is None else dict(model.named_parameters())
    expected = {f"vision_tower.{published_name(name, model.config.model_type)}": t for name, t in state.items()}
    assert exported.keys() == expected.keys() and bool(exported) == (kind != "patches")
    for name, tensor in exported.items():
        assert torch.equal(tensor, expected[name]), name
    config = json.loads((found.export / "config.json").read_text())
    assert config["vision_feature_layer"] == FEATURE_LAYERS[kind]
    assert "text_config" not in config["vision_config"]


@pytest.mark.parametrize(("kind", "settings"), RUNS, ids=str)
def test_there_and_back_again(kind, settings, trained, tmp_path):
    """Export -> Megatron -> export: the same bytes; how it was trained comes along, the cap included."""
    found = trained(kind, **settings)
    hf_to_megatron(found.export, tmp_path / found.model.checkpoint.name)
    megatron_to_hf(tmp_path / found.model.checkpoint.name, tmp_path / "back", max_file_bytes=400_000)
    assert_same_files(tmp_path / "back", found.export)
    assert settings_of_checkpoint(tmp_path / found.model.checkpoint.name) == found.model.settings
    assert settings_of_export(found.export) == found.model.settings


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_training_starts_from_an_export(kind, trained, model_dir):
    """`--load hf:EXPORT` fills every weight with the exported one."""
    found = trained(kind, **dict(RUNS)[kind] if kind in NATIVE else {})
    stages = []
    for directory in (None, found.export):
        config = found.model.config(pack_probes(make_probes(model_dir, None, ["a"], [])), 1, 1)
        encoder_dir = directory or found.model.encoder_dir
        (stage,) = build_stages(config, read_model_shape(directory or model_dir), encoder_dir)
        stage.initialise_new_parts(1)
        if directory:
            load_hugging_face([stage], directory, sharding_metadata())
        else:
            loaded = dist_checkpointing.load(
                stage.sharded_state_dict(metadata=sharding_metadata()), str(found.model.checkpoint)
            )
            stage.load_state_dict(loaded)
        stages.append(stage)
    first, second = (dict(stage.named_parameters()) for stage in stages)
    assert first.keys() == second.keys()
    for name, parameter in first.items():
        assert torch.equal(parameter, second[name]), name
    assert any(name.startswith("encoder.") for name in first) == (kind != "patches")


def test_an_encoder_whose_file_says_little(tmp_path, trained):
    """What transformers assumed in training is written out, for tools that read Llava's format and for later versions
    of transformers with other defaults."""
    found = trained("siglip")
    checkpoint = tmp_path / "iter_0000003"
    shutil.copytree(found.model.checkpoint, checkpoint)
    said = json.loads((checkpoint / "encoder" / "config.json").read_text())
    silent = ("num_channels", "hidden_act", "layer_norm_eps", "attention_dropout")
    kept = {name: value for name, value in said.items() if name not in silent}
    (checkpoint / "encoder" / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": kept}))
    write_manifest(checkpoint, {str(f.relative_to(checkpoint)): describe(f) for f in files_of(checkpoint)})
    megatron_to_hf(checkpoint, tmp_path / "export", max_file_bytes=400_000)
    written = json.loads((tmp_path / "export" / "config.json").read_text())["vision_config"]
    assert all(written[name] == said[name] for name in silent) and written["model_type"] == "siglip_vision_model"
    theirs, before = (LaverConfig.from_pretrained(path).vision_config for path in (tmp_path / "export", found.export))
    assert theirs.to_diff_dict() == before.to_diff_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_export_s_code_says_of_the_encoder_is_what_training_says(kind, trained):
    """The one file of an export repeats these facts, because it cannot import this package."""
    found = trained(kind, **dict(RUNS)[kind] if kind in NATIVE else {})
    ours = read_encoder(found.encoder)
    theirs = LaverConfig.from_pretrained(found.export).vision_config
    assert modeling_laver.is_native(theirs) == ours.is_native == (kind in NATIVE)
    assert modeling_laver.token_side(theirs) == ours.token_size
    assert modeling_laver.feature_size(theirs) == ours.feature_size
    assert modeling_laver.num_prefix_tokens(theirs) == ours.num_prefix_tokens
    assert modeling_laver.has_feature_layers(theirs) == (ours.default_feature_layer is not None)


# --- caps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NATIVE)
def test_the_cap_of_the_run_is_the_export_s(kind, trained, tmp_path):
    capped, plain = trained(kind, max_image_tokens=CAP), trained(kind)
    written = [json.loads((run.export / "processor_config.json").read_text()) for run in (capped, plain)]
    side = written[0]["patch_size"]
    assert [content["max_pixels"] for content in written] == [CAP * side**2, 64 * side**2]
    assert f"at most {CAP} visual tokens" in (capped.export / "README.md").read_text()
    assert settings_of_export(plain.export).max_image_tokens is None
    assert open_preprocessor(capped.model.encoder_dir, CAP).grid(3, 3000) == (CAP, 1)
    copied = shutil.copytree(capped.export, tmp_path / "copy")
    for content, message in (
        ("{}", "max_pixels is None, but must be at least"),
        ('{"max_pixels": 7}', "max_pixels is 7, but must be at least"),
        ("[", "cannot be read"),
    ):
        (copied / "processor_config.json").write_text(content)
        with pytest.raises(ValueError, match=f"processor_config.json.*{message}"):
            open_source(copied)


@pytest.mark.parametrize("kind", ["clip", "qwen2_5_vl"])
def test_an_export_whose_processor_transformers_has_saved_again(kind, trained, tmp_path, pictures):
    """transformers 5 leaves processor_config.json alone, with the image processor in it."""
    export = trained(kind, **({"max_image_tokens": CAP} if kind in NATIVE else {})).export
    again = shutil.copytree(export, tmp_path / "again")
    (again / "preprocessor_config.json").unlink()
    AutoProcessor.from_pretrained(export, trust_remote_code=True).save_pretrained(again)
    assert "image_processor" in json.loads((again / "processor_config.json").read_text())
    assert not (again / "preprocessor_config.json").exists()
    assert settings_of_export(again) == settings_of_export(export)
    hf_to_megatron(again, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    ours = open_preprocessor(export)
    for picture in map(Image.open, pictures):
        for other in (again, tmp_path / "megatron" / "encoder", tmp_path / "back"):
            assert torch.equal(open_preprocessor(other)(picture), ours(picture))
    assert (tmp_path / "back" / "processor_config.json").read_text() == (export / "processor_config.json").read_text()


def test_layers_are_held_against_the_encoder(trained, tmp_path):
    for kind, value, message in (
        ("qwen2_5_vl", -2, "vision_feature_layer is -2, but qwen2_5_vl_vision has no choice of layers; write null"),
        ("clip", None, "does not say vision_feature_layer"),
        ("clip", 5, "vision_feature_layer is 5, but must be from -4 to 3"),
    ):
        copied = shutil.copytree(trained(kind).export, tmp_path / f"{kind}{value}")
        config = json.loads((copied / "config.json").read_text())
        (copied / "config.json").write_text(json.dumps({**config, "vision_feature_layer": value}))
        with pytest.raises(ValueError, match=message):
            open_source(copied)


# --- llava ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_llava_computes_the_same_with_clip(trained, pictures, tmp_path):
    found = trained("clip", positions="1d", attention="causal")
    megatron_to_hf(found.model.checkpoint, tmp_path / "llava", format="llava")
    assert type(LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava")) is LlavaForConditionalGeneration
    pair = open_pair(tmp_path / "llava", found.model.checkpoint, "student")
    assert key_problems(pair) == () == setting_problems(pair)
    probes = make_probes(found.model.checkpoint / "hf", found.model.encoder_dir, (), pictures)
    assert input_problems(tmp_path / "llava", probes) == []
    theirs = transformers_outputs(tmp_path / "llava", probes)
    difference = difference_of(probes, theirs, megatron_outputs(found.model, probes, pack_probes(probes), (1, 1)))
    assert 0 < difference.logits <= TOLERANCE and 0 < difference.images <= TOLERANCE


def test_llava_is_refused_before_anything_is_written(trained, tmp_path):
    checkpoint = trained("dinov2_with_registers").model.checkpoint
    with pytest.raises(ValueError, match="cannot hold an encoder of type dinov2_with_registers: .*--format laver"):
        megatron_to_hf(checkpoint, tmp_path / "llava", format="llava")
    assert not list(tmp_path.iterdir())
