"""What a checkpoint was trained with, held against what this run would do with it.

A checkpoint does not show in its tensors how positions were counted or who saw whom, and its place in the
data is a pack's number, which other lengths or another seed give to other samples. Both would change without
a word; here they are an error unless asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from laver_megatron.config import CHANGEABLE, Config
from laver_megatron.encoders import EncoderShape
from laver_megatron.inputs import MANIFEST_FILE, RUN_FILE, Inputs, has_encoder

_HEAD_SIZES = ("vision_head_hidden_size", "vision_head_output_size")
_WHY = {
    "laver": "its teacher and optimizer are those of its own parts",
    "freeze": "its optimizer knows only what was trained",
    "centre_momentum": "it holds a centre only if one was kept",
    "vision_head_hidden_size": "its vision head has that size",
    "vision_head_output_size": "its vision head has that size",
    "seq_length": "the packs it has consumed were packed so",
    "visual_seq_length": "the packs it has consumed were packed so",
    "seed": "the packs it has consumed were drawn so",
}


def continuity_problems(
    config: Config, inputs: Inputs, hidden_size: int | None, encoder: EncoderShape | None
) -> Iterator[str]:
    """All differences between the run that wrote the checkpoint of `inputs` and this one that would change the
    model or the data silently, or could not be loaded. With --finetune, which takes weights alone, only those
    of the model. Without a checkpoint there are none.

    hidden_size: the model's, which is the vision head's output size where that is not given; encoder: which says what
    its feature layer is where that is not given. None if unknown.
    """
    start = inputs.checkpoint or inputs.export
    if start is None:
        return
    if inputs.checkpoint and not (inputs.checkpoint / MANIFEST_FILE).is_file():
        yield f"{inputs.checkpoint / MANIFEST_FILE} does not exist: {start.name} is not a complete checkpoint"
    written, problem = _read_run(inputs.checkpoint) if inputs.checkpoint else _read_export(start)
    if problem:
        yield problem
        return
    then = {**written, "vision_head_output_size": written.get("vision_head_output_size") or hidden_size}
    layer = _feature_layer(config, encoder)
    now = {
        **vars(config),
        "vision_head_output_size": config.vision_head_output_size or hidden_size,
        "encoder_feature_layer": then.get("encoder_feature_layer") if layer is None else layer,
    }
    for name in CHANGEABLE:
        if name in then and now[name] != then[name] and name not in config.allow_change:
            yield (
                f"{name} is {_shown(now[name])}, but {start} was trained with {_shown(then[name])}; "
                f"set {_setting(name, then[name])}, or ask for the change with --allow-change {name}"
            )
    weights_only = inputs.weights_only or inputs.export is not None
    for name in _differing(now, then, weights_only):
        other_way = "or train with --no-laver"
        if not weights_only:
            begin = "start another --run-dir with" if inputs.is_resuming else "give"
            other_way = f"or {begin} --load {start} --finetune, which takes the weights alone"
        yield (
            f"{name} is {_shown(now[name])}, but {start} was written with {_shown(then[name])}, and {_WHY[name]}; "
            f"set {_setting(name, then[name])}, {other_way}"
        )


def as_before(config: Config, inputs: Inputs) -> Config:
    """The configuration with what the data would propose anew (`visual_seq_length` 0) as it was in the run that is
    gone on with: its position counts packs of that size."""
    if config.visual_seq_length or inputs.checkpoint is None or inputs.weights_only:
        return config
    return config.replace(visual_seq_length=_read_run(inputs.checkpoint)[0]["visual_seq_length"])


def _feature_layer(config: Config, encoder: EncoderShape | None) -> int | None:
    """None: the encoder has no choice of layers, or the choice is not known, or wrong, which is said elsewhere."""
    try:
        return encoder.feature_layer(config.encoder_feature_layer) if encoder else config.encoder_feature_layer
    except ValueError:
        return None


def _differing(now: Mapping[str, Any], then: Mapping[str, Any], weights_only: bool) -> Iterator[str]:
    """Fields of state and data that differ. The global batch size is not among them: the place in the data
    counts packs. Nor are data paths: shards may move, and the samples themselves are compared once read."""
    both_laver = now["laver"] and then["laver"]
    if both_laver:
        yield from (name for name in _HEAD_SIZES if now[name] != then[name])
    if weights_only:
        return
    if now["laver"] != then["laver"]:
        yield "laver"
    if both_laver and (now["centre_momentum"] is None) != (then["centre_momentum"] is None):
        yield "centre_momentum"
    there = {"encoder", "connector", "decoder"} | ({"heads"} if both_laver else set())
    if set(now["freeze"]) & there != set(then["freeze"]) & there:
        yield "freeze"
    # With 0 the run goes on with the checkpoint's visual_seq_length.
    names = ("seq_length", "visual_seq_length", "seed") if now["visual_seq_length"] else ("seq_length", "seed")
    yield from (name for name in names if now[name] != then[name])


def _read_run(checkpoint: Path) -> tuple[dict[str, Any], str]:
    """The configuration a checkpoint was written with (of a converted one what is known of it), and what is wrong
    with its file."""
    file = checkpoint / RUN_FILE
    if not file.is_file():
        return {}, f"{file} does not exist, so nobody knows what the checkpoint was trained with; copy it whole"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return {}, f"{file} cannot be read ({error}); copy the checkpoint again"
    known = content if isinstance(content, dict) else {}
    needed = (*CHANGEABLE, *_WHY)
    if known.get("weights_only"):
        needed = CHANGEABLE if has_encoder(checkpoint) else ()
        known["laver"] = "vision_head_output_size" in known
    absent = [name for name in needed if name not in known]
    return known, f"{file} does not say {', '.join(absent)}; copy the checkpoint again" if absent else ""


def _read_export(directory: Path) -> tuple[dict[str, Any], str]:
    """What a LaVer export was trained with, and what is wrong with its files."""
    from laver_megatron.convert.parts import parts_of_hugging_face, training_of_export

    try:
        known: dict[str, Any] = asdict(training_of_export(directory))
        head = parts_of_hugging_face(directory).vision_head
    except ValueError as error:
        return {}, str(error)
    known["laver"] = head is not None
    if head is not None:
        known.update(zip(_HEAD_SIZES, head, strict=True))
    return known, ""


def _setting(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {_shown(value)}"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (list, tuple)):
        return " ".join(value) or "none"
    return "none" if value is None else str(value)
