"""From a Megatron checkpoint, written at any layout, to a Hugging Face directory, a block of rows at a time.

text-only checkpoint            stock Qwen2ForCausalLM, config.json as it came
with images, format `laver`     our own modelling code beside the weights; computes what was trained
with images, format `llava`     stock LlavaForConditionalGeneration, for runs with 1D positions and SigLIP or CLIP
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from laver_megatron.checkpoint.directory import latest_checkpoint
from laver_megatron.checkpoint.manifest import check_files, read_manifest
from laver_megatron.convert.export import FORMATS, MAX_FILE_BYTES, description
from laver_megatron.convert.output import Target, check_target, output_directory, run_tasks
from laver_megatron.convert.report import ByteBar, Conversion, warn
from laver_megatron.convert.safetensors_writer import (
    SafetensorsPlan,
    SafetensorsWriter,
    TensorPlace,
    create_files,
    plan_safetensors,
)
from laver_megatron.convert.torch_dist import TorchDistReader
from laver_megatron.encoders import encoder_settings, open_preprocessor
from laver_megatron.encoders.native import NativePreprocessor
from laver_megatron.hf.files import (
    CHAT_TEMPLATE_FILE,
    CONFIG_FILE,
    GENERATION_FILE,
    PREPROCESSOR_FILE,
    PROCESSOR_FILE,
    TOKENIZER_FILES,
)
from laver_megatron.hf.parts import ModelSettings, check_companions, parts_of_megatron, settings_of_checkpoint
from laver_megatron.hf.rows import row_blocks
from laver_megatron.hf.safetensors_reader import MODEL, TRAINING_STATE, num_not_finite
from laver_megatron.hf.shape import TEXT_PART, read_part
from laver_megatron.hf.tokenizer import IMAGE_TOKENS, load_tokenizer
from laver_megatron.hf.weights import TEACHER, ModelParts, Weight, is_training_state, weight_table
from laver_megatron.runtime.files import write_text
from laver_megatron.runtime.ranks import all_ranks, num_ranks, on_rank_0, rank

BLOCK_BYTES = 32 << 20


@dataclass(frozen=True)
class Checkpoint:
    """An opened Megatron checkpoint with all keys of its model; settings is None for a text-only one."""

    directory: Path
    parts: ModelParts
    weights: Mapping[str, Weight]
    tensors: TorchDistReader
    settings: ModelSettings | None


@dataclass(frozen=True)
class Output:
    """A Hugging Face tensor to write: part number `part` of a weight, read from Megatron key `key`."""

    weight: Weight
    part: int
    key: str
    place: TensorPlace


def open_checkpoint(directory: Path) -> Checkpoint:
    """Opens a checkpoint, or the newest of a checkpoints/ folder, and checks its keys and sizes by the name table and
    its files by the manifest (of the large ones the size; their values are checked when read).

    Raises:
        ValueError: no checkpoint, missing or damaged files, missing or unknown tensors, wrong sizes.
    """
    found = latest_checkpoint(directory)
    if found is None:
        folder = directory / "checkpoints"
        hint = f"; {folder} does" if folder.is_dir() and latest_checkpoint(folder) else ""
        raise ValueError(f"{directory} is not a checkpoint and holds none (an iter_* folder with hf/config.json){hint}")
    check_files(found, read_manifest(found).items(), whole=lambda name: not name.endswith(".distcp"))
    tensors = TorchDistReader(found)
    parts = parts_of_megatron(found, tensors.sizes)
    settings = None
    if parts.encoder is not None:
        settings = settings_of_checkpoint(found)
        check_companions(found / "hf", found / "encoder")
    weights = weight_table(parts)
    _check_keys(found, tensors, weights)
    return Checkpoint(found, parts, weights, tensors, settings)


def _check_keys(directory: Path, tensors: TorchDistReader, weights: Mapping[str, Weight]) -> None:
    missing = sorted(weights.keys() - tensors.sizes.keys())
    if missing:
        raise ValueError(f"{directory} lacks {len(missing)} tensors of its model, such as {', '.join(missing[:3])}")
    unknown = sorted(key for key in tensors.sizes.keys() - weights.keys() if not key.startswith("optimizer."))
    if unknown:
        raise ValueError(
            f"{directory} holds {len(unknown)} tensors that its model has no place for, such as "
            f"{', '.join(unknown[:3])}"
        )
    for key, weight in weights.items():
        if tensors.sizes[key] != weight.size:
            raise ValueError(f"{directory}: {key} is of shape {tensors.sizes[key]}, but its model needs {weight.size}")


def megatron_to_hf(
    source_dir: Path,
    target_dir: Path,
    *,
    weights: str = "student",
    format: str | None = None,
    training_state: bool = False,
    max_file_bytes: float = MAX_FILE_BYTES,
    overwrite: bool = False,
    strict: bool = False,
    dry_run: bool = False,
    num_threads: int | None = None,
) -> None:
    """Converts; under torchrun every rank writes its share of the tensors.

    Args:
        weights: `student`, or `teacher`: its decoder layers and final norm with the student's everything else, in the
            student's types.
        format: `laver` (the default) or `llava` for a checkpoint with images, None for text only.
        training_state: whether [MASK], vision head and teacher go along in files of their own.
        overwrite, strict, dry_run, num_threads: as for `hf_to_megatron`.

    Raises:
        ValueError: a checkpoint that cannot be read or has not what is asked for, a target that may not be
            written, too little space.
        OSError: the disk's.
    """
    if not max_file_bytes >= 1:  # nor NaN
        raise ValueError(f"--max-file-bytes is {max_file_bytes}; give at least 1 (the default is {MAX_FILE_BYTES:.0e})")
    checkpoint = open_checkpoint(source_dir)
    _check_asked(checkpoint, weights, format, training_state)
    if checkpoint.settings is not None:
        format = format or "laver"
    small_files = _small_files(checkpoint, format, weights, training_state)
    num_threads = num_threads or min(os.cpu_count() or 1, 4)
    outputs, plans = _plan(checkpoint, weights, training_state, max_file_bytes)
    conversion = Conversion(
        checkpoint.directory,
        target_dir,
        [
            (Weight(o.key, (o.place.name,), (o.place.size,), o.weight.join), str(o.place.dtype), o.place.num_bytes)
            for o in outputs
        ],
    )
    target = Target(target_dir, overwrite, conversion.num_bytes, [source_dir, checkpoint.directory])
    if dry_run:
        conversion.print_plan(num_threads, BLOCK_BYTES)
        check_target(target)
        return
    mine = outputs[rank() :: num_ranks()]
    with (
        output_directory(target) as directory,
        ByteBar("to Hugging Face", sum(output.place.num_bytes for output in mine)) as progress,
    ):
        on_rank_0("create the files", lambda: create_files(plans, directory))
        write = partial(_write, checkpoint, mine, plans, directory, progress, strict, num_threads)
        all_ranks("write the weights", write)
        on_rank_0("finish the export", lambda: _write_small_files(small_files, directory))
    conversion.print_summary()
    if format == "llava" and rank() == 0:
        print(description.STOCK_PICTURES, end="")


def _check_asked(checkpoint: Checkpoint, weights: str, format: str | None, training_state: bool) -> None:
    if checkpoint.settings is None and format is not None:
        raise ValueError(
            f"{checkpoint.directory} is text only and becomes a Qwen2ForCausalLM; leave --format {format} out"
        )
    if format not in (None, *FORMATS):
        raise ValueError(f"format is {format!r}; choose from {', '.join(FORMATS)}")
    if weights not in ("student", "teacher"):
        raise ValueError(f"weights is {weights!r}; choose from student, teacher")
    if weights == "teacher" and not checkpoint.parts.teacher:
        raise ValueError(f"{checkpoint.directory} has no teacher; export --weights student")
    if training_state and not checkpoint.parts.vision_head:
        raise ValueError(f"{checkpoint.directory} has no [MASK], vision head or teacher; leave --training-state out")
    if training_state and weights == "teacher":
        raise ValueError("training continues from the student: give --training-state with --weights student")


def _plan(
    checkpoint: Checkpoint, weights: str, training_state: bool, max_file_bytes: float
) -> tuple[list[Output], list[SafetensorsPlan]]:
    """Every tensor to be written, and the files of the model and of the training state."""
    outputs, plans = [], []
    stems = (MODEL, TRAINING_STATE) if training_state else (MODEL,)
    for stem in stems:
        entries = [
            (weight, part, _key(checkpoint, weight, weights))
            for weight in checkpoint.weights.values()
            if is_training_state(weight.hugging_face[0]) == (stem == TRAINING_STATE)
            for part in range(len(weight.sizes))
        ]
        places = [
            TensorPlace(weight.hugging_face[part], weight.sizes[part], checkpoint.tensors.dtypes[weight.megatron])
            for weight, part, _ in entries
        ]
        plan = plan_safetensors(places, stem, max_file_bytes)
        plans.append(plan)
        outputs += [Output(*entry, place) for entry, place in zip(entries, plan.places, strict=True)]
    return outputs, plans


def _key(checkpoint: Checkpoint, weight: Weight, weights: str) -> str:
    """Where the values of a weight are read: the teacher's, where it is asked for and has one."""
    of_teacher = TEACHER + weight.megatron
    is_student = not is_training_state(weight.hugging_face[0])
    return of_teacher if weights == "teacher" and is_student and of_teacher in checkpoint.weights else weight.megatron


def _write(
    checkpoint: Checkpoint,
    outputs: list[Output],
    plans: list[SafetensorsPlan],
    directory: Path,
    progress: ByteBar,
    strict: bool,
    num_threads: int,
) -> None:
    writer = SafetensorsWriter(plans, directory)

    def write(output: Output) -> None:
        place = output.place
        for start, stop in row_blocks(place.size, place.dtype, BLOCK_BYTES):
            rows = checkpoint.tensors.read_part_rows(output.key, output.weight, output.part, start, stop)
            rows = rows.to(place.dtype)
            if wrong := num_not_finite(rows):
                warn(f"{checkpoint.directory}, tensor {output.key}, holds {wrong} NaN or infinite values", strict)
            writer.write_rows(place, start, rows)
            progress.add(rows.nbytes)

    written = False
    try:
        run_tasks([partial(write, output) for output in outputs], num_threads)
        written = True
    finally:
        writer.close(flush=written)


def _small_files(
    checkpoint: Checkpoint, format: str | None, weights: str, training_state: bool
) -> dict[str, Path | str]:
    """What stands beside the weights, by name: a file to copy, or the text."""
    hf, encoder = checkpoint.directory / "hf", checkpoint.directory / "encoder"
    files: dict[str, Path | str] = {name: hf / name for name in (CONFIG_FILE, GENERATION_FILE, *TOKENIZER_FILES)}
    if format is None:
        return files
    assert checkpoint.settings is not None
    settings = checkpoint.settings
    tokenizer = load_tokenizer(hf)
    dtype = str(checkpoint.tensors.dtypes["embedding.word_embeddings.weight"]).removeprefix("torch.")
    vision_config = encoder_settings(encoder)
    preprocessor = open_preprocessor(encoder, settings.max_image_tokens)
    native = None
    if isinstance(preprocessor, NativePreprocessor):
        native = {"min_pixels": preprocessor.min_pixels, "max_pixels": preprocessor.max_pixels}
    config = description.export_config(
        format,
        read_part(hf, TEXT_PART)[1],
        vision_config,
        attention=settings.attention,
        positions=settings.positions,
        feature_layer=settings.encoder_feature_layer,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKENS[1]),
        dtype=dtype,
    )
    processor_config = description.processor_config(
        format, vision_config, patch_size=preprocessor.token_size, native=native
    )
    readme = description.readme(
        format=format,
        name=checkpoint.directory.name,
        encoder=vision_config["model_type"],
        attention=settings.attention,
        positions=settings.positions,
        weights=weights,
        dtype=dtype,
        max_image_tokens=preprocessor.most_tokens if native else None,
        training_state=training_state,
    )
    if format == "laver":
        files[description.REMOTE_CODE.name] = description.REMOTE_CODE
    return files | {
        PREPROCESSOR_FILE: encoder / PREPROCESSOR_FILE,
        CONFIG_FILE: json.dumps(config, indent=2) + "\n",
        PROCESSOR_FILE: json.dumps(processor_config, indent=2) + "\n",
        CHAT_TEMPLATE_FILE: description.chat_template(tokenizer.chat_template),
        "README.md": readme,
    }


def _write_small_files(files: Mapping[str, Path | str], directory: Path) -> None:
    for name, content in files.items():
        if isinstance(content, str):
            write_text(directory / name, content)
        elif content.is_file():
            shutil.copyfile(content, directory / name)
