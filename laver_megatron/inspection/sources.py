"""What can be inspected, told apart by its small files before any weight is read.

a Hugging Face directory    our exports (laver, llava), LLaVA-style models, Qwen2.5-VL
a checkpoint                of any layout: an iter_* folder, a checkpoints/ folder or a run (its newest checkpoint)
"""

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from laver_megatron.checkpoint.directory import RUN_FILE, checkpoints_in, has_encoder, iteration_of, latest_checkpoint
from laver_megatron.hf.files import CONFIG_FILE
from laver_megatron.hf.parts import has_training_state
from laver_megatron.hf.shape import LAVER_EXPORT, read_config, refuse_mixed_attention
from laver_megatron.runtime.files import read_object

DEFAULT_MASK_RATIO = 0.05


@dataclass(frozen=True)
class Family:
    """Where a kind of model has what is looked at.

    Attributes:
        decoder: the module whose `layers` are the decoder's layers.
        connector: the module that is given the encoder's features.
    """

    decoder: str
    connector: str


FAMILIES = {
    LAVER_EXPORT: Family("language_model.model", "multi_modal_projector"),
    "llava": Family("model.language_model", "model.multi_modal_projector"),
    "qwen2_5_vl": Family("model.language_model", "model.visual.merger.mlp"),
}


@dataclass(frozen=True)
class Source:
    """A model to inspect.

    Attributes:
        name: what the page calls it.
        directory: a Hugging Face directory, or an iter_* folder.
        model_type: a key of FAMILIES.
        step: the iteration of a checkpoint, None otherwise.
        mask_ratio: the run's; DEFAULT_MASK_RATIO where no run is known.
    """

    name: str
    directory: Path
    model_type: str
    step: int | None = None
    mask_ratio: float = DEFAULT_MASK_RATIO


def find_sources(paths: Sequence[Path]) -> list[Source]:
    """The models that paths name. Names are as short as tells them apart.

    Raises:
        ValueError: what is not there, holds no model, or one that is given no images.
    """
    found = [_find(path) for path in paths]
    names = [source.name for source in found]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    if len(set(names)) < len(names):
        raise ValueError(f"the same model is named twice: {', '.join(names)}")
    return [replace(source, name=name) for source, name in zip(found, _shortened(names), strict=True)]


def _shortened(names: Sequence[str]) -> Sequence[str]:
    """Without the words that all end or all begin with, such as those of a sweep; at least one word is left."""
    words = [re.split(r"(?<=/)|(?<=-)(?<!\de-)", name) for name in names]  # 1e-3 is one word
    for end, rest in ((-1, slice(None, -1)), (0, slice(1, None))):
        while len(words) > 1 and min(map(len, words)) > 1 and len({it[end] for it in words}) == 1:
            words = [it[rest] for it in words]
    shortened = ["".join(it).rstrip("-/") for it in words]
    return shortened if all(shortened) and len(set(shortened)) == len(names) else names


def _find(path: Path) -> Source:
    if not path.is_dir():
        raise ValueError(f"{path}: no such directory")
    if (path / CONFIG_FILE).is_file():
        return _hugging_face(path)
    inside = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    checkpoint = latest_checkpoint(inside)
    if checkpoint is None:
        raise ValueError(
            f"{path} holds no model: expected a Hugging Face directory (config.json), a run, its checkpoints/ folder "
            "or an iter_* folder"
        )
    if not has_encoder(checkpoint):
        raise ValueError(f"{checkpoint} is text only: there are no visual tokens to inspect")
    run = read_object(checkpoint / RUN_FILE)
    is_numbered = checkpoint in checkpoints_in(checkpoint.parent)
    parent = checkpoint.absolute().parent
    run_name = parent.parent.name if parent.name == "checkpoints" else parent.name
    return Source(
        name=f"{run_name}/{checkpoint.name}",
        directory=checkpoint,
        model_type=LAVER_EXPORT,
        step=iteration_of(checkpoint) if is_numbered else None,
        mask_ratio=run.get("mask_ratio", DEFAULT_MASK_RATIO),
    )


def _hugging_face(directory: Path) -> Source:
    path, config = read_config(directory)
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(
            f"{path}: model_type is {kind!r}, but a model that is given images is needed: one of {', '.join(FAMILIES)}"
        )
    refuse_mixed_attention(directory, config, "inspect the checkpoint, or an export with --format laver")
    return Source(directory.absolute().name, directory, kind)


@contextmanager
def exported(source: Source) -> Iterator[Path]:
    """The Hugging Face directory of a source: its own, or an export of a checkpoint that is removed afterwards. With
    [MASK], vision head and teacher where the checkpoint has them.

    Raises:
        ValueError: a damaged checkpoint, or too little space in the folder for temporary files (TMPDIR).
    """
    if (source.directory / CONFIG_FILE).is_file():
        yield source.directory
        return
    from laver_megatron.convert.megatron_to_hf import megatron_to_hf, open_checkpoint

    with tempfile.TemporaryDirectory(prefix="laver-inspect-") as folder:
        target = Path(folder) / "export"
        with_heads = open_checkpoint(source.directory).parts.vision_head is not None
        megatron_to_hf(source.directory, target, training_state=with_heads)
        yield target


def has_teacher(directory: Path) -> bool:
    """Whether a Hugging Face directory brings the teacher and both vision heads."""
    if not has_training_state(directory):
        return False
    from laver_megatron.hf.safetensors_reader import TRAINING_STATE, SafetensorsReader

    with SafetensorsReader(directory, TRAINING_STATE) as tensors:
        return any(name.startswith("teacher.model.") for name in tensors.names())
