"""LLaVA's form: a JSON array or JSON Lines of conversations, and a folder of pictures that they name."""

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import xxhash

from laver_megatron.data.index.faults import Fault, SampleFault
from laver_megatron.data.index.members import MAX_PICTURE_BYTES
from laver_megatron.data.read.conversations import image_parts, parse_json, turns_of
from laver_megatron.data.read.record_keys import named_pictures
from laver_megatron.shards.json_records import read_records
from laver_megatron.shards.record_source import Found, FoundSample, RecordSource, identity, origin

_PART_NAMES = ("image", "path", "url", "image_url")  # keys under which a part of a message names its picture


class LlavaSource(RecordSource):
    """JSON files whose records name pictures below a folder.

    images: that folder; None if all samples are text only.
    """

    def __init__(self, paths: Sequence[Path], images: Path | None) -> None:
        self.paths = paths
        self.images = images

    def references(self) -> Iterator[tuple[int, bytes]]:
        for number, path in enumerate(self.paths):
            for record in read_records(path):
                yield number, record

    def load(self, references: Sequence[tuple[int, bytes]]) -> Iterator[list[Found]]:
        for file_number, record in references:
            try:
                yield [self._sample(record, self.paths[file_number])]
            except SampleFault as fault:
                yield [fault]

    def settings(self) -> dict[str, object]:
        return {"images": str(self.images.resolve()) if self.images else None}

    @property
    def has_files_apart(self) -> bool:
        return self.images is not None

    def stamp(self, references: Sequence[tuple[int, bytes]]) -> str:
        """Of the names, sizes and times of the pictures, and of which are missing."""
        if self.images is None:
            return ""
        digest = xxhash.xxh3_128()
        for _, record in references:
            try:
                names = picture_names(parse_json(record, ""), "")
            except SampleFault:
                continue
            for file in names:
                digest.update(f"{file!r} {_size_and_time(self.images, file)}".encode())
        return digest.hexdigest()

    def _sample(self, record: bytes, path: Path) -> FoundSample:
        document = parse_json(record, path.name)
        sample_id = identity(document)
        name = f"{path.name}: {str(sample_id)[:80]!r}" if sample_id is not None else f"{path.name}: {record[:60]!r}..."
        pictures = tuple(read_picture(self.images, file, name) for file in picture_names(document, name))
        return FoundSample(name, sample_id, document, pictures, origin(document))


def picture_names(document: object, name: str) -> list[str]:
    """The pictures that a record names: in `image` or `images`, a text or a list; or else in the parts of its messages.

    Raises:
        SampleFault: unreadable_image, for what is not a file's name; image_count, if both name different pictures.
    """
    names: list[Any] = named_pictures(document, name) if isinstance(document, dict) else []
    in_parts: list[Any] = [_name_in(part) for part in image_parts(turns_of(document))]
    if names and any(in_parts) and in_parts != names:
        raise SampleFault(Fault.image_count, f"{name}: its messages name other pictures than its `image` or `images`")
    names = names or in_parts
    for entry in names:
        if not isinstance(entry, str) or not entry:
            raise SampleFault(Fault.unreadable_image, f"{name}: {str(entry)[:80]!r} is no name of a picture")
    return names


def _name_in(part: dict) -> object:
    value = next((part[key] for key in _PART_NAMES if part.get(key)), None)
    return value.get("url") if isinstance(value, dict) else value


def read_picture(folder: Path | None, file: str, name: str) -> bytes:
    """The bytes of a file of the folder, which its name may not leave by an absolute path, by `..` or by a symbolic
    link.

    Raises:
        SampleFault: unsafe_key (it would leave the folder), unreadable_image (no such file) or image_too_large.
    """
    if folder is None:
        message = f"{name}: names the picture {file[:80]!r}; say in which folder it lies with --images"
        raise SampleFault(Fault.no_image_folder, message)
    if "://" in file or file.startswith("data:"):
        raise SampleFault(Fault.unreadable_image, f"{name}: {file[:80]!r} is no file; download pictures first")
    try:
        return _read_below(str(folder), file, name)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, SampleFault):
            raise
        raise SampleFault(Fault.unreadable_image, f"{name}: cannot read {file[:200]!r}: {error}") from error


def _read_below(folder: str, file: str, name: str) -> bytes:
    directory, base = os.path.split(os.path.join(folder, file))
    if base in ("", ".", "..") or not _is_below(directory, folder):
        raise SampleFault(Fault.unsafe_key, f"{name}: {file[:200]!r} lies outside {folder}")
    path = os.path.join(_real(directory), base)
    try:
        # Neither follows a link nor waits for the writer of a named pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        target = os.path.realpath(path, strict=True)
        if not _is_below(os.path.dirname(target), folder):
            raise SampleFault(Fault.unsafe_key, f"{name}: {file[:200]!r} is a link to outside {folder}") from None
        descriptor = os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as opened:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise SampleFault(Fault.unreadable_image, f"{name}: {file[:200]!r} is not a regular file")
        if status.st_size > MAX_PICTURE_BYTES:
            message = f"{name}: {file[:200]!r} has {status.st_size:,} bytes; at most {MAX_PICTURE_BYTES:,} are read"
            raise SampleFault(Fault.image_too_large, message)
        return opened.read()


def _size_and_time(folder: Path, file: str) -> tuple[int, int] | None:
    try:
        status = os.stat(os.path.join(folder, file))
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=65536)
def _real(directory: str) -> str:
    return os.path.realpath(directory)


def _is_below(directory: str, folder: str) -> bool:
    real, root = _real(directory), _real(folder)
    return real == root or real.startswith(root.rstrip(os.sep) + os.sep)
