"""A Hugging Face directory and a Megatron checkpoint side by side: what their files say before anything is computed.

Names, shapes and values of all tensors are compared by the name table, both ways; so are the settings that tensors do
not show. Outputs alone do not show everything: a word that no prompt has, a layer of the encoder behind the one in use.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from laver_megatron.checkpoint.directory import has_encoder, latest_checkpoint
from laver_megatron.config.modules import MODULES
from laver_megatron.convert.torch_dist import TorchDistReader
from laver_megatron.convert.verification.forward import TEACHER, MegatronModel, stored_key
from laver_megatron.hf.parts import ModelSettings, parts_of_megatron, settings_of_checkpoint
from laver_megatron.hf.safetensors_reader import SafetensorsReader
from laver_megatron.hf.shape import ModelShape, read_config, read_model_shape, refuse_mixed_attention
from laver_megatron.hf.weights import TIED_HEAD, Size, weight_table

# Only training reads these; an export keeps them apart from the model.
_TRAINING_ONLY = (*MODULES["heads"], f"{TEACHER}.", "optimizer.")
# Without images the three make no difference.
_TEXT_SETTINGS = ModelSettings(attention="causal", positions="1d", encoder_feature_layer=-2)
# How many names a message gives of many.
_NUM_NAMED = 3


@dataclass(frozen=True)
class Pair:
    """The two directories, opened.

    Attributes:
        config: the Hugging Face directory's config.json.
        shape: that of Megatron's decoder.
    """

    hugging_face: Path
    config: Mapping[str, Any]
    megatron: MegatronModel
    shape: ModelShape


def open_pair(hugging_face: Path, megatron: Path, weights: str) -> Pair:
    """Reads the small files of both directories; ValueError if they cannot be compared."""
    _, config = read_config(hugging_face)
    kind = config.get("model_type")
    if kind not in ("qwen2", "laver", "llava"):
        raise ValueError(f"{hugging_face}: model_type is {kind!r}, but only qwen2, laver and llava can be compared")
    refuse_mixed_attention(hugging_face, config, "export the checkpoint with --format laver, too, and compare that")
    checkpoint = latest_checkpoint(megatron) if megatron.is_dir() else None
    if checkpoint is None:
        raise ValueError(f"{megatron} is not a checkpoint: expected iter_* folders, or hf/config.json and weights")
    with_images = has_encoder(checkpoint)
    if with_images != (kind != "qwen2"):
        only = "Megatron" if with_images else "Hugging Face"
        raise ValueError(f"only the {only} directory has an image encoder: {hugging_face} is {kind}, {checkpoint}")
    settings = settings_of_checkpoint(checkpoint) if with_images else _TEXT_SETTINGS
    return Pair(hugging_face, config, MegatronModel(checkpoint, weights, settings), read_model_shape(checkpoint / "hf"))


def key_problems(pair: Pair) -> tuple[str, ...]:
    """What either directory lacks, holds beyond the model, or holds in another shape than the name table says."""
    weights = pair.megatron.weights
    # What only training needs, which sizes would show, is left out.
    table = weight_table(parts_of_megatron(pair.megatron.checkpoint, {}))
    megatron = TorchDistReader(pair.megatron.checkpoint).sizes
    with SafetensorsReader(pair.hugging_face) as tensors:
        hugging_face = {name: tensors.size(name) for name in tensors.names()}
    expected_there = {stored_key(key, weights): weight.size for key, weight in table.items()}
    expected_here = {name: size for weight in table.values() for name, size in weight.hugging_face_sizes()}
    problems = _differences("Megatron's checkpoint", expected_there, megatron)
    problems += _differences("the Hugging Face directory", expected_here, hugging_face)
    known = expected_there.keys() | table.keys()
    beyond = [
        key for key in megatron.keys() - known if not key.startswith(_TRAINING_ONLY) and "_extra_state" not in key
    ]
    # A tied head may be stored once more; if it is not the embedding again, the logits will show it.
    tied = {f"{prefix}{TIED_HEAD}" for prefix in ("", "language_model.")} if pair.shape.tie_word_embeddings else set()
    surplus = hugging_face.keys() - expected_here.keys() - tied
    for where, names in (("Megatron's checkpoint", beyond), ("the Hugging Face directory", surplus)):
        if names:
            problems.append(with_names(f"{where} holds tensors without a counterpart in the other", names))
    return tuple(problems)


def value_problems(pair: Pair) -> tuple[str, ...]:
    """Tensors whose values differ, or are not numbers. A missing one, or one of another shape, is left to
    `key_problems`. Values are compared in the Hugging Face directory's type, which may be the narrower one."""
    megatron = TorchDistReader(pair.megatron.checkpoint)
    differing = []
    with SafetensorsReader(pair.hugging_face) as tensors:
        for weight in weight_table(parts_of_megatron(pair.megatron.checkpoint, {})).values():
            key = stored_key(weight.megatron, pair.megatron.weights)
            if megatron.sizes.get(key) != weight.size:
                continue
            for part, (name, size) in enumerate(weight.hugging_face_sizes()):
                is_there = name in tensors.names() and tensors.size(name) == size
                blocks = megatron.paired_rows(key, weight, part, tensors)
                if is_there and not all(torch.equal(ours.to(theirs.dtype), theirs) for theirs, ours in blocks):
                    differing.append(name)
    return (with_names("tensors of other values", differing),) if differing else ()


def _differences(where: str, expected: Mapping[str, Size], found: Mapping[str, Size]) -> list[str]:
    problems = []
    if missing := expected.keys() - found.keys():
        problems.append(with_names(f"{where} lacks tensors", missing))
    if wrong := [name for name in expected.keys() & found.keys() if found[name] != expected[name]]:
        shapes = [f"{name} ({found[name]}, not {expected[name]})" for name in wrong]
        problems.append(with_names(f"{where} holds tensors of another shape", shapes))
    return problems


def with_names(problem: str, names: Iterable[str]) -> str:
    """The number of names, and the first few of them."""
    ordered = sorted(names)
    more = ", ..." if len(ordered) > _NUM_NAMED else ""
    return f"{problem}: {len(ordered)}, {', '.join(ordered[:_NUM_NAMED])}{more}"


def setting_problems(pair: Pair) -> tuple[str, ...]:
    """What the configurations say differently and tensors do not show."""
    problems = []
    config, model = pair.config, pair.megatron
    if config["model_type"] == "qwen2":
        theirs, ours = vars(read_model_shape(pair.hugging_face)), vars(pair.shape)
        compared = {name: (theirs[name], ours[name]) for name in ours}
    else:
        megatron = {
            "attention": model.settings.attention,
            "positions": model.settings.positions,
            "vision_feature_layer": model.settings.encoder_feature_layer,
        }
        llava = {"attention": "causal", "positions": "1d"} if config["model_type"] == "llava" else {}
        compared = {name: (config.get(name, llava.get(name)), value) for name, value in megatron.items()}
    for name, (here, there) in compared.items():
        if here != there:
            problems.append(f"{name} is {here} in {pair.hugging_face}, but {there} in {model.checkpoint}")
    return tuple(problems)
