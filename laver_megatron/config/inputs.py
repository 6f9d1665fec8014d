"""The files and directories a run reads and writes: where they are, and what is wrong with them.

Everything here only looks. Nothing is created, so that a refused run leaves no trace.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from laver_megatron.config.fields import Config, ConfigError
from laver_megatron.encoders import EncoderShape, check_encoder, open_preprocessor, read_encoder
from laver_megatron.hf.shape import (
    ModelShape,
    is_laver_export,
    is_size,
    read_config,
    read_model_shape,
)

HF_PREFIX = "hf:"
RUN_FILE = "run.json"
MANIFEST_FILE = "manifest.json"
IMAGE_TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
# File systems of the kernel, where root may do everything and yet no folder can be made.
_NOT_FOR_FILES = {
    "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts", "efivarfs", "fusectl", "mqueue", "nsfs",
    "proc", "pstore", "securityfs", "selinuxfs", "sysfs", "tracefs",
}  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """Where a run starts from. checkpoint: the iter_* folder it goes on from or loads, which brings its own
    model_dir and encoder_dir: directories with config.json, tokenizer, preprocessor (None if not named).
    export: the LaVer export it starts from, which brings both, too. brings_encoder: whether the encoder's weights
    come with the others. weights_only: whether a checkpoint gives weights alone, because that is all it has (it was
    converted) or because --finetune asks for them."""

    checkpoint: Path | None
    is_resuming: bool
    model_dir: Path | None
    encoder_dir: Path | None
    export: Path | None = None
    brings_encoder: bool = False
    weights_only: bool = False


def find_inputs(config: Config) -> Inputs:
    """Follows --load, --model, --encoder and the run directory; a run with checkpoints of its own goes on
    from the newest of them, whatever --load says.

    Raises:
        ConfigError: a checkpoints/ folder that names a checkpoint it does not have.
    """
    start = config.start
    own = latest_checkpoint(Path(config.run.run_dir) / "checkpoints")
    given = hf_dir = None
    if start.load is not None and start.load.startswith(HF_PREFIX):
        path = start.load.removeprefix(HF_PREFIX)
        hf_dir = Path(path) if path else None
    elif start.load is not None and own is None:
        given = latest_checkpoint(Path(start.load))
    checkpoint = own or given
    encoder_dir = Path(start.encoder) if start.encoder else None
    if checkpoint is not None:
        brings_encoder = has_encoder(checkpoint)
        return Inputs(
            checkpoint,
            is_resuming=own is not None,
            model_dir=checkpoint / "hf",
            encoder_dir=checkpoint / "encoder" if brings_encoder else encoder_dir,
            brings_encoder=brings_encoder,
            weights_only=is_converted(checkpoint) or (start.finetune and own is None),
        )
    model_dir = Path(start.model) if start.model else hf_dir
    if hf_dir is not None and is_laver_export(hf_dir):
        return Inputs(None, False, model_dir, hf_dir, export=hf_dir, brings_encoder=True)
    return Inputs(None, False, model_dir, encoder_dir)


def has_encoder(checkpoint: Path) -> bool:
    """Whether a checkpoint brings its image encoder; one converted from a text-only model does not."""
    return (checkpoint / "encoder").is_dir()


def is_text_only(config: Config, inputs: Inputs) -> bool:
    """Whether the weights of --load, as far as they are there, are a language model's alone."""
    start = config.start
    if inputs.checkpoint is not None:
        return not inputs.brings_encoder
    assert start.load is not None
    hf_dir = Path(start.load.removeprefix(HF_PREFIX))
    return start.load.startswith(HF_PREFIX) and inputs.export is None and (hf_dir / "config.json").is_file()


def is_converted(checkpoint: Path) -> bool:
    """Whether a checkpoint holds weights alone because it was converted, not trained."""
    try:
        return json.loads((checkpoint / RUN_FILE).read_text()).get("weights_only") is True
    except (OSError, ValueError, AttributeError):
        return False  # what is wrong with the file is said where the rest of it is needed


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint of a checkpoints/ folder, or `directory` itself if it is an iter_*
    folder with its hf/config.json; None if there is none.

    The file `latest` decides. Without it (the first save was stopped just before writing it, or it was not
    copied along) the highest iter_* folder with a manifest does: folders get that name when they are whole.

    Raises:
        ConfigError: `latest` names a checkpoint that is not there.
    """
    if (directory / "hf" / "config.json").is_file():
        return directory
    pointer = directory / "latest"
    if not pointer.is_file():
        folders = (path.parent for path in directory.glob(f"iter_*/{MANIFEST_FILE}"))
        numbered = [path for path in folders if path.name.removeprefix("iter_").isdecimal()]
        return max(numbered, key=lambda path: int(path.name.removeprefix("iter_")), default=None)
    try:
        text = pointer.read_text().strip()
    except (OSError, ValueError) as error:
        raise ConfigError([f"{pointer} cannot be read ({error})"]) from None
    path = directory / f"iter_{int(text):07d}" if text.isdecimal() else directory / "iter_?"
    if not (path / "hf" / "config.json").is_file():
        raise ConfigError([f"{pointer} says {text!r}, but {path}/hf/config.json does not exist"])
    return path


def load_problems(config: Config, inputs: Inputs, *, dry_run: bool) -> Iterator[str]:
    """What is wrong with the weights to start from. A dry run does not ask for the weights themselves."""
    start = config.start
    if inputs.is_resuming:
        return
    if start.load is None:
        yield (
            "load is missing: weights come from --load hf:DIR or --load CHECKPOINTS "
            f"(there is no checkpoint in {config.run.run_dir}/checkpoints to go on from)"
        )
        return
    if start.load == HF_PREFIX:
        yield f"load {HF_PREFIX} names no directory; write --load {HF_PREFIX}DIR"
        return
    if start.finetune and is_text_only(config, inputs):
        yield (
            f"finetune goes on with a model that has learnt to see, but {start.load} is text only: it brings no "
            "encoder and no connector; load what an earlier stage has trained (RUN_DIR/checkpoints) or a LaVer export, "
            "or drop --finetune to begin with a new connector, best with --freeze encoder decoder at first"
        )
    if dry_run:
        return
    if start.load.startswith(HF_PREFIX):
        yield from weight_problems("load", Path(start.load.removeprefix(HF_PREFIX)))
    elif inputs.checkpoint is None:
        path = Path(start.load)
        if not path.is_dir():
            yield f"load {start.load}: no such directory"
        elif (path / "config.json").is_file():
            yield f"load {path}: this is a Hugging Face directory; write --load {HF_PREFIX}{path}"
        else:
            yield (
                f"load {start.load}: not a checkpoint; expected a checkpoints/ folder with complete "
                "iter_* folders, or one of these, which has hf/config.json"
            )


def weight_problems(name: str, directory: Path) -> Iterator[str]:
    """Safetensors of a Hugging Face directory that are missing, those that its index names included, or cut
    short, judged by their headers."""
    if not directory.is_dir():
        yield f"{name} {directory}: no such directory"
        return
    if not (directory / "config.json").is_file():
        yield f"{name} {directory}: no config.json in it"
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            named = sorted({str(file) for file in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, AttributeError, TypeError):
            yield f"{index}: cannot be read as an index of weights"
            return
        absent = [file for file in named if not (directory / file).is_file()]
        if absent:
            some = ", ".join(absent[:3])
            yield f"{name} {directory}: {len(absent)} of {len(named)} weight files are missing ({some})"
    elif (directory / "model.safetensors").is_file():
        named = ["model.safetensors"]
    elif any(directory.glob("*.bin")):
        named = []
        yield f"{name} {directory}: only pickled *.bin weights; save them again as safetensors"
    else:
        named = []
        yield f"{name} {directory}: neither model.safetensors nor model.safetensors.index.json in it"
    for file in named:
        if (directory / file).is_file() and (fault := _safetensors_fault(directory / file)):
            yield f"{name} {directory / file}: {fault}; download or copy it again"


def _safetensors_fault(file: Path) -> str:
    """What is wrong with the file's length, by its header (8 bytes of length, then JSON with each tensor's
    place); nothing else is read."""
    try:
        num_bytes = file.stat().st_size
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            if header_bytes > num_bytes - 8:
                return f"no safetensors file, or cut short within its header ({num_bytes} bytes)"
            header = json.loads(stream.read(header_bytes))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        meant = 8 + header_bytes + max(ends, default=0)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return "no safetensors file: its header is not one"
    return "" if num_bytes == meant else f"it has {num_bytes} bytes, but its header says {meant}"


def model_problems(config: Config, inputs: Inputs) -> tuple[ModelShape | None, list[str]]:
    """The decoder's shape and what is wrong with its directory: config.json, tokenizer, and a --model that is
    not the model of the checkpoint."""
    start = config.start
    if inputs.model_dir is None:
        # Without --load that is the problem already reported.
        named = start.load not in (None, HF_PREFIX)
        return None, ["model is missing: give --model DIR with config.json and tokenizer"] if named else []
    try:
        shape = read_model_shape(inputs.model_dir)
    except ConfigError as error:
        return None, list(error.problems)
    problems = list(tokenizer_problems(inputs.model_dir, shape))
    if start.model is not None and start.load not in (None, HF_PREFIX):
        assert start.load is not None
        weights = inputs.checkpoint / "hf" if inputs.checkpoint else Path(start.load.removeprefix(HF_PREFIX))
        problems += _shape_differences(Path(start.model), weights)
    return shape, problems


def tokenizer_problems(directory: Path, shape: ModelShape) -> Iterator[str]:
    """What keeps a directory's tokenizer from serving a model with images."""
    file = directory / "tokenizer.json"
    has_words = all((directory / name).is_file() for name in ("vocab.json", "merges.txt"))
    if not file.is_file() and not has_words:
        yield f"{directory}: no tokenizer in it (tokenizer.json, or vocab.json with merges.txt)"
        return
    if not _has_chat_template(directory):
        yield (
            f"{directory}: its tokenizer has no chat template (chat_template.jinja, or chat_template in "
            "tokenizer_config.json); copy these files from the original model"
        )
    if not file.is_file():
        return
    try:
        added = {token["content"]: token["id"] for token in json.loads(file.read_text("utf-8"))["added_tokens"]}
    except (ValueError, KeyError, TypeError):
        yield f"{file}: cannot be read as a tokenizer"
        return
    if is_laver_export(directory):
        named, meant = read_config(directory)[1].get("image_token_id"), added.get(IMAGE_TOKENS[1])
        if named != meant:
            yield f"{directory}/config.json: image_token_id is {named!r}, but {IMAGE_TOKENS[1]} is {meant} in {file}"
    absent = [token for token in IMAGE_TOKENS if token not in added]
    if absent:
        yield f"{file}: no {', '.join(absent)} among the special tokens; use the tokenizer of Qwen2.5"
    outside = [token for token, index in added.items() if index >= shape.vocab_size]
    if outside:
        token = outside[0]
        yield f"{file}: {token} has the id {added[token]}, but config.json's vocab_size is {shape.vocab_size}"


def _has_chat_template(directory: Path) -> bool:
    if (directory / "chat_template.jinja").is_file():
        return True
    try:
        return bool(json.loads((directory / "tokenizer_config.json").read_text("utf-8")).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False


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


@dataclass(frozen=True)
class EncoderInputs:
    """What checking a run needs of its encoder. most_image_tokens: visual tokens of one image at most, None if that is
    not known because its image processor cannot be used."""

    shape: EncoderShape
    most_image_tokens: int | None


def encoder_problems(config: Config, inputs: Inputs, *, dry_run: bool) -> tuple[EncoderInputs | None, list[str]]:
    """What the encoder is and what is wrong with its directory; its weights are asked for only when they are to be read
    from there, outside a dry run."""
    if inputs.encoder_dir is None:
        return None, ["encoder is missing: give --encoder DIR of a vision model"]
    try:
        shape = read_encoder(inputs.encoder_dir)
    except ConfigError as error:
        return None, [f"encoder {problem}" for problem in error.problems]
    problems, most_image_tokens, reads_weights = [], None, False
    try:
        # A cap that is none is said where the other numbers are.
        cap = config.data.max_image_tokens if is_size(config.data.max_image_tokens) else None
        most_image_tokens = open_preprocessor(inputs.encoder_dir, cap).most_tokens
    except ValueError as error:
        problems.append(f"encoder {error}")
    if not inputs.brings_encoder and not dry_run and shape.has_weights:
        of_files = list(weight_problems("encoder", inputs.encoder_dir))
        problems += of_files
        reads_weights = not of_files
    try:
        check_encoder(inputs.encoder_dir, with_weights=reads_weights)
    except ValueError as error:
        problems.append(f"encoder {error}")
    return EncoderInputs(shape, most_image_tokens), problems


def preprocessor_problems(directory: Path) -> Iterator[str]:
    """What keeps a directory's image processor from serving its encoder."""
    try:
        open_preprocessor(directory)
    except ConfigError as error:
        yield from error.problems
    except ValueError as error:
        yield f"encoder {error}"


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
