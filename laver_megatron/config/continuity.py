"""What a checkpoint was trained with, held against what this run would do with it.

A checkpoint does not show in its tensors how positions were counted or who saw whom, and its place in the
data is a pack's number, which other lengths or another seed give to other samples. Both would change without
a word; here they are an error unless asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from laver_megatron.checkpoint.directory import RUN_FILE, has_encoder
from laver_megatron.config.fields import CHANGEABLE, Config, default_of
from laver_megatron.encoders import EncoderShape, encoder_facts, read_encoder, with_target_size
from laver_megatron.start import HEAD_SIZES, HuggingFace, Resume, Start

_WHY = {
    "laver": "its teacher and optimizer are those of its own parts",
    "freeze": "its optimizer knows only what was trained",
    "centre_momentum": "it holds a centre only if one was kept",
    "vision_head_hidden_size": "its vision head has that size",
    "vision_head_output_size": "its vision head has that size",
    "mim_target": "its vision head predicts that",
    "seq_length": "the packs it has consumed were packed so",
    "visual_seq_length": "the packs it has consumed were packed so",
    "seed": "the packs it has consumed were drawn so",
}


def continuity_problems(
    config: Config, start: Start, hidden_size: int | None, encoder: EncoderShape | None
) -> Iterator[str]:
    """All differences between the run that wrote the weights of `start` and this one that would change the model or the
    data silently, or could not be loaded; where weights are taken alone, only those of the model.

    Args:
        hidden_size: the model's, which is the vision head's output size where that is not given; None if unknown.
        encoder: says what its feature layer is where that is not given; None if unknown.
    """
    written, problem = start.trained_with()
    if written is None:
        return
    directory = start.directory
    assert directory is not None
    if not isinstance(start, HuggingFace):
        problem = problem or _unsaid(directory, written)
    if problem:
        yield problem
        return
    # Earlier versions knew no other target.
    written = {"mim_target": default_of("mim_target"), **written}
    config = with_target_size(config, encoder)
    then = {**written, "vision_head_output_size": written.get("vision_head_output_size") or hidden_size}
    now = {**config.flat(), "vision_head_output_size": config.objective.vision_head_output_size or hidden_size}
    layer = _feature_layer(config, encoder)
    layer = then.get("encoder_feature_layer") if layer is None else layer
    yield from unasked_changes(config.replace(encoder_feature_layer=layer), then, f"{directory} was trained with")
    yield from _encoder_problems(config, start)
    for name in _differing(now, then, start.takes_weights_alone):
        other_way = "or train with --no-laver"
        if isinstance(start, Resume):
            begin = "start another --run-dir with" if start.is_own else "give"
            other_way = f"or {begin} --load {directory} --finetune, which takes the weights alone"
        yield (
            f"{name} is {_shown(now[name])}, but {directory} was written with {_shown(then[name])}, and {_WHY[name]}; "
            f"set {_setting(name, then[name])}, {other_way}"
        )


def _unsaid(checkpoint: Path, written: Mapping[str, Any]) -> str:
    """What a checkpoint's run.json should say and does not."""
    needed = (*CHANGEABLE, *(name for name in _WHY if name != "mim_target"))
    if written.get("weights_only") is True:
        needed = CHANGEABLE if has_encoder(checkpoint) else ()
    absent = [name for name in needed if name not in written]
    return f"{checkpoint / RUN_FILE} does not say {', '.join(absent)}; copy the checkpoint again" if absent else ""


def unasked_changes(config: Config, then: Mapping[str, Any], before: str) -> Iterator[str]:
    """Settings of the model (CHANGEABLE) that differ from those of an earlier stage without --allow-change. before:
    whose they are, up to the verb."""
    for name in CHANGEABLE:
        now = config.flat()[name]
        if name in then and now != then[name] and name not in config.start.allow_change:
            yield (
                f"{name} is {_shown(now)}, but {before} {_shown(then[name])}; "
                f"set {_setting(name, then[name])}, or ask for the change with --allow-change {name}"
            )


def _encoder_problems(config: Config, start: Start) -> Iterator[str]:
    """An --encoder that is not the one that comes with the weights and is used."""
    named_dir = config.start.encoder
    if named_dir is None or not start.brings_encoder:
        return
    assert start.encoder_dir is not None
    try:
        directories = (Path(named_dir), start.encoder_dir)
        named, brought = (asdict(read_encoder(directory)) for directory in directories)
        if named == brought:
            named, brought = (encoder_facts(directory) for directory in directories)
    except ValueError:  # not there any more, which is no fault; or unreadable, which is said where it is read
        return
    differing = [f"{name} {named[name]} against {brought[name]}" for name in named if named[name] != brought[name]]
    if differing:
        yield (
            f"encoder {named_dir} is not the encoder of {start.encoder_dir}, which comes with the other weights: "
            f"{', '.join(differing)}; drop --encoder, or start from a model that was aligned with it"
        )


def _feature_layer(config: Config, encoder: EncoderShape | None) -> int | None:
    """None: the encoder has no choice of layers, or the choice is not known, or wrong, which is said elsewhere."""
    try:
        return (
            encoder.feature_layer(config.model.encoder_feature_layer) if encoder else config.model.encoder_feature_layer
        )
    except ValueError:
        return None


def _differing(now: Mapping[str, Any], then: Mapping[str, Any], weights_only: bool) -> Iterator[str]:
    """Fields of state and data that differ. The global batch size is not among them: the place in the data
    counts packs. Nor are data paths: shards may move, and the samples themselves are compared once read."""
    both_laver = now["laver"] and then["laver"]
    if both_laver:
        yield from (name for name in HEAD_SIZES if now[name] != then[name])
    if weights_only:
        return
    if now["laver"] != then["laver"]:
        yield "laver"
    if both_laver and now["mim_target"] != then["mim_target"]:
        yield "mim_target"
    if both_laver and (now["centre_momentum"] is None) != (then["centre_momentum"] is None):
        yield "centre_momentum"
    there = {"encoder", "connector", "decoder"} | ({"heads"} if both_laver else set())
    if set(now["freeze"]) & there != set(then["freeze"]) & there:
        yield "freeze"
    # With 0 the run keeps the checkpoint's visual_seq_length.
    names = ("seq_length", "visual_seq_length", "seed") if now["visual_seq_length"] else ("seq_length", "seed")
    yield from (name for name in names if now[name] != then[name])


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
