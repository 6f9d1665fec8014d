"""The directories that a run names: what is wrong with them.

Everything here only looks. Nothing is created, so that a refused run leaves no trace.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from laver_megatron.config.fields import Config, ConfigError
from laver_megatron.encoders import EncoderShape, check_encoder, open_preprocessor, read_encoder
from laver_megatron.hf.shape import ModelShape, is_size, read_model_shape
from laver_megatron.hf.tokenizer import tokenizer_problems
from laver_megatron.start import HF_PREFIX, Start

# File systems of the kernel, where root may do everything and yet no folder can be made.
_NOT_FOR_FILES = {
    "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts", "efivarfs", "fusectl", "mqueue", "nsfs",
    "proc", "pstore", "securityfs", "selinuxfs", "sysfs", "tracefs",
}  # fmt: skip


@dataclass(frozen=True)
class CheckedEncoder:
    """What checking a run needs of its encoder. most_image_tokens: visual tokens of one image at most, None if that is
    not known because its image processor cannot be used."""

    shape: EncoderShape
    most_image_tokens: int | None


def model_problems(config: Config, start: Start) -> tuple[ModelShape | None, list[str]]:
    """The decoder's shape and what is wrong with its directory: config.json, tokenizer, and a --model that is
    not the model of the checkpoint."""
    if start.model_dir is None:
        # Without --load that is the problem already reported.
        named = config.start.load not in (None, HF_PREFIX)
        return None, ["model is missing: give --model DIR with config.json and tokenizer"] if named else []
    try:
        shape = read_model_shape(start.model_dir)
    except ConfigError as error:
        return None, list(error.problems)
    problems = list(tokenizer_problems(start.model_dir, shape))
    if config.start.model and config.start.load and start.model_of_weights:
        problems += _shape_differences(Path(config.start.model), start.model_of_weights)
    return shape, problems


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


def encoder_problems(config: Config, start: Start, *, dry_run: bool) -> tuple[CheckedEncoder | None, list[str]]:
    """What the encoder is and what is wrong with its directory; its weights are asked for only when they are to be read
    from there, outside a dry run."""
    if start.encoder_dir is None:
        return None, ["encoder is missing: give --encoder DIR of a vision model"]
    try:
        shape = read_encoder(start.encoder_dir)
    except ConfigError as error:
        return None, [f"encoder {problem}" for problem in error.problems]
    problems, most_image_tokens, reads_weights = [], None, False
    try:
        # A cap that is none is said where the other numbers are.
        cap = config.data.max_image_tokens if is_size(config.data.max_image_tokens) else None
        most_image_tokens = open_preprocessor(start.encoder_dir, cap).most_tokens
    except ValueError as error:
        problems.append(f"encoder {error}")
    if not start.brings_encoder and not dry_run and shape.has_weights:
        from laver_megatron.hf.safetensors_reader import weight_problems  # torch: the planner needs none

        of_files = list(weight_problems("encoder", start.encoder_dir))
        problems += of_files
        reads_weights = not of_files
    try:
        check_encoder(start.encoder_dir, with_weights=reads_weights)
    except ValueError as error:
        problems.append(f"encoder {error}")
    return CheckedEncoder(shape, most_image_tokens), problems


def shard_problems(config: Config) -> Iterator[str]:
    """Data that are missing or empty."""
    from laver_megatron.data.index.opening import (
        path_problems,  # here, because pyarrow is slow, and only runs have data
    )

    for name, paths in (("data_path", config.data.data_path), ("valid_data_path", config.data.valid_data_path)):
        if paths is None:
            continue
        yield from (f"{name}: {problem}" for problem in path_problems(paths))


def run_dir_problems(config: Config) -> Iterator[str]:
    """Whether the run directory can be made and written to, found out without writing."""
    run = config.run
    run_dir = Path(run.run_dir)
    nearest = run_dir
    while not nearest.exists() and not nearest.is_symlink() and nearest != nearest.parent:
        nearest = nearest.parent
    for path in (nearest, run_dir / "checkpoints"):
        if (path.exists() or path.is_symlink()) and not path.is_dir():
            yield f"run_dir {run.run_dir}: {path} is in the way, it is not a directory"
        elif path.exists() and not os.access(path, os.W_OK | os.X_OK):
            yield f"run_dir {run.run_dir}: no permission to write in {path}"
    if kind := kernel_file_system(nearest):
        yield f"run_dir {run.run_dir}: {nearest} belongs to the kernel's {kind}, where nothing can be written"
    written = run_dir / "config.yaml"
    if written.exists() and not os.access(written, os.W_OK):
        yield f"run_dir {run.run_dir}: no permission to write {written}"


def kernel_file_system(path: Path) -> str:
    """The file system in which `path` lies if it is one of the kernel's own, in which nobody can write files; else
    empty, as where the system does not tell."""
    try:
        lines = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return ""
    kinds = {point: kind for _, point, kind, *_ in map(str.split, lines)}
    path = path.resolve()
    kind = next((kinds[str(place)] for place in (path, *path.parents) if str(place) in kinds), "")
    return kind if kind in _NOT_FOR_FILES else ""
