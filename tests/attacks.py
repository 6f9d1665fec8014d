"""Checkpoints that are damaged, or made by somebody to run code on whoever reads them, with manifests that fit."""

import os
import pickle
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import Metadata

from laver_megatron.checkpoint.manifest import describe, files_of, write_manifest


class RunsCode:
    """A pickle of it makes a directory when it is read."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self):
        return os.mkdir, (str(self.made),)


def renew_manifest(directory: Path) -> None:
    """A manifest that fits the files as they are now."""
    write_manifest(directory, {str(path.relative_to(directory)): describe(path) for path in files_of(directory)})


def poison_metadata(directory: Path, made: Path) -> Path:
    """The real metadata, with the attack beside them."""
    path = directory / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.planner_data = RunsCode(made)
    path.write_bytes(pickle.dumps(metadata))
    renew_manifest(directory)
    return path


def lead_outside(directory: Path, name: str) -> Path:
    """The real metadata, which say that the tensors lie in a file of that name."""
    path = directory / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = name
    path.write_bytes(pickle.dumps(metadata))
    renew_manifest(directory)
    return path


def poison_common(directory: Path, made: Path) -> Path:
    """The part that is not sharded: a file in 0.16, an object among the tensors in 0.19."""
    path = directory / "common.pt"
    if path.is_file():
        torch.save({**torch.load(path), "more": RunsCode(made)}, path)
    else:
        path = _poison_object(directory, "common_state/shard_0_1", made)
    renew_manifest(directory)
    return path


def _poison_object(directory: Path, key: str, made: Path) -> Path:
    """Appends another archive to the file of an object, and lets the metadata say that the object is there."""
    path = directory / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    (index,) = (index for index in metadata.storage_data if index.fqn == key)
    place = metadata.storage_data[index]
    with (directory / place.relative_path).open("ab") as file:
        place.offset = file.tell()
        torch.save([RunsCode(made)], file)
        place.length = file.tell() - place.offset
    path.write_bytes(pickle.dumps(metadata))
    return directory


# Names and contents of a checkpoint as far as the checks look.
FILES = {
    "__0_0.distcp": b"tensors",
    ".metadata": pickle.dumps(Metadata(state_dict_metadata={}, storage_data={})),
    "run.json": b"{}",
    "hf/config.json": b"{}",
    "hf/tokenizer.json": b"words",
}


def write_checkpoint(directory: Path, iteration: int) -> Path:
    path = directory / f"iter_{iteration:07d}"
    for name, content in FILES.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    renew_manifest(path)
    return path


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])
