"""Builds the index of tars: walks the headers, reads every file of a sample once, and judges every sample.

Nothing is unpacked, unpickled or decoded: of pictures only the headers are parsed, and of files that are neither
`.json` nor pictures only the names.
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import xxhash

from laver_megatron.data.index.faults import Fault, FaultLog, SampleFault
from laver_megatron.data.index.members import (
    IMAGE_EXTENSION,
    MAX_PICTURE_BYTES,
    MAX_RECORD_BYTES,
    SCATTERED,
    Damage,
    Member,
    MemberGroup,
    check_media,
    group_members,
    has_media,
)
from laver_megatron.data.index.shard_index import IndexRows, ShardIndex, concatenate
from laver_megatron.data.read.conversations import Conversation, parse_conversation
from laver_megatron.data.read.images import MAX_PIXELS, image_size
from laver_megatron.data.read.record_keys import add_keys, keys_line, shown
from laver_megatron.runtime.files import open_file
from laver_megatron.runtime.processes import map_in_processes

logger = logging.getLogger(__name__)

OnBytes = Callable[[int], object]
Example = tuple[Fault, str, str]  # key, what is wrong

_BUFFER_BYTES = 1 << 20
_NUM_EXAMPLES = 5
_NO_MATTER_WHERE = (Fault.damaged_shard.code, Fault.unsafe_key.code)  # that the files of a sample lie apart
_SAFE_KEY = re.compile(r"[^\x00-\x1f\x7f\\]+")


def index_tars(
    paths: Iterable[str | Path],
    num_workers: int = 1,
    on_progress: OnBytes | None = None,
    max_pixels: int = MAX_PIXELS,
    open_tar: Callable[[str], int] = open_file,
) -> ShardIndex:
    """The index of tars, in their order; the same for any number of worker processes.

    Faults of samples are stored in the index, and a few of each kind are logged with shard and key.

    Args:
        on_progress: called with the number of bytes read since its last call.
        open_tar: gives a file descriptor for a path; `ShardCache.open_once` fetches remote tars.

    Raises:
        ValueError: a tar that cannot be read; no sample in any of them; a worker process that was killed.
    """
    tasks = [str(path) for path in paths]
    if not tasks:
        raise ValueError("there are no tars to index")
    index_one = partial(_index_tar, max_pixels=max_pixels, open_tar=open_tar)
    results = map_in_processes(index_one, tasks, num_workers, on_progress or (lambda num_bytes: None))
    log, empty = FaultLog(logger), []
    for path, (index, examples) in zip(tasks, results, strict=True):
        for fault, key, detail in examples:
            log.add(fault, path, key, detail)
        if not len(index):
            empty.append(f"{path} holds no complete sample, but {_found(index)}")
            logger.warning("%s", empty[-1])
    if len(empty) == len(tasks):
        raise ValueError(f"{empty[0]}: each sample needs a KEY.json, with KEY.jpg, KEY.0.png, ...")
    return concatenate([index for index, _ in results])


def _found(index: ShardIndex) -> str:
    return keys_line(index.left_out + index.ignored) or "no files"


def _index_tar(
    path: str, progress: OnBytes, max_pixels: int, open_tar: Callable[[str], int]
) -> tuple[ShardIndex, list[Example]]:
    """The index of one tar, and a few examples of what is wrong in it."""
    try:
        with open(open_tar(path), "rb", buffering=_BUFFER_BYTES) as file:
            num_bytes = os.fstat(file.fileno()).st_size
            builder = _IndexBuilder(file, max_pixels)
            position = 0
            for found in group_members(file, num_bytes):
                builder.add(found)
                if file.tell() - position > _BUFFER_BYTES:
                    progress(file.tell() - position)
                    position = file.tell()
            progress(num_bytes - position)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    return builder.finish(path, num_bytes), builder.examples


class _IndexBuilder:
    """Judges the samples of one tar, and makes their index."""

    def __init__(self, file: BinaryIO, max_pixels: int) -> None:
        self.examples: list[Example] = []
        self._file, self._max_pixels = file, max_pixels
        self._rows = IndexRows()
        self._row_of: dict[str, int] = {}  # keys, in order
        self._counts: Counter[Fault] = Counter()
        self._left_out: Counter[str] = Counter()
        self._ignored: Counter[str] = Counter()
        self._other_keys: Counter[str] = Counter()
        self._without_text: list[tuple[str, bool]] = []  # groups of media: their key, and whether beside a damage
        self._num_damages = 0  # that no sample has been found lost to
        self._num_found_lost = 0
        self._num_damaged_bytes = 0

    def add(self, found: MemberGroup | Damage) -> None:
        """A sample-to-be or a damage, in the order of the tar."""
        if isinstance(found, Damage):
            self._num_damages += 1
            self._num_damaged_bytes += found.end - found.start
            self._note(Fault.damaged_shard, found.key, found.what)
            return
        text, images = self._split(found)
        if text is not None:
            self._add_row(found, text, images)
        elif has_media(found.members):
            self._without_text.append((found.key, found.beside_damage))

    def finish(self, path: str, num_bytes: int) -> ShardIndex:
        """The index of this shard."""
        self._judge_groups_without_text()
        self._left_out[Fault.damaged_shard] += self._num_lost(num_bytes)
        index = self._rows.finish(path, num_bytes)
        return replace(index, left_out=+self._left_out, ignored=self._ignored, other_keys=self._other_keys)

    def _num_lost(self, num_bytes: int) -> int:
        """Samples that damages have destroyed, besides those found lost, estimated from the mean size of whole samples.
        What is missing after the end of a truncated tar is unknown."""
        if not self._row_of:
            return self._num_damages
        bytes_a_sample = (num_bytes - self._num_damaged_bytes) / len(self._rows.keys)
        return max(self._num_damages, round(self._num_damaged_bytes / max(bytes_a_sample, 1)) - self._num_found_lost)

    def _split(self, group: MemberGroup) -> tuple[Member | None, list[Member]]:
        """The .json and the pictures in order: one without a number first, then by number."""
        text: Member | None = None
        numbered = []
        for member in group.members:
            match = IMAGE_EXTENSION.fullmatch(member.extension)
            if member.extension == "json":
                text = text or member
            elif match:
                numbered.append((int(match[1] or -1), member.extension, member))
            elif not has_media([member]):
                add_keys(self._ignored, {member.extension.rpartition(".")[2]: 1})
        return text, [member for *_, member in sorted(numbered, key=lambda entry: entry[:2])]

    def _add_row(self, group: MemberGroup, text: Member, images: list[Member]) -> None:
        digest = xxhash.xxh3_64()
        fault: Fault | None = None
        try:
            self._check_key(group)
            check_media(group.members, [text, *images])
        except SampleFault as error:
            fault = error.fault
            self._note(fault, group.key, str(error))
        try:
            conversation = self._read(text, images, digest, group.key)
            add_keys(self._other_keys, conversation.other_keys)
        except SampleFault as error:
            if fault is None:
                fault = Fault.damaged_shard if group.beside_damage else error.fault
                self._note(fault, group.key, str(error))
        if fault is None and group.beside_damage and (not images or conversation.is_placed):
            fault = Fault.damaged_shard
            self._note(fault, group.key, "beside a damage, and no text says how many pictures it has: it may lack some")
        if fault is None and group.beside_damage and self._ends_in_zeros(images[-1]):
            fault = Fault.damaged_shard
            self._note(fault, group.key, f"before a damage, and .{images[-1].extension} ends in zeros: it is cut off")
        if fault is Fault.damaged_shard:
            self._num_damages -= self._num_damages > 0
            self._num_found_lost += 1
        for member in images[self._rows.num_pictures :]:  # those behind one that cannot be read
            self._rows.add_picture(member, (0, 0))
        self._row_of.setdefault(group.key, len(self._rows.keys))
        self._rows.add(group.key, text, digest.intdigest(), fault)

    def _judge_groups_without_text(self) -> None:
        """Media whose .json lies elsewhere in the tar make that sample scattered; media without one are left out."""
        scattered = {key for key, _ in self._without_text if key in self._row_of}
        self.examples = [example for example in self.examples if example[1] not in scattered]
        for key, beside_damage in self._without_text:
            if key in scattered:
                continue
            self._num_damages -= beside_damage and self._num_damages > 0
            self._num_found_lost += beside_damage
            fault = Fault.damaged_shard if beside_damage else Fault.no_json
            self._left_out[fault] += 1
            self._note(fault, key, "pictures or other media without a .json")
        for row, key in enumerate(self._rows.keys if scattered else ()):
            # Before any other fault: only when its files lie together can the rest of it be judged.
            if key in scattered and self._rows.faults[row] not in _NO_MATTER_WHERE:
                self._rows.faults[row] = Fault.scattered.code
                self._note(Fault.scattered, key, SCATTERED)

    def _check_key(self, group: MemberGroup) -> None:
        key = group.key
        if not _SAFE_KEY.fullmatch(key) or key.startswith("/") or ".." in key.split("/"):
            raise SampleFault(Fault.unsafe_key, "keys are plain relative names")
        counts = Counter(member.extension for member in group.members)
        extension, count = counts.most_common(1)[0]
        if count > 1:
            raise SampleFault(Fault.duplicate_key, f".{shown(extension)} comes {count} times")
        if key in self._row_of:
            raise SampleFault(Fault.duplicate_key, f"sample {self._row_of[key]} of the shard has the same key")

    def _read(self, text: Member, images: list[Member], digest: xxhash.xxh3_64, key: str) -> Conversation:
        """Reads and judges a sample; the first fault is raised when all of it has been read."""
        first: SampleFault | None = None
        content = self._content(text)
        digest.update(content)
        try:
            conversation = parse_conversation(content, len(images), key)
        except SampleFault as error:
            first = error
        for member in images:
            size = (0, 0)
            try:
                content = self._content(member)
                digest.update(content)
                size = image_size(content, self._max_pixels)
            except SampleFault as error:
                first = first or SampleFault(error.fault, f".{member.extension}: {error}")
            self._rows.add_picture(member, size)
        if first is not None:
            raise first
        return conversation

    def _ends_in_zeros(self, member: Member) -> bool:
        """Whether the last 16 bytes are zeros, as no picture's are that is compressed."""
        self._file.seek(member.offset + max(member.size - 16, 0))
        return not any(self._file.read(min(member.size, 16)))

    def _content(self, member: Member) -> bytes:
        is_text = member.extension == "json"
        limit = MAX_RECORD_BYTES if is_text else MAX_PICTURE_BYTES
        if member.size > limit:
            fault = Fault.invalid_json if is_text else Fault.image_too_large
            raise SampleFault(fault, f".{member.extension} has {member.size:,} bytes; at most {limit:,} are read")
        self._file.seek(member.offset)
        return self._file.read(member.size)

    def _note(self, fault: Fault, key: str, detail: str) -> None:
        self._counts[fault] += 1
        if self._counts[fault] <= _NUM_EXAMPLES:
            self.examples.append((fault, key, detail))
