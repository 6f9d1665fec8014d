"""Reading the pickles of a checkpoint without running what they name.

A pickle can call any function. Checksums say that a checkpoint is the one that was written, not that its writer meant
well: whoever makes a checkpoint makes its manifest. So of the globals that a pickle names only those are looked up
that torch and Megatron-Core write themselves; anything else is refused by its name.
"""

import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch

from laver_megatron.runtime.engine import replaced
from laver_megatron.runtime.files import is_within
from laver_megatron.runtime.terminal import printable

_DCP = "torch.distributed.checkpoint"
# What `.metadata` is made of, in all versions of torch and Megatron-Core; dtypes are allowed besides.
_ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    *(
        (f"{_DCP}.metadata", name)
        for name in (
            "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata",
            "ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING",
        )
    ),
    *((f"{_DCP}.planner", name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    *((f"{_DCP}.filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")),
    # Empty classes, in checkpoints of Megatron-Core before 0.16.
    *(("megatron.core.dist_checkpointing.strategies.torch", name) for name in ("MCoreMetadata", "MCoreSavePlan")),
}  # fmt: skip


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], source: str) -> None:
        super().__init__(file)
        self._source = source

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise _refusal(self._source, f"{module}.{name}")


def _refusal(source: str, name: str) -> ValueError:
    return ValueError(
        f"{source} is a pickle that names {name}, which no checkpoint needs and which could run code when it is read; "
        "nothing of it was run. Do not use this checkpoint unless you know who made it"
    )


def read_metadata(directory: Path) -> Any:
    """The `Metadata` of a checkpoint in torch's distributed format.

    Raises:
        ValueError: its file cannot be read, or names what no checkpoint needs, or files outside the checkpoint.
    """
    from torch.distributed.checkpoint import FileSystemReader

    path = directory / ".metadata"
    try:
        with only_known_pickles(directory):
            return FileSystemReader(directory).read_metadata()
    except ValueError as error:
        if str(error).startswith(str(path)):
            raise
        raise _unreadable(directory, error) from error
    except Exception as error:  # a pickle can fail with anything
        raise _unreadable(directory, error) from error


def _unreadable(directory: Path, error: Exception) -> ValueError:
    return ValueError(f"{directory} is not a Megatron-Core checkpoint: .metadata cannot be read: {error}")


@contextmanager
def only_known_pickles(directory: Path) -> Iterator[None]:
    """Within the block, what torch and Megatron-Core unpickle while they read a checkpoint is restricted: `.metadata`
    to its own classes and to files of the checkpoint, the rest (common.pt, objects among the tensors) to what torch
    calls weights only."""
    from torch.distributed.checkpoint import filesystem

    load = torch.load

    def load_metadata(file: IO[bytes]) -> Any:
        source = str(getattr(file, "name", directory))
        metadata = _MetadataUnpickler(file, source).load()
        for name in {place.relative_path for place in (metadata.storage_data or {}).values()}:
            if not is_within(directory, name):
                raise ValueError(
                    f"{source} names {printable(name)}, which lies outside the checkpoint; nothing of it was read. "
                    "Do not use this checkpoint unless you know who made it"
                )
        return metadata

    def load_weights_only(file: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return load(file, *args, **{**kwargs, "weights_only": True})
        except pickle.UnpicklingError as error:
            source = str(file) if isinstance(file, (str, os.PathLike)) else f"{directory}: an object in a .distcp file"
            named = re.search(r"(?:GLOBAL|global:?|function|class)\s+`?([\w.]+\.[\w.]+)", str(error))
            raise _refusal(source, named[1] if named else str(error)) from error

    restricted = SimpleNamespace(load=load_metadata, dump=pickle.dump)
    with replaced(filesystem, "pickle", restricted), replaced(torch, "load", load_weights_only):
        yield
