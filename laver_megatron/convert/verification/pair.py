"""A Hugging Face directory and a Megatron checkpoint side by side: what their files say before anything is computed.

Names and shapes of all tensors are held against the name table, both ways; so are the settings that tensors
do not show. Only headers and small files are read.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laver_megatron.checkpoint.directory import has_encoder, latest_checkpoint
from laver_megatron.config.modules import MODULES
from laver_megatron.convert.verification.forward import TEACHER, MegatronModel, stored_key
from laver_megatron.hf.parts import Training, parts_of_megatron, training_of_checkpoint
from laver_megatron.hf.safetensors_reader import SafetensorsReader
from laver_megatron.hf.shape import ModelShape, read_model_shape
from laver_megatron.hf.weights import TIED_HEAD, Size, weight_table
from laver_megatron.runtime.files import read_object

# Only training reads these; an export keeps them apart from the model.
_TRAINING_ONLY = (*MODULES["heads"], f"{TEACHER}.", "optimizer.")
# Without images the three make no difference.
_OF_TEXT = Training(attention="causal", positions="1d", encoder_feature_layer=-2)
# How many names a message gives of many.
_NUM_NAMED = 3


@dataclass(frozen=True)
class Pair:
    """The two directories, opened: the Hugging Face one with its config.json, the other with its decoder's shape."""

    hugging_face: Path
    config: Mapping[str, Any]
    megatron: MegatronModel
    shape: ModelShape


def open_pair(hugging_face: Path, megatron: Path, weights: str) -> Pair:
    """Reads the small files of both directories; ValueError if they cannot be compared."""
    config = _read_json(hugging_face / "config.json", "a Hugging Face directory")
    kind = config.get("model_type")
    if kind not in ("qwen2", "laver", "llava"):
        raise ValueError(f"{hugging_face}: model_type is {kind!r}, but only qwen2, laver and llava can be compared")
    if config.get("is_mm_prefix_lm"):
        raise ValueError(
            f"{hugging_face} was trained with mixed attention, which transformers' own Llava does not compute; "
            "export the checkpoint with --format laver, too, and compare that"
        )
    checkpoint = latest_checkpoint(megatron) if megatron.is_dir() else None
    if checkpoint is None:
        raise ValueError(f"{megatron} is not a checkpoint: expected iter_* folders, or hf/config.json and weights")
    with_images = has_encoder(checkpoint)
    if with_images != (kind != "qwen2"):
        only = "Megatron" if with_images else "Hugging Face"
        raise ValueError(f"only the {only} directory has an image encoder: {hugging_face} is {kind}, {checkpoint}")
    training = training_of_checkpoint(checkpoint) if with_images else _OF_TEXT
    return Pair(hugging_face, config, MegatronModel(checkpoint, weights, training), read_model_shape(checkpoint / "hf"))


def _read_json(path: Path, of: str) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; {of} was expected in {path.parent}")
    return read_object(path)


def key_problems(pair: Pair) -> tuple[str, ...]:
    """What either directory lacks, holds beyond the model, or holds in another shape than the name table says."""
    from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

    weights = pair.megatron.weights
    # What only training needs, which sizes would show, is left out.
    table = weight_table(parts_of_megatron(pair.megatron.checkpoint, {}))
    stored = load_sharded_metadata(str(pair.megatron.checkpoint))
    megatron = {key: tuple(getattr(entry, "global_shape", ())) for key, entry in stored.items()}
    with SafetensorsReader(pair.hugging_face) as tensors:
        hugging_face = {name: tensors.size(name) for name in tensors.names()}
    expected_there = {stored_key(key, weights): weight.size for key, weight in table.items()}
    expected_here = {
        name: size for weight in table.values() for name, size in zip(weight.hugging_face, weight.sizes, strict=True)
    }
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
            problems.append(some(f"{where} holds tensors without a counterpart in the other", names))
    return tuple(problems)


def _differences(where: str, expected: Mapping[str, Size], found: Mapping[str, Size]) -> list[str]:
    problems = []
    if missing := expected.keys() - found.keys():
        problems.append(some(f"{where} lacks tensors", missing))
    if wrong := [name for name in expected.keys() & found.keys() if tuple(found[name]) != expected[name]]:
        shapes = [f"{name} ({found[name]}, not {expected[name]})" for name in wrong]
        problems.append(some(f"{where} holds tensors of another shape", shapes))
    return problems


def some(problem: str, names: Iterable[str]) -> str:
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
            "attention": model.training.attention,
            "positions": model.training.positions,
            "vision_feature_layer": model.training.encoder_feature_layer,
        }
        llava = {"attention": "causal", "positions": "1d"} if config["model_type"] == "llava" else {}
        compared = {name: (config.get(name, llava.get(name)), value) for name, value in megatron.items()}
    for name, (here, there) in compared.items():
        if here != there:
            problems.append(f"{name} is {here} in {pair.hugging_face}, but {there} in {model.checkpoint}")
    return tuple(problems)
