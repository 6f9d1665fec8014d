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

from laver_megatron.config.fields import CHANGEABLE, Config
from laver_megatron.config.inputs import MANIFEST_FILE, RUN_FILE, Inputs, has_encoder
from laver_megatron.encoders import EncoderShape, encoder_facts, read_encoder
from laver_megatron.objective.schedules import ema_interval_steps, ema_momentum, learning_rate, mask_ratio

_LAVER_NAMES = ("[MASK]", "vision head")
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
    now = {**config.flat(), "vision_head_output_size": config.objective.vision_head_output_size or hidden_size}
    layer = _feature_layer(config, encoder)
    layer = then.get("encoder_feature_layer") if layer is None else layer
    yield from unasked_changes(config.replace(encoder_feature_layer=layer), then, f"{start} was trained with")
    yield from _encoder_problems(config, inputs)
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


def _encoder_problems(config: Config, inputs: Inputs) -> Iterator[str]:
    """An --encoder that is not the one that comes with the weights and is used."""
    start = config.start
    if start.encoder is None or not inputs.brings_encoder:
        return
    assert inputs.encoder_dir is not None
    try:
        directories = (Path(start.encoder), inputs.encoder_dir)
        named, brought = (asdict(read_encoder(directory)) for directory in directories)
        if named == brought:
            named, brought = (encoder_facts(directory) for directory in directories)
    except ValueError:  # not there any more, which is no fault; or unreadable, which is said where it is read
        return
    differing = [f"{name} {named[name]} against {brought[name]}" for name in named if named[name] != brought[name]]
    if differing:
        yield (
            f"encoder {start.encoder} is not the encoder of {inputs.encoder_dir}, which comes with the other weights: "
            f"{', '.join(differing)}; drop --encoder, or start from a model that was aligned with it"
        )


def encoder_message(config: Config, inputs: Inputs) -> str:
    """For people: that an --encoder is not what is read where the weights bring their own; empty for others."""
    if config.start.encoder is None or not inputs.brings_encoder:
        return ""
    return (
        f"the image encoder is that of {inputs.encoder_dir}, weights and all; "
        f"--encoder {config.start.encoder} was only compared with it by its settings"
    )


def start_message(config: Config, inputs: Inputs) -> str:
    """For people: what a run that takes weights alone takes over, makes anew and leaves behind; empty for others."""
    start = inputs.checkpoint or inputs.export
    if start is None or not (inputs.weights_only or inputs.export):
        return ""
    then = (_read_run(start) if inputs.checkpoint else _read_export(start))[0]
    taken = ["encoder", "connector"] * inputs.brings_encoder + ["decoder"]
    made = [] if inputs.brings_encoder else ["connector"]
    made += ["optimizer", "place in the data"]
    left = []
    if config.objective.laver:
        (taken if then["laver"] else made).extend(_LAVER_NAMES)
        if config.start.finetune or not then["laver"]:
            made.append("teacher (the student's weights)")
    elif then["laver"]:
        left = [*_LAVER_NAMES, "teacher"]
    parts = (("taken over", taken), ("new", made), ("left behind", left))
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in parts if names)


def schedule_message(config: Config, inputs: Inputs, iteration: int) -> str:
    """For people: that a run goes on with another --train-iters, and what its schedules say of the next iteration now
    and would have said; empty for others. iteration: how many are done."""
    training = config.training
    if inputs.checkpoint is None or inputs.weights_only or iteration >= training.train_iters:
        return ""
    then = _read_run(inputs.checkpoint)[0].get("train_iters", training.train_iters)
    if then == training.train_iters:
        return ""
    before = config.replace(train_iters=then)
    values = [("learning rate", learning_rate(iteration, before.training), learning_rate(iteration, training))]
    if config.objective.laver:
        values += [
            (
                "mask ratio",
                mask_ratio(iteration, before.objective, before.training.train_iters),
                mask_ratio(iteration, config.objective, training.train_iters),
            ),
            (
                "EMA momentum",
                ema_momentum(iteration, before.objective, before.training.train_iters),
                ema_momentum(iteration, config.objective, training.train_iters),
            ),
            (
                "EMA interval",
                ema_interval_steps(before.objective, before.training.train_iters),
                ema_interval_steps(config.objective, training.train_iters),
            ),
        ]
    shown = [f"{name} {new:.6g} instead of {old:.6g}" for name, old, new in values if old != new]
    return (
        f"--train-iters is {training.train_iters}, but {inputs.checkpoint} was written with {then}, and the schedules "
        f"end there: iteration {iteration + 1} has "
        f"{', '.join(shown) or f'for now the same learning rate {values[0][1]:.6g}'}"
    )


def as_before(config: Config, inputs: Inputs) -> Config:
    """The configuration with what the data would propose anew (`visual_seq_length` 0) as it was in the run that is
    gone on with: its position counts packs of that size."""
    if config.data.visual_seq_length or inputs.checkpoint is None or inputs.weights_only:
        return config
    return config.replace(visual_seq_length=_read_run(inputs.checkpoint)[0]["visual_seq_length"])


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
    from laver_megatron.hf.parts import parts_of_hugging_face, training_of_export

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
