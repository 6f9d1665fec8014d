"""From a Hugging Face directory to a Megatron checkpoint that loads at any TP x PP, a block of rows at a time."""

import json
import os
import threading
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from laver_megatron.checkpoint.directory import RUN_FILE
from laver_megatron.checkpoint.manifest import Entry, describe, files_of, write_manifest
from laver_megatron.convert.output import Target, check_target, groups_of_bytes, output_directory, run_tasks
from laver_megatron.convert.report import ByteBar, Conversion, warn
from laver_megatron.convert.torch_dist import Box, write_box, write_metadata
from laver_megatron.hf.files import copy_model_files
from laver_megatron.hf.parts import check_companions, settings_of_export
from laver_megatron.hf.rows import row_blocks, runs_of_megatron_rows
from laver_megatron.hf.safetensors_reader import num_not_finite
from laver_megatron.hf.shape import TEXT_PART, VISION_PART, is_laver_export
from laver_megatron.hf.source import WeightSource
from laver_megatron.hf.weights import Size, Weight
from laver_megatron.runtime.files import named_errors
from laver_megatron.runtime.ranks import all_ranks, gathered, num_ranks, on_rank_0, rank

BLOCK_BYTES = 64 << 20
FILE_BYTES = 512 << 20


def open_source(directory: Path) -> WeightSource:
    """Opens a text-only Qwen2.5 or a LaVer export, with all that a checkpoint of it needs.

    Raises:
        ValueError: see `WeightSource`, `settings_of_export` and `check_companions`.
    """
    if is_laver_export(directory):
        settings_of_export(directory)
        check_companions(directory, directory)
    return WeightSource(directory)


def hf_to_megatron(
    source_dir: Path,
    target_dir: Path,
    *,
    overwrite: bool = False,
    strict: bool = False,
    dry_run: bool = False,
    num_threads: int | None = None,
) -> None:
    """Converts; under torchrun every rank writes its share of the files.

    Args:
        overwrite: replace a directory that holds converted weights.
        strict: a value that is NaN or infinite is an error, not a warning.
        dry_run: print what would be done.
        num_threads: None for the cores, at most 4.

    Raises:
        ValueError: a source that cannot be converted, a target that may not be written, too little space.
        OSError: the disk's.
    """
    source = open_source(source_dir)
    num_threads = num_threads or min(os.cpu_count() or 1, 4)
    conversion = Conversion(
        source_dir, target_dir, [(w, str(source.dtype(w)), source.num_bytes(w)) for w in source.weights.values()]
    )
    target = Target(target_dir, overwrite, conversion.num_bytes, [source_dir])
    if dry_run:
        conversion.print_plan(num_threads, BLOCK_BYTES)
        check_target(target)
        return
    groups = groups_of_bytes(source.weights.values(), source.num_bytes, FILE_BYTES)
    mine = {f"__{number}_0.distcp": groups[number] for number in range(rank(), len(groups), num_ranks())}
    with (
        output_directory(target) as directory,
        ByteBar("to Megatron", sum(source.num_bytes(w) for group in mine.values() for w in group)) as progress,
    ):
        writer = _Writer(source, directory, progress, strict)
        tasks = [partial(writer.write_file, file, group) for file, group in mine.items()]
        all_ranks("write the weights", lambda: run_tasks(tasks, num_threads))
        boxes = [box for of_rank in gathered(writer.boxes) for box in of_rank]
        entries = {name: entry for of_rank in gathered(writer.entries) for name, entry in of_rank.items()}
        on_rank_0("finish the checkpoint", lambda: _finish(source, directory, boxes, entries))
    conversion.print_summary()


class _Writer:
    """Writes files of boxes and remembers what is where. Files may be written by several threads."""

    def __init__(self, source: WeightSource, directory: Path, progress: ByteBar, strict: bool) -> None:
        self.source, self.directory, self.progress, self.strict = source, directory, progress, strict
        self.boxes: list[Box] = []
        self.entries: dict[str, Entry] = {}
        self._lock = threading.Lock()

    def write_file(self, file: str, weights: list[Weight]) -> None:
        boxes = []
        with named_errors(self.directory / file), (self.directory / file).open("wb") as stream:
            for weight in weights:
                for start, stop in row_blocks(weight.size, self.source.dtype(weight), BLOCK_BYTES):
                    values = self._read(weight, start, stop)
                    offsets: Size = (start, *[0] * (len(weight.size) - 1))
                    boxes.append(write_box(stream, file, weight.megatron, offsets, values))
                    self.progress.add(values.nbytes)
            stream.flush()
            os.fsync(stream.fileno())
        entry = describe(self.directory / file)
        with self._lock:
            self.boxes += boxes
            self.entries[file] = entry

    def _read(self, weight: Weight, start: int, stop: int) -> Tensor:
        """Megatron rows [start, stop) in memory of their own."""
        reader = self.source.reader(weight)
        values = torch.empty((stop - start, *weight.size[1:]), dtype=self.source.dtype(weight))
        for run in runs_of_megatron_rows(weight, start, stop):
            name = weight.hugging_face[run.part]
            block = reader.read(name, run.part_row, run.part_row + run.num_rows)
            if wrong := num_not_finite(block):
                warn(f"{reader.where(name)} holds {wrong} NaN or infinite values", self.strict)
            values[run.row - start : run.row - start + run.num_rows] = block
        return values


def _finish(source: WeightSource, directory: Path, boxes: list[Box], entries: dict[str, Entry]) -> None:
    """The small files: metadata, configuration, tokenizer, run.json, manifest."""
    write_metadata(directory, [(w.megatron, w.size, source.dtype(w)) for w in source.weights.values()], boxes)
    copy_model_files(source.directory, directory / "hf", TEXT_PART)
    run: dict = {"weights_only": True}
    if source.parts.encoder is not None:
        copy_model_files(source.directory, directory / "encoder", VISION_PART)
        run |= asdict(settings_of_export(source.directory))
    if source.parts.vision_head is not None:
        run["vision_head_hidden_size"], run["vision_head_output_size"] = source.parts.vision_head
    (directory / RUN_FILE).write_text(json.dumps(run, indent=1))
    small = {str(path.relative_to(directory)): path for path in files_of(directory)}
    write_manifest(directory, {name: entries.get(name) or describe(path) for name, path in small.items()})
