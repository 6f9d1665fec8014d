"""WebDataset tars: those that came from elsewhere, and those of LLaVA-OneVision-1.5.

Plain: KEY.json, a conversation, with KEY.jpg or KEY.0.png, KEY.1.png, ...
LLaVA-OneVision-1.5 has two more forms, and packs several samples in a record in the first:
    {"images": [...], "prompts": [...], "captions": [...]} with KEY.img0.jpg, KEY.img1.jpg, ...; the entries are
        texts, one a sample, or lists, one turn (and any number of pictures) each
    {"texts": [turns], "media": "image" | "text", "name": ["0_cat.jpg", ...]} with KEY.0_cat.jpg, ...
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any, BinaryIO

from laver_megatron.data.index.faults import Fault, SampleFault
from laver_megatron.data.index.members import (
    MAX_PICTURE_BYTES,
    MAX_RECORD_BYTES,
    SCATTERED,
    Damage,
    Member,
    MemberGroup,
    check_media,
    group_members,
    has_media,
    scattered_keys,
)
from laver_megatron.data.read.conversations import parse_json, read_conversation
from laver_megatron.data.read.record_keys import first_present, shown
from laver_megatron.shards.record_source import Found, FoundSample, NoSample, RecordSource, identity, origin

# Also names that are no numbers (KEY.left.jpg), which training would not take for pictures.
_PICTURE = re.compile(r"(?:.*\.)?(?:jpe?g|png|webp|gif|bmp|tiff?)", re.DOTALL)
_DIGITS = re.compile(r"(\d{1,9})")
_PACKED_KEYS = frozenset(("texts", "captions", "prompts", "prompt", "name", "media"))  # of LLaVA-OneVision-1.5


@dataclass(frozen=True, slots=True)
class Record:
    """The members of one key, in the order of the tar; or a damage of the tar, in words.

    Attributes:
        is_suspect: members may have been lost in a damage beside them.
        is_scattered: more members of this key lie elsewhere in the tar.
    """

    file_number: int
    key: str
    members: tuple[Member, ...]
    damage: str = ""
    is_suspect: bool = False
    is_scattered: bool = False


class TarSource(RecordSource):
    """WebDataset tars.

    packed: whether a record may have one of the forms of LLaVA-OneVision-1.5.
    """

    def __init__(self, paths: Sequence[Path], packed: bool) -> None:
        self.paths = paths
        self.packed = packed

    def references(self) -> Iterator[Record]:
        for number, path in enumerate(self.paths):
            scattered = scattered_keys(_entries(path))
            for entry in _entries(path):
                if isinstance(entry, Damage):
                    yield Record(number, entry.key, (), f"{path} at byte {entry.start}: {entry.what}")
                else:
                    members, is_scattered = tuple(entry.members), entry.key in scattered
                    yield Record(number, entry.key, members, "", entry.beside_damage, is_scattered)

    def load(self, references: Sequence[Record]) -> Iterator[list[Found]]:
        for number, records in groupby(references, key=lambda record: record.file_number):
            with open(self.paths[number], "rb") as file:
                for record in records:
                    try:
                        yield self._samples(record, file)
                    except SampleFault as fault:
                        yield [fault]

    def settings(self) -> dict[str, object]:
        return {"packed": self.packed}

    def _samples(self, record: Record, file: BinaryIO) -> list[Found]:
        name = f"{self.paths[record.file_number].name}: {record.key[:200]!r}"
        if record.damage:
            raise SampleFault(Fault.damaged_shard, record.damage)
        if record.is_scattered:
            if all(member.extension != "json" for member in record.members):
                return []  # counted where the .json is
            raise SampleFault(Fault.scattered, f"{name}: {SCATTERED}")
        if not has_media(record.members) and all(member.extension != "json" for member in record.members):
            return [NoSample(_extensions(record.members))]
        text = _text_member(record, name)
        document = parse_json(_read(file, text, MAX_RECORD_BYTES, name), name)
        pictures = sorted((member for member in record.members if _PICTURE.fullmatch(member.extension)), key=_order)
        try:
            check_media(record.members, pictures)
        except SampleFault as fault:
            raise SampleFault(fault.fault, f"{name}: {fault}") from None
        if self.packed and isinstance(document, dict):
            _check_media(document, name)
            if document.get("captions"):
                if record.is_suspect:
                    raise SampleFault(Fault.damaged_shard, f"{name} lies beside a damage of the tar")
                return _unpack(document, pictures, file, name, record.key)
            if document.get("texts"):
                pictures = _named(document["name"], pictures, name) if document.get("name") else pictures
                document = _as_record(document, document["texts"])
        contents = tuple(_read(file, member, MAX_PICTURE_BYTES, name) for member in pictures)
        if record.is_suspect and not _names_its_pictures(document, len(contents), name):
            raise SampleFault(Fault.damaged_shard, f"{name} lies beside a damage of the tar, and may lack pictures")
        ignored = _extensions(member for member in record.members if member is not text and member not in pictures)
        return [
            FoundSample(name, identity(document, record.key), document, contents, origin(document), ignored=ignored)
        ]


def _as_record(document: dict, turns: object) -> dict:
    """A packed form as a record: its keys beside turns and pictures, with the turns. A conversation beside them is not
    read."""
    rest = {key: value for key, value in document.items() if key not in _PACKED_KEYS and key not in ("image", "images")}
    besides = {f"{key} beside a packed form": rest.pop(key, None) for key in ("conversations", "messages")}
    return {**rest, **besides, "conversations": turns}


def _extensions(members: Iterable[Member]) -> tuple[str, ...]:
    return tuple(member.extension.rpartition(".")[2] for member in members)


def _names_its_pictures(document: object, num_images: int, name: str) -> bool:
    """Whether a record itself says that it has this number of pictures, at least one."""
    try:
        return num_images > 0 and not read_conversation(document, num_images, name).is_placed
    except SampleFault as fault:
        if fault.fault is Fault.image_count:
            return False
        raise


def _check_media(document: dict, name: str) -> None:
    if document.get("media") not in (None, "image", "text"):
        message = f"{name}: `media` is {document['media']!r:.40}, which this trainer cannot learn from"
        raise SampleFault(Fault.video_or_audio, message)


def holds_packed(path: Path) -> bool:
    """Whether the first record of a tar that can be read has one of the forms of LLaVA-OneVision-1.5."""
    with open(path, "rb") as file:
        for entry in group_members(file, path.stat().st_size):
            try:
                members = [] if isinstance(entry, Damage) else [m for m in entry.members if m.extension == "json"]
                for member in members[:1]:
                    document = parse_json(_read(file, member, MAX_RECORD_BYTES, path.name), path.name)
                    return isinstance(document, dict) and any(document.get(key) for key in ("captions", "texts"))
            except SampleFault:
                continue
    return False


def _entries(path: Path) -> Iterator[MemberGroup | Damage]:
    with open(path, "rb") as file:
        yield from group_members(file, path.stat().st_size)


def _text_member(record: Record, name: str) -> Member:
    extensions = [member.extension for member in record.members]
    twice = next((extension for extension in extensions if extensions.count(extension) > 1), None)
    if twice is not None:
        raise SampleFault(Fault.duplicate_key, f"{name} has .{shown(twice)} {extensions.count(twice)} times")
    if "json" not in extensions:
        raise SampleFault(Fault.no_json, f"{name} has no .json, only {', '.join(map(shown, extensions))[:200]}")
    return record.members[extensions.index("json")]


def _read(file: BinaryIO, member: Member, limit: int, name: str) -> bytes:
    if member.size > limit:
        fault = Fault.invalid_json if member.extension == "json" else Fault.image_too_large
        message = f"{name}: .{member.extension[:40]} has {member.size:,} bytes; at most {limit:,} are read"
        raise SampleFault(fault, message)
    file.seek(member.offset)
    content = file.read(member.size)
    if len(content) != member.size:
        raise SampleFault(Fault.damaged_shard, f"{name}: .{member.extension[:40]} is cut off")
    return content


def _order(member: Member) -> tuple[bool, list[str | int], str]:
    """Pictures by the numbers in their names (2.png before 10.png); one without any comes first."""
    parts = _DIGITS.split(member.extension)  # text and digits in turn
    return len(parts) > 1, [int(part) if number % 2 else part for number, part in enumerate(parts)], member.extension


def _named(names: object, members: Sequence[Member], name: str) -> list[Member]:
    """The members that a document names, in its order; by their numbers if it names them otherwise."""
    if not isinstance(names, list) or not all(isinstance(entry, str) for entry in names):
        raise SampleFault(Fault.image_count, f"{name}: its pictures are named by {str(names)[:80]!r}")
    by_extension = {member.extension: member for member in members}
    # A member's name is KEY.EXTENSION, and documents name files by EXTENSION, or by the path that they once had.
    wanted = [entry.rpartition("/")[2].lower() for entry in names]
    if all(entry in by_extension for entry in wanted):
        return [by_extension[entry] for entry in wanted]
    if len(wanted) != len(members):
        raise SampleFault(Fault.image_count, f"{name}: names {len(wanted)} pictures but has {len(members)}")
    return list(members)


def _unpack(document: dict, pictures: Sequence[Member], file: BinaryIO, name: str, key: str) -> list[Found]:
    """The samples of a packed record."""
    captions = document["captions"]
    num_samples = len(captions) if isinstance(captions, list) else 0
    prompts: Any = first_present(document, "prompts", "prompt") or [""] * num_samples
    images = document.get("images") or [[]] * num_samples
    lists = (captions, prompts, images)
    if num_samples == 0 or not all(isinstance(entry, list) and len(entry) == num_samples for entry in lists):
        raise SampleFault(Fault.no_turns, f"{name}: images, prompts and captions are not lists of the same length")
    groups = [entry if isinstance(entry, list) else [entry] for entry in images]
    files = iter(_named(list(chain.from_iterable(groups)), pictures, name))
    samples: list[Found] = []
    for number, (prompt, caption, group) in enumerate(zip(prompts, captions, groups, strict=True)):
        contents = tuple(_read(file, next(files), MAX_PICTURE_BYTES, name) for _ in group)
        turns = _turns(prompt, caption)
        record = _as_record(document, turns)
        samples.append(FoundSample(f"{name}, part {number}", f"{key}/{number}", record, contents, origin(document)))
    return samples


def _turns(prompt: object, caption: object) -> list[dict[str, object]] | None:
    """One turn, or as many as the lists have; None if their lengths differ."""
    questions = prompt if isinstance(prompt, list) else [prompt]
    answers = caption if isinstance(caption, list) else [caption]
    if len(questions) != len(answers):
        return None
    pairs = zip(questions, answers, strict=True)
    return list(
        chain.from_iterable(({"role": "user", "content": q}, {"role": "assistant", "content": a}) for q, a in pairs)
    )
