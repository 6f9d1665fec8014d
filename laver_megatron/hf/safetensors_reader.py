"""The tensors of a Hugging Face directory: one safetensors file, or several with an index, read in slices.

Files are mapped, so reading a slice touches only its own bytes, and none of them count as this process's
memory until they are copied.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from laver_megatron.hf.tensor_names import misnamed
from laver_megatron.hf.weights import Size, Weight
from laver_megatron.runtime.files import read_object

MODEL = "model"
TRAINING_STATE = "training_state"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class SafetensorsReader:
    """The tensors of `directory` in `stem`.safetensors, or in the files that `stem`.safetensors.index.json names.

    Several threads may read.

    Attributes:
        num_bytes_read: bytes of all slices asked for so far.

    Raises:
        ValueError: whatever cannot be read, with the file and, where there is one, the tensor.
    """

    def __init__(self, directory: str | Path, stem: str = MODEL) -> None:
        self.directory, self.stem = Path(directory), stem
        self.num_bytes_read = 0
        self._lock = threading.Lock()
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}
        index = self.directory / f"{stem}.safetensors.index.json"
        single = f"{stem}.safetensors"
        if index.is_file() and (self.directory / single).is_file():
            raise ValueError(
                f"{self.directory} holds {single} and {index.name} both, and transformers would read the first; "
                "remove the one that is not the model"
            )
        if index.is_file():
            self._file_of = _read_index(index)
        elif (self.directory / single).is_file():
            self._file_of = dict.fromkeys(self._opened(single).keys(), single)
        else:
            message = f"{self.directory} has neither {single} nor {index.name}"
            pickled = sorted(path.name for path in self.directory.iterdir() if path.suffix in _PICKLES)
            if pickled:
                message += (
                    f", only pickles ({', '.join(pickled[:3])}), which can run code when they are opened; "
                    "save the model again as safetensors with transformers' save_pretrained"
                )
            raise ValueError(message)

    def _opened(self, file: str) -> Any:
        """A file, opened when it is first asked for: its header is read once."""
        path = self.directory / file
        with self._lock:
            if file not in self._open:
                try:
                    self._open[file] = self._stack.enter_context(safe_open(str(path), framework="pt"))
                except (SafetensorError, OSError) as error:
                    raise ValueError(f"{path} is damaged: {error}; download or copy it again") from error
            return self._open[file]

    def __enter__(self) -> "SafetensorsReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()

    def _slice(self, name: str) -> Any:
        if name not in self._file_of:
            raise ValueError(f"{self.directory} has no tensor {name}")
        tensors = self._opened(self._file_of[name])
        try:
            return tensors.get_slice(name)
        except SafetensorError as error:
            raise ValueError(f"{self.where(name)} cannot be read: {error}") from error

    def read(self, name: str, start: int, stop: int, columns: slice | None = None) -> Tensor:
        """Rows [start, stop) of a tensor, and of these the given columns: a view of the mapped file."""
        whole = self._slice(name)
        part = whole[start:stop] if columns is None else whole[start:stop, columns]
        with self._lock:
            self.num_bytes_read += part.nbytes
        return part

    def read_whole(self, name: str) -> Tensor:
        """A tensor: a view of the mapped file."""
        return self._opened(self._file_of[name]).get_tensor(name)

    def damaged_files(self) -> Iterator[str]:
        """What is wrong with files that cannot be opened, or whose length is not what their header says."""
        for file in sorted(set(self._file_of.values())):
            try:
                self._opened(file)
            except ValueError as error:
                yield str(error)

    def check_index(self) -> None:
        """Compares every file's tensors with the index: transformers reads whole files.

        Raises:
            ValueError: a tensor that the index does not place in the file that holds it.
        """
        for file in sorted(set(self._file_of.values())):
            strays = sorted(name for name in self._opened(file).keys() if self._file_of.get(name) != file)  # noqa: SIM118
            if strays:
                told = self._file_of.get(strays[0])
                place = f"places it in {told}" if told else "does not name it"
                raise ValueError(
                    f"{self.directory / file}, tensor {strays[0]}: the index {place}; do the files belong together?"
                )

    def size(self, name: str) -> Size:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """bf16, fp16 or fp32; ValueError for anything else: those are quantised."""
        name_of_dtype = self._slice(name).get_dtype()
        if name_of_dtype not in DTYPES:
            raise ValueError(
                f"{self.where(name)} is of type {name_of_dtype}; only {', '.join(DTYPES)} can be converted: "
                "use the original checkpoint, not a quantised one"
            )
        return DTYPES[name_of_dtype]

    def names(self) -> set[str]:
        """All tensors of the directory."""
        return set(self._file_of)

    def where(self, name: str) -> str:
        """File and tensor, for messages."""
        return f"{self.directory / self._file_of[name]}, tensor {name},"


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name to file name; files lie in the index's own directory."""
    try:
        file_of = dict(read_object(path)["weight_map"])
        files = sorted(set(file_of.values()))
        elsewhere = [file for file in files if Path(file).name != file]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not an index of safetensors files ({error!r}); copy it again") from error
    if elsewhere:
        raise ValueError(f"{path} names {elsewhere[0]!r}, which is not in the directory of the index")
    if missing := [file for file in files if not (path.parent / file).is_file()]:
        raise ValueError(
            f"{path}: {len(missing)} of {len(files)} weight files are missing ({', '.join(missing[:3])}); "
            "download or copy them"
        )
    return file_of


def check_tensors(tensors: SafetensorsReader, weights: Mapping[str, Weight], may_hold: set[str] | None = None) -> None:
    """Checks the files' headers by the name table; no values are read. may_hold: names that the files may have in
    addition.

    Raises:
        ValueError: see `SafetensorsReader.check_index`; a tensor that is missing, one that the model has no place for,
            a wrong shape, a type that weights do not have, or parts of one Megatron tensor that differ in type.
    """
    tensors.check_index()
    expected = {name: size for weight in weights.values() for name, size in weight.hugging_face_sizes()}
    config = tensors.directory / "config.json"
    whole = f"the model of {config}" if tensors.stem == MODEL else f"the training state of {tensors.directory}"
    missing = sorted(expected.keys() - tensors.names())
    surplus = sorted(tensors.names() - expected.keys() - (may_hold or set()))
    if missing:
        remedy = misnamed(surplus, missing) or "download or copy it again"
        raise ValueError(
            f"{tensors.directory} lacks {len(missing)} tensors of {whole}, such as {', '.join(missing[:3])}; {remedy}"
        )
    if surplus:
        raise ValueError(
            f"{tensors.where(surplus[0])} has no place in {whole} with its {len(expected)} tensors "
            f"({len(surplus)} such); do the two belong together?"
        )
    for weight in weights.values():
        for name, size in weight.hugging_face_sizes():
            if tensors.size(name) != size:
                raise ValueError(f"{tensors.where(name)} is of shape {tensors.size(name)}, but {whole} needs {size}")
        dtypes = {tensors.dtype(name) for name in weight.hugging_face}
        if len(dtypes) > 1:
            raise ValueError(
                f"{', '.join(weight.hugging_face)} of {tensors.directory} are of different types "
                f"({', '.join(sorted(map(str, dtypes)))}), but Megatron keeps them in one tensor; save them in one type"
            )


def num_not_finite(tensor: Tensor) -> int:
    """How many values are NaN or infinite. The sum, which is fast, tells in nearly every case that none is."""
    if torch.isfinite(tensor.sum()):
        return 0
    return tensor.numel() - int(torch.isfinite(tensor).sum())


def weight_problems(name: str, directory: Path) -> Iterator[str]:
    """Safetensors of a Hugging Face directory that are missing or cut short, judged by their headers."""
    if not directory.is_dir():
        yield f"{name} {directory}: no such directory"
        return
    if not (directory / "config.json").is_file():
        yield f"{name} {directory}: no config.json in it"
    try:
        with SafetensorsReader(directory) as tensors:
            yield from (f"{name} {problem}" for problem in tensors.damaged_files())
    except ValueError as error:
        yield f"{name} {error}"
