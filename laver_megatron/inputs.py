"""The files and directories a run reads and writes: where they are, and what is wrong with them.

Everything here only looks. Nothing is created, so that a refused run leaves no trace.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from laver_megatron.config import Config, ConfigError
from laver_megatron.data.shards import find_shards
from laver_megatron.model.shape import EncoderShape, ModelShape, read_encoder_shape, read_model_shape

HF_PREFIX = "hf:"
IMAGE_TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")


@dataclass(frozen=True)
class Inputs:
    """Where a run starts from. checkpoint: the iter_* folder it goes on from or loads, which brings its own
    model_dir and encoder_dir: directories with config.json, tokenizer, preprocessor (None if not named)."""

    checkpoint: Path | None
    is_resuming: bool
    model_dir: Path | None
    encoder_dir: Path | None


def find_inputs(config: Config) -> Inputs:
    """Follows --load, --model, --encoder and the run directory; a run with checkpoints of its own goes on
    from the newest of them, whatever --load says.

    Raises:
        ConfigError: a checkpoints/ folder that names a checkpoint it does not have.
    """
    own = latest_checkpoint(Path(config.run_dir) / "checkpoints")
    given = hf_dir = None
    if config.load is not None and config.load.startswith(HF_PREFIX):
        hf_dir = Path(config.load.removeprefix(HF_PREFIX))
    elif config.load is not None and own is None:
        given = latest_checkpoint(Path(config.load))
    checkpoint = own or given
    if checkpoint is not None:
        return Inputs(checkpoint, own is not None, checkpoint / "hf", checkpoint / "encoder")
    model_dir = Path(config.model) if config.model else hf_dir
    return Inputs(None, False, model_dir, Path(config.encoder) if config.encoder else None)


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint of a checkpoints/ folder, or `directory` itself if it is an iter_*
    folder with its hf/config.json; None if there is none."""
    if (directory / "hf" / "config.json").is_file():
        return directory
    pointer = directory / "latest"
    if not pointer.is_file():
        return None
    text = pointer.read_text().strip()
    path = directory / f"iter_{int(text):07d}" if text.isdecimal() else directory / "iter_?"
    if not (path / "hf" / "config.json").is_file():
        raise ConfigError([f"{pointer} says {text!r}, but {path}/hf/config.json does not exist"])
    return path


def load_problems(config: Config, inputs: Inputs, *, dry_run: bool) -> Iterator[str]:
    """What is wrong with the weights to start from. A dry run does not ask for the weights themselves."""
    if inputs.is_resuming:
        return
    if config.load is None:
        yield (
            "load is missing: weights come from --load hf:DIR or --load CHECKPOINTS "
            f"(there is no checkpoint in {config.run_dir}/checkpoints to go on from)"
        )
        return
    if dry_run:
        return
    if config.load.startswith(HF_PREFIX):
        yield from weight_problems("load", Path(config.load.removeprefix(HF_PREFIX)))
    elif inputs.checkpoint is None:
        path = Path(config.load)
        if not path.is_dir():
            yield f"load {config.load}: no such directory"
        elif (path / "config.json").is_file():
            yield f"load {path}: this is a Hugging Face directory; write --load {HF_PREFIX}{path}"
        else:
            yield (
                f"load {config.load}: not a checkpoint; expected a checkpoints/ folder with a file "
                "`latest`, or an iter_* folder with hf/config.json"
            )


def weight_problems(name: str, directory: Path) -> Iterator[str]:
    """Missing safetensors of a Hugging Face directory, those that its index names included."""
    if not directory.is_dir():
        yield f"{name} {directory}: no such directory"
        return
    if not (directory / "config.json").is_file():
        yield f"{name} {directory}: no config.json in it"
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            named = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            yield f"{index}: cannot be read as an index of weights"
            return
        absent = [file for file in named if not (directory / file).is_file()]
        if absent:
            some = ", ".join(absent[:3])
            yield f"{name} {directory}: {len(absent)} of {len(named)} weight files are missing ({some})"
    elif not any(directory.glob("*.safetensors")):
        if any(directory.glob("*.bin")):
            yield f"{name} {directory}: only pickled *.bin weights; save them again as safetensors"
        else:
            yield f"{name} {directory}: no *.safetensors in it"


def model_problems(config: Config, inputs: Inputs) -> tuple[ModelShape | None, list[str]]:
    """The decoder's shape and what is wrong with its directory: config.json, tokenizer, and a --model that is
    not the model of the checkpoint."""
    if inputs.model_dir is None:
        # Without --load that is the problem already reported.
        return None, ["model is missing: give --model DIR with config.json and tokenizer"] if config.load else []
    try:
        shape = read_model_shape(inputs.model_dir)
    except ConfigError as error:
        return None, list(error.problems)
    problems = list(_tokenizer_problems(inputs.model_dir, shape))
    if config.model is not None and config.load is not None:
        weights = inputs.checkpoint / "hf" if inputs.checkpoint else Path(config.load.removeprefix(HF_PREFIX))
        problems += _shape_differences(Path(config.model), weights)
    return shape, problems


def _tokenizer_problems(directory: Path, shape: ModelShape) -> Iterator[str]:
    file = directory / "tokenizer.json"
    if not file.is_file():
        if not all((directory / name).is_file() for name in ("vocab.json", "merges.txt")):
            yield f"{directory}: no tokenizer in it (tokenizer.json, or vocab.json with merges.txt)"
        return
    try:
        added = {token["content"]: token["id"] for token in json.loads(file.read_text("utf-8"))["added_tokens"]}
    except (ValueError, KeyError, TypeError):
        yield f"{file}: cannot be read as a tokenizer"
        return
    absent = [token for token in IMAGE_TOKENS if token not in added]
    if absent:
        yield f"{file}: no {', '.join(absent)} among the special tokens; use the tokenizer of Qwen2.5"
    outside = [token for token, index in added.items() if index >= shape.vocab_size]
    if outside:
        token = outside[0]
        yield f"{file}: {token} has the id {added[token]}, but config.json's vocab_size is {shape.vocab_size}"


def _shape_differences(model: Path, weights: Path) -> Iterator[str]:
    if not all((directory / "config.json").is_file() for directory in (model, weights)):
        return
    try:
        named, loaded = vars(read_model_shape(model)), vars(read_model_shape(weights))
    except ConfigError as error:
        yield from error.problems
        return
    differing = [f"{name} {named[name]} against {loaded[name]}" for name in named if named[name] != loaded[name]]
    if differing:
        yield f"model {model} is not the model of {weights}: {', '.join(differing)}; drop --model"


def encoder_problems(config: Config, inputs: Inputs, *, dry_run: bool) -> tuple[EncoderShape | None, list[str]]:
    """The encoder's shape and what is wrong with its directory; its weights are asked for only when they are
    to be read, that is without a checkpoint and outside a dry run."""
    if inputs.encoder_dir is None:
        return None, ["encoder is missing: give --encoder DIR of a SigLIP vision model"]
    try:
        shape = read_encoder_shape(inputs.encoder_dir)
    except ConfigError as error:
        return None, [f"encoder {problem}" for problem in error.problems]
    problems = []
    if not (inputs.encoder_dir / "preprocessor_config.json").is_file():
        problems.append(f"encoder {inputs.encoder_dir}: no preprocessor_config.json in it")
    if inputs.checkpoint is None and not dry_run:
        problems += weight_problems("encoder", inputs.encoder_dir)
    return shape, problems


def shard_problems(config: Config) -> Iterator[str]:
    """Missing and empty shards."""
    for name, paths in (("data_path", config.data_path), ("valid_data_path", config.valid_data_path)):
        if paths is None:
            continue
        try:
            find_shards(paths)
        except ValueError as error:
            yield f"{name}: {str(error).removeprefix('shards: ')}"


def run_dir_problems(config: Config) -> Iterator[str]:
    """Whether the run directory can be made and written to, found out without writing."""
    run_dir = Path(config.run_dir)
    nearest = run_dir
    while not nearest.exists() and not nearest.is_symlink() and nearest != nearest.parent:
        nearest = nearest.parent
    for path in (nearest, run_dir / "checkpoints"):
        if (path.exists() or path.is_symlink()) and not path.is_dir():
            yield f"run_dir {config.run_dir}: {path} is in the way, it is not a directory"
        elif path.exists() and not os.access(path, os.W_OK | os.X_OK):
            yield f"run_dir {config.run_dir}: no permission to write in {path}"
    written = run_dir / "config.yaml"
    if written.exists() and not os.access(written, os.W_OK):
        yield f"run_dir {config.run_dir}: no permission to write {written}"
