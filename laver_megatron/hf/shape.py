"""Sizes of the decoder, read from Hugging Face config.json files, and the parts of a LaVer export's.

Nothing is inferred from a model's name, and nothing is filled in by guess: a size that the file does not
state is an error, because checkpoints of one family differ in vocabulary, tying and norm epsilon.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laver_megatron.config.fields import ConfigError
from laver_megatron.runtime.files import read_object

_DECODER_SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
}
# More than any model has, by the file's name: a slip of the keyboard would otherwise fill the memory with weights, or
# with their names. Image encoders have some of them, too.
LARGEST = {
    "num_hidden_layers": 10_000, "depth": 10_000, "num_attention_heads": 1 << 16, "num_heads": 1 << 16,
    "num_key_value_heads": 1 << 16, "hidden_size": 1 << 20, "out_hidden_size": 1 << 20, "head_dim": 1 << 16,
    "intermediate_size": 1 << 24, "vocab_size": 1 << 26, "max_position_embeddings": 1 << 31,
    "image_size": 1 << 16, "patch_size": 1 << 16, "mlp_ratio": 1 << 8,
    "num_register_tokens": 1 << 16, "spatial_merge_size": 1 << 8, "temporal_patch_size": 1 << 8,
}  # fmt: skip
_MOST_PARAMETERS = 10**14  # 200 TB in bf16: each size alone may be possible

LAVER_EXPORT = "laver"  # model_type of our exports, whose config.json contains those of their two models
TEXT_PART, VISION_PART = "text_config", "vision_config"


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A Qwen2 decoder's sizes under Megatron-Core's names; kv_channels is the width of one head."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    max_position_embeddings: int


def read_model_shape(directory: str | Path) -> ModelShape:
    """The decoder described by `directory`/config.json, of a text-only Qwen2.5 or of a LaVer export.

    Raises:
        ConfigError: all that is missing, is not Qwen2, or is a variant that the decoder does not implement.
    """
    path, content = read_part(directory, TEXT_PART)
    model_type = content.get("model_type")
    if model_type != "qwen2":
        raise ConfigError([f"{path}: model_type is {model_type!r}, but only 'qwen2' (Qwen2, Qwen2.5) is supported"])
    problems = [f"{path}: {problem}" for problem in (*_unsupported(content), *_decoder_faults(content))]
    if problems:
        raise ConfigError(problems)
    sizes = {name: content[key] for name, key in _DECODER_SIZES.items()}
    heads, groups, head_dim = sizes["num_attention_heads"], sizes["num_query_groups"], content.get("head_dim")
    if head_dim is None and sizes["hidden_size"] % heads:
        problems.append(f"{path}: hidden_size {sizes['hidden_size']} is not a multiple of {heads} attention heads")
    if heads % groups:
        problems.append(f"{path}: {heads} attention heads are not a multiple of {groups} key/value heads")
    layers, hidden = sizes["num_layers"], sizes["hidden_size"]
    matrices = 3 * layers * hidden * sizes["ffn_hidden_size"] + hidden * sizes["vocab_size"]
    if matrices > _MOST_PARAMETERS:
        problems.append(
            f"{path}: num_hidden_layers, hidden_size, intermediate_size and vocab_size make a model of at least "
            f"{matrices:.1e} parameters, above {_MOST_PARAMETERS:.0e}; copy the file from the original model"
        )
    if problems:
        raise ConfigError(problems)
    return ModelShape(
        **sizes,
        kv_channels=sizes["hidden_size"] // heads if head_dim is None else head_dim,
        rms_norm_eps=float(content["rms_norm_eps"]),
        rope_theta=float(_rope_theta(content)),
        tie_word_embeddings=content.get("tie_word_embeddings", False),
    )


def is_laver_export(directory: str | Path) -> bool:
    """Whether a Hugging Face directory holds image encoder, connector and decoder in one, as our exports do."""
    try:
        return read_config(directory)[1].get("model_type") == LAVER_EXPORT
    except ConfigError:
        return False


def read_part(directory: str | Path, part: str) -> tuple[Path, dict[str, Any]]:
    """config.json of the decoder (TEXT_PART) or the image encoder (VISION_PART), taken out of a LaVer export's
    where that is what the directory holds, and its path."""
    path, content = read_config(directory)
    if content.get("model_type") == LAVER_EXPORT:
        of_part = content.get(part)
        if not isinstance(of_part, dict):
            raise ConfigError([f"{path}: no {part} in it; is this a whole LaVer export?"])
        content = of_part
    return path, content


def read_config(directory: str | Path) -> tuple[Path, dict[str, Any]]:
    directory = Path(directory)
    path = directory / "config.json"
    if not directory.is_dir():
        raise ConfigError([f"{directory}: no such directory (a Hugging Face model directory was expected)"])
    if not path.is_file():
        raise ConfigError([f"{directory}: no config.json in it; is this a Hugging Face model directory?"])
    try:
        return path, read_object(path)
    except ValueError as error:
        raise ConfigError([str(error)]) from None


def refuse_mixed_attention(directory: Path, config: Mapping[str, Any], remedy: str) -> None:
    """Raises ValueError, with the remedy, for a llava export of a model that was trained with mixed attention."""
    if config.get("is_mm_prefix_lm"):
        raise ValueError(
            f"{directory} was trained with mixed attention, which transformers' own Llava does not compute; {remedy}"
        )


def _decoder_faults(content: dict[str, Any]) -> list[str]:
    """Sizes that are missing or cannot be."""
    faults = [key for key in _DECODER_SIZES.values() if not is_size(content.get(key))]
    if content.get("head_dim") is not None and not is_size(content["head_dim"]):
        faults.append("head_dim")
    problems = []
    if faults:
        problems.append(f"{', '.join(faults)} missing or not a positive integer")
    else:
        problems += above_largest(content, (*_DECODER_SIZES.values(), "head_dim"))
    numbers = {"rms_norm_eps": content.get("rms_norm_eps"), "rope_theta": _rope_theta(content)}
    wrong = [name for name, value in numbers.items() if not is_positive(value)]
    if wrong:
        problems.append(f"{', '.join(wrong)} missing or not a number above 0")
    if not isinstance(content.get("tie_word_embeddings", False), bool):
        problems.append(f"tie_word_embeddings is {content['tie_word_embeddings']!r}, neither true nor false")
    return [f"{problem}; copy the file from the original model" for problem in problems]


def _unsupported(content: dict[str, Any]) -> list[str]:
    """Variants of Qwen2 that would silently compute something else here."""
    problems = []
    # transformers 5 writes rope_parameters, earlier versions rope_scaling.
    for name in ("rope_parameters", "rope_scaling"):
        rope = content.get(name) or {}
        rope = rope if isinstance(rope, dict) else {"rope_type": rope}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default":
            problems.append(f"{name} asks for rotary scaling of type {rope_type!r}, which is not supported")
        others = sorted(rope.keys() - {"rope_type", "type", "rope_theta"})
        if rope_type == "default" and others:
            problems.append(f"{name} sets {', '.join(others)}, which is not supported")
    theirs = content.get("rope_scaling")
    if isinstance(theirs, dict) and (content.get("rope_parameters") or "rope_theta" in theirs):
        problems.append("rope_scaling stands beside rope_parameters or sets rope_theta; say it in one place")
    problems += _sliding_problems(content)
    if content.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act is {content['hidden_act']!r}, but only 'silu' is supported")
    if content.get("quantization_config"):
        problems.append("the weights are quantized; use the original checkpoint")
    return problems


def _sliding_problems(content: dict[str, Any]) -> list[str]:
    layer_types, first_sliding = content.get("layer_types") or [], content.get("max_window_layers") or 0
    num_layers = content.get("num_hidden_layers")
    all_full = isinstance(first_sliding, int) and isinstance(num_layers, int) and first_sliding >= num_layers
    slides = content.get("use_sliding_window") and not all_full
    if slides or not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        return ["sliding-window attention is not supported; set use_sliding_window to false"]
    return []


def _rope_theta(content: dict[str, Any]) -> Any:
    # transformers 5 writes rope_parameters, earlier versions a plain rope_theta.
    rope = content.get("rope_parameters")
    theta = rope.get("rope_theta") if isinstance(rope, dict) else None
    return content.get("rope_theta") if theta is None else theta


def above_largest(sizes: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Of sizes that are integers, or absent, those above what any model has."""
    known = ((name, sizes.get(name), LARGEST.get(name)) for name in names)
    return [
        f"{name} is {reprlib.repr(value)}, above {largest}" for name, value, largest in known
        if value is not None and largest is not None and value > largest
    ]  # fmt: skip


def is_size(value: Any) -> bool:
    """Whether a value is a positive integer."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_positive(value: Any) -> bool:
    """Whether a value is a finite number above 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")
