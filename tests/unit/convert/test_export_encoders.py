"""The exported model with an encoder of each family: features, pictures of different sizes, answers.

Letters: L tokens, H width.
"""

import functools
import importlib.util
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, Qwen2ForCausalLM
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from laver_megatron.convert.export import modeling_laver
from laver_megatron.convert.export.modeling_laver import LaverConfig, LaverForConditionalGeneration, LaverProcessor
from laver_megatron.demo.models import save_language_model
from laver_megatron.encoders.native import native_size as training_size
from tests.unit.convert.encoders import (
    FEATURE_LAYERS,
    KINDS,
    NATIVE,
    NUM_PREFIX_TOKENS,
    load_vision_model,
    vision_config,
    write_family_export,
)

CHAT = Path(__file__).parents[3] / "examples" / "chat.py"

# Features go through some layers of small sums in fp32.
TOLERANCE = 1e-5
# Wide, high, smaller than a visual token, longer than any cap, and as it is.
SIZES = [(90, 50), (40, 120), (5, 7), (3000, 20), (64, 64)]
TEXTS = ["Look: <image> and <image>?", "no picture", "<image><image>", "<image> what?"]


@dataclass(frozen=True)
class Export:
    """An export, opened, and the directory of its encoder."""

    directory: Path
    encoder: Path
    model: LaverForConditionalGeneration
    processor: LaverProcessor


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_language_model(directory, ["What is in this picture? A cat and two dogs, I think."])
    return directory


@pytest.fixture(scope="module")
def export(model_dir, tmp_path_factory) -> Callable[..., Export]:
    @functools.cache
    def make(kind: str, positions: str = "2d") -> Export:
        directory = tmp_path_factory.mktemp("exports")
        found = write_family_export(kind, directory, model_dir, positions=positions)
        model, info = LaverForConditionalGeneration.from_pretrained(found, output_loading_info=True)
        assert not any(info.values()), info
        return Export(found, directory / "encoder", model.eval(), LaverProcessor.from_pretrained(found))

    return make


@functools.cache
def picture(number: int) -> Image.Image:
    width, height = SIZES[number]
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8))


PICTURES = [[0, 1], [], [2, 3], [4]]


def inputs_of(processor: LaverProcessor, rows: Sequence[int] = (0, 1, 2, 3)) -> dict[str, Tensor]:
    pictures = [picture(number) for row in rows for number in PICTURES[row]]
    return processor(text=[TEXTS[row] for row in rows], images=pictures, padding=True, return_tensors="pt")


# --- features ------------------------------------------------------------------------------------------


@torch.no_grad()
def features_by_hand(kind: str, encoder: Path, image: Image.Image) -> Tensor:
    """The features of a picture from transformers' own classes and the encoder's own image processor."""
    model, processor = load_vision_model(kind, encoder), AutoImageProcessor.from_pretrained(encoder, backend="pil")
    if kind == "qwen2_5_vl":
        made = processor(images=image, return_tensors="pt")
        return model(made["pixel_values"], made["image_grid_thw"]).pooler_output
    options = {}
    if kind in NATIVE:
        side = 8 if kind == "aimv2" else 16
        height, width = smart_resize(image.height, image.width, side, 1, 64 * side**2)
        options = {"size": {"height": height, "width": width}}
    pixels = processor(images=image, return_tensors="pt", **options)["pixel_values"]
    if model is None:
        return torch.nn.functional.unfold(pixels, 16, stride=16)[0].T
    states = model(pixels, output_hidden_states=True).hidden_states
    return states[FEATURE_LAYERS[kind]][0, NUM_PREFIX_TOKENS.get(kind, 0) :]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_features_are_those_of_transformers(kind, export):
    """Pictures of different sizes in one call. (The longest is cut down to the cap, which transformers does not.)"""
    found = export(kind)
    within = [number for number in range(len(SIZES)) if number != 3]
    made = found.processor(text="<image>" * len(within), images=[picture(i) for i in within], return_tensors="pt")
    ours_TH = found.model.get_image_features(made["pixel_values"], made.get("image_grids"))
    features = [features_by_hand(kind, found.encoder, picture(i)) for i in within]
    theirs_TH = found.model.multi_modal_projector(torch.cat(features))
    assert ours_TH.shape == theirs_TH.shape and theirs_TH.std() > 0.1
    assert (ours_TH - theirs_TH).abs().max() <= TOLERANCE
    if kind in NATIVE:
        assert made["image_grids"].prod(1).tolist() == [len(own) for own in features]
        assert len({len(own) for own in features}) > 2
        longest = found.processor(text="<image>", images=picture(3), return_tensors="pt")["image_grids"]
        assert longest.tolist() == [[1, 64]]


def test_the_layer_and_the_dropped_tokens_matter(export):
    """Otherwise the test above would say little."""
    for kind in KINDS:
        model = export(kind).model
        assert modeling_laver.num_prefix_tokens(model.config.vision_config) == NUM_PREFIX_TOKENS.get(kind, 0)
        if FEATURE_LAYERS[kind] is None:
            continue
        made = inputs_of(export(kind).processor, [3])
        pictures = made["pixel_values"], made.get("image_grids")
        with torch.no_grad():
            before = model.get_image_features(*pictures)
            model.config.vision_feature_layer -= 1
            after = model.get_image_features(*pictures)
            model.config.vision_feature_layer += 1
        assert before.shape == after.shape and (before - after).abs().max() > 0.1


# --- the size of a picture -----------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [1280, 257, 24])
def test_sizes_are_those_of_qwen_within_the_cap(max_tokens):
    """Qwen's own arithmetic may make more tokens of a long picture than its limit allows; ours never does."""
    generator = random.Random(max_tokens)
    side, min_pixels, capped = 28, 56 * 56, 0
    max_pixels = max_tokens * side**2 + generator.randrange(side**2)
    sizes = [(generator.randint(1, 3000), generator.randint(1, 3000)) for _ in range(2000)]
    for height, width in [*sizes, (20, 3000), (3000, 20)]:
        if max(height, width) > 200 * min(height, width):
            continue
        ours = modeling_laver.native_size(width, height, side, min_pixels, max_pixels)
        assert ours == training_size(width, height, side, min_pixels=min_pixels, max_pixels=max_pixels)
        theirs = smart_resize(height, width, side, min_pixels, max_pixels)
        rows, columns = ours[0] // side, ours[1] // side
        assert ours == (rows * side, columns * side) and 1 <= rows * columns <= max_tokens
        if theirs[0] * theirs[1] <= max_pixels:
            assert ours == theirs
        else:
            assert min(ours) == min(theirs) == side and max(ours) == max_tokens * side
            capped += 1
    assert bool(capped) == (max_tokens == 24)


# --- answers -------------------------------------------------------------------------------------------


@torch.no_grad()
def answer_without_cache(found: Export, inputs: dict[str, Tensor], length: int) -> list[int]:
    """Greedy answer without an end, every token from a pass over the whole sequence."""
    ends = found.model.generation_config.eos_token_id
    never = [found.model.config.image_token_id, *(ends if isinstance(ends, list) else [ends])]
    ids, pictures = inputs["input_ids"], {name: inputs.get(name) for name in ("pixel_values", "image_grids")}
    for _ in range(length):
        logits = found.model(input_ids=ids, **pictures, use_cache=False).logits[:, -1]
        logits[:, never] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


@pytest.mark.parametrize(
    ("kind", "positions"), [*((kind, "2d") for kind in KINDS), ("qwen2_5_vl", "mrope"), ("qwen2_5_vl", "1d")]
)
def test_generate_gives_what_whole_passes_give(kind, positions, export):
    """A batch with left padding, pictures of different sizes, and a row of text alone; greedy and with beams, where
    every sequence's pictures are repeated together."""
    found = export(kind, positions)
    inputs = inputs_of(found.processor)
    length = inputs["input_ids"].shape[1]
    assert (inputs["attention_mask"][:, 0] == 0).any()
    answers = found.model.generate(**inputs, **GREEDY)[:, length:]
    beams = found.model.generate(**inputs, **GREEDY, num_beams=2, num_return_sequences=2)[:, length:]
    for row in range(len(TEXTS)):
        single = inputs_of(found.processor, [row])
        assert answers[row].tolist() == answer_without_cache(found, single, 5), row
        alone = found.model.generate(**single, **GREEDY, num_beams=2, num_return_sequences=2)
        assert beams[2 * row : 2 * row + 2].tolist() == alone[:, single["input_ids"].shape[1] :].tolist(), row


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "patches"])
@torch.no_grad()
def test_text_alone_is_qwen(kind, export, model_dir):
    found = export(kind)
    qwen = Qwen2ForCausalLM(found.model.config.text_config).eval()
    qwen.load_state_dict(found.model.language_model.state_dict())
    ids = inputs_of(found.processor, [1])["input_ids"]
    assert (found.model(ids).logits - qwen(ids).logits).abs().max() <= TOLERANCE


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "patches", "clip"])
@torch.no_grad()
def test_bf16_answers_too(kind, export):
    found = export(kind)
    half = LaverForConditionalGeneration.from_pretrained(found.directory, dtype=torch.bfloat16).eval()
    inputs = inputs_of(found.processor).to("cpu", torch.bfloat16)  # as callers do: pixels, but not their grids
    gap = half(**inputs).logits.float() - found.model(**inputs_of(found.processor)).logits
    # bf16 rounds to 1 in 256 at every operation of some layers, on logits of deviation 1.5.
    assert gap[inputs["attention_mask"].bool()].abs().mean() < 0.15
    assert half.generate(**inputs, **GREEDY).shape[1] == inputs["input_ids"].shape[1] + 5


def test_chat_shows_pictures_of_different_sizes(export, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("chat_example", CHAT)
    chat = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(chat)
    files = [tmp_path / f"{number}.png" for number in (0, 1)]
    for number, file in enumerate(files):
        picture(number).save(file)
    options = ["--model", str(export("qwen2_5_vl").directory), "--max-new-tokens", "4", "--device", "cpu"]
    assert chat.main([*options, "--image", *map(str, files), "--question", "What is this?"]) == 0
    assert capsys.readouterr().out.strip()


# --- files ---------------------------------------------------------------------------------------------


@pytest.mark.processes
def test_exports_need_nothing_of_this_package(export, tmp_path):
    """In a process where laver_megatron cannot be imported: the same tokens, pixels and logits as here."""
    script = f"""
import json, sys
sys.modules["laver_megatron"] = None
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
pictures = [Image.open(f"{{number}}.png") for number in (0, 1)]
for kind, directory in json.loads(sys.argv[1]).items():
    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
    model, info = AutoModelForImageTextToText.from_pretrained(
        directory, trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values()), info
    inputs = processor(text={TEXTS[0]!r}, images=pictures, return_tensors="pt")
    with torch.no_grad():
        torch.save({{**inputs, "logits": model(**inputs).logits}}, f"{{kind}}.pt")
"""
    for number in (0, 1):
        picture(number).save(tmp_path / f"{number}.png")
    directories = json.dumps({kind: str(export(kind).directory) for kind in KINDS})
    command = [sys.executable, "-c", script, directories]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    for kind in KINDS:
        theirs, inputs = torch.load(tmp_path / f"{kind}.pt"), inputs_of(export(kind).processor, [0])
        for name, tensor in inputs.items():
            assert torch.equal(theirs[name], tensor), (kind, name)
        with torch.no_grad():
            ours = export(kind).model(**inputs).logits
        # Two processes may split the sums of a matrix product differently.
        assert torch.allclose(theirs["logits"], ours, atol=1e-5), kind


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_model_saved_again_is_the_same(kind, export, tmp_path):
    found = export(kind)
    found.model.save_pretrained(tmp_path)
    found.processor.save_pretrained(tmp_path)
    again, info = LaverForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    inputs = inputs_of(LaverProcessor.from_pretrained(tmp_path))
    weights = again.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in found.model.state_dict().items())
    # Loaded from another file, the weights lie otherwise in memory, and kernels sum in another order there.
    logits = again.eval()(**inputs).logits
    torch.testing.assert_close(logits, found.model(**inputs_of(found.processor)).logits, atol=1e-5, rtol=1e-5)
    if kind != "dinov2_with_registers":  # whose gate and up projections become one tensor
        from safetensors import safe_open

        names = [set(safe_open(path / "model.safetensors", "pt").keys()) for path in (found.directory, tmp_path)]
        assert names[0] == names[1]


def test_a_transformers_that_would_not_find_gated_weights_is_refused(export, monkeypatch):
    """Older versions name the gated MLP of DINOv2 otherwise, and would fill it with random numbers."""
    config = export("dinov2_with_registers").model.config

    class Older(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.weights_in = torch.nn.Linear(2, 2)

    family = config.vision_config.model_type
    monkeypatch.setitem(modeling_laver._ENCODERS, family, (type(config.vision_config), Older))
    with pytest.raises(ValueError, match="is too old for the gated MLP of this encoder .*install a newer one"):
        LaverForConditionalGeneration(config)


# --- what is refused -----------------------------------------------------------------------------------


@torch.no_grad()
def test_pixels_that_are_not_of_the_grids_are_refused(export):
    found = export("qwen2_5_vl")
    inputs = dict(inputs_of(found.processor, [0]))
    pixels, grids = inputs["pixel_values"], inputs["image_grids"]
    num_tokens = len(pixels)
    for change, message in (
        ({"image_grids": None}, "image_grids must be .*missing; let the processor prepare both"),
        ({"image_grids": grids[0]}, r"are of shape \(2,\)"),
        ({"pixel_values": pixels[:-1]}, rf"pixel_values are of shape \({num_tokens - 1}, 768\), but 2 images of"),
        ({"pixel_values": pixels[:, :192]}, rf"of 16 x 16 pixels need \[{num_tokens}, 768\]"),
        (
            {"image_grids": grids.flip(0)},
            "in one piece; let the processor write them, and give the images in the order",
        ),
        ({"input_ids": inputs["input_ids"][:, :-20]}, "image tokens, but there are 2 images of .* do not truncate"),
        ({"pixel_values": None, "image_grids": None}, "but there are 0 images of 0 tokens; let"),
    ):
        changed = {**inputs, "attention_mask": None, **change}
        with pytest.raises(ValueError, match=message):
            found.model(**changed)
    with pytest.raises(ValueError, match="image_grids are given, but an encoder of type siglip_vision_model has one"):
        export("siglip").model(**{**inputs_of(export("siglip").processor, [0]), "image_grids": grids})
    ragged = torch.zeros(1, 3, 68, 64)
    with pytest.raises(ValueError, match=r"\(1, 3, 68, 64\), but the encoder takes \[images, 3, multiples of 8\]"):
        export("dinov2").model.get_image_features(ragged)
    with pytest.raises(ValueError, match=r"\(1, 3, 68, 64\), but the encoder takes \[images, 3, 64, 64\]"):
        export("aimv2_fixed").model.get_image_features(ragged)


def test_configs_that_contradict_themselves_are_refused(export, tmp_path):
    qwen = vision_config(export("qwen2_5_vl").encoder)
    with pytest.raises(ValueError, match="of type 'vit', but must be one of siglip_vision_model, clip_vision_model"):
        LaverConfig(vision_config={"model_type": "vit"})
    with pytest.raises(
        ValueError, match="vision_feature_layer is -2 .* of type qwen2_5_vl_vision has none .*write null"
    ):
        LaverConfig(vision_config=qwen)
    with pytest.raises(ValueError, match="vision_feature_layer is None .* of type dinov2 has hidden states to choose"):
        LaverConfig(vision_config={"model_type": "dinov2"}, vision_feature_layer=None)
    assert LaverConfig(
        vision_config={**qwen, "model_type": "qwen2_5_vl"}, vision_feature_layer=None
    ).vision_config.depth
    for name in export("qwen2_5_vl").directory.iterdir():
        (tmp_path / name.name).write_bytes(name.read_bytes())
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    del settings["min_pixels"]
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="min_pixels None and max_pixels 16384; an encoder of native resolution needs"):
        LaverProcessor.from_pretrained(tmp_path)
