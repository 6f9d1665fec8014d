"""Writes a set: shards with pictures, the same questions without them, and a description."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from laver_megatron.data.index.index_file import INDEX_NAME, write_index
from laver_megatron.data.index.shard_index import ShardIndex, concatenate
from laver_megatron.runtime.files import new_directory, write_json
from laver_megatron.shards.assemble import Picture, Sample
from laver_megatron.shards.shard_writer import SliceWriter
from laver_megatron.tasks.question import TRAIN, VALID
from laver_megatron.tasks.sample import Task, TaskSettings, make_task

TEXT_FOLDER, DESCRIPTION_NAME = "text", "tasks.json"
_MAX_SHARD_BYTES = 256 * 1024**2


def make_tasks(settings: TaskSettings, directory: Path) -> dict[str, Any]:
    """Makes train-NN.tar and valid-NN.tar, the same without pictures in text/, an index beside each, and tasks.json.

    Returns:
        what tasks.json holds: the settings and, by split and family, the number of samples and their chance level.

    Raises:
        ValueError: the directory exists.
    """
    if directory.exists():
        raise ValueError(f"--output {directory} exists; name a new directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with new_directory(directory) as unfinished:
        (unfinished / TEXT_FOLDER).mkdir()
        counts = {TRAIN: settings.num_train, VALID: settings.num_valid}
        found: dict[str, list[ShardIndex]] = {"": [], TEXT_FOLDER: []}
        families = {split: _write_split(settings, split, number, unfinished, found) for split, number in counts.items()}
        for folder, indexes in found.items():
            write_index(concatenate(indexes), unfinished / folder / INDEX_NAME)
        description = {
            "seed": settings.seed,
            "difficulty": list(settings.levels),
            "image_size": settings.image_size,
            **families,
        }
        write_json(unfinished / DESCRIPTION_NAME, description)
    return description


def _write_split(
    settings: TaskSettings, split: str, number: int, directory: Path, found: dict[str, list[ShardIndex]]
) -> dict[str, dict[str, float]]:
    """Writes a split with and without pictures, adds the indexes to `found` by folder, and counts each family."""
    chances: dict[str, list[float]] = {family: [] for family in settings.families}
    with ExitStack() as stack:
        writers = {
            folder: stack.enter_context(SliceWriter(directory / folder, split, _MAX_SHARD_BYTES)) for folder in found
        }
        for task in (make_task(settings, split, it) for it in range(number)):
            writers[""].write(_sample(task, (Picture("png", task.png(), task.size, task.size),)))
            writers[TEXT_FOLDER].write(_sample(task, ()))
            chances[task.family].append(task.question.chance)
    for folder, writer in writers.items():
        found[folder] += writer.indexes
    return {
        family: {"num_samples": len(values), "chance": round(sum(values) / len(values), 4)}
        for family, values in chances.items()
        if values
    }


def _sample(task: Task, pictures: tuple[Picture, ...]) -> Sample:
    return Sample(task.key, json.dumps(task.record(has_picture=bool(pictures))).encode(), pictures)
