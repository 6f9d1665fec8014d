"""Walks the headers of a tar: which files it holds, which samples they form, and where it is damaged.

A sample is a run of files that share a key: `0001.json` with `0001.jpg`, or `0002.json` with `0002.0.png`,
`0002.1.jpg`. As in webdataset, files whose names begin with a dot (macOS adds `._0001.jpg`) or contain none belong to
no sample and do not end one; the same holds for files in `__MACOSX/` or a folder like `__meta__/`.

webdataset silently ends a shard at a header that it cannot read; here the walk continues at the next whole header and
reports the damage.
"""

import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from laver_megatron.data.index.faults import Fault, SampleFault
from laver_megatron.data.read.record_keys import shown

# Of one file of a sample, wherever it comes from: larger than any conversation and any picture that is not a bomb. What
# is above is an accident or an attack, and is never read.
MAX_RECORD_BYTES, MAX_PICTURE_BYTES = 64 << 20, 256 << 20
IMAGE_EXTENSION = re.compile(r"(?:(\d{1,9})\.)?(?:jpe?g|png|webp|gif|bmp|tiff?)")
_BLOCK = tarfile.BLOCKSIZE
_MAGIC, _MAGIC_OFFSET = b"ustar", 257
_CHUNK_BYTES = 1 << 16  # small: what a damage hides is mostly near its start, and a tar may have thousands of them
# Two blocks of zeros end a tar, and more fill its last record: 10,240 bytes of `tar` and of Python, at most 1 MiB of
# those who write to tapes or with large buffers. What is more was never written: a download that was broken off
# leaves it in a file of the final size.
_MOST_END_BYTES = 2 * _BLOCK + (1 << 20)
_COMPRESSED = {
    b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2", b"PK\x03\x04": "zip",
}  # fmt: skip
_MAX_EXTENDED_HEADER_BYTES = 1 << 20  # names and attributes; nobody writes a megabyte of them
SCATTERED = "its files do not lie together in the tar, as those of a sample must; pack it with `tar --sort=name`"
_OF_NO_SAMPLE = re.compile(r"__[^/]*__(?:/|$)|(?:.*/)?__MACOSX/|(?:.*/)?(?:\.[^/]*|[^./]*)$", re.DOTALL)
LINK = "(link)"  # the extension of a link, whatever its name
_VIDEO_OR_AUDIO = re.compile(r"(?:.*\.)?(?:mp4|m4v|mov|avi|mkv|webm|mpe?g|mp3|wav|flac|ogg|opus|m4a|aac)", re.DOTALL)
_MEDIA = re.compile(
    rf"(?:.*\.)?(?:jpe?g|png|webp|gif|bmp|tiff?|hei[cf]|avif|jxl|jp2|svg)|{_VIDEO_OR_AUDIO.pattern}", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a sample.

    Attributes:
        extension: what follows the key's dot, in lower case (`json`, `jpg`, `0.png`).
        offset, size: of its bytes in the shard.
    """

    extension: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Damage:
    """A place where the tar cannot be read.

    Attributes:
        end: where it can be read again, or the end of the file.
        key: of the file that is cut off, if its header is whole.
    """

    start: int
    end: int
    what: str
    key: str = ""


@dataclass(slots=True)
class MemberGroup:
    """Adjacent files of one key. beside_damage: the tar cannot be read right before or after them, so that some may be
    missing."""

    key: str
    members: list[Member] = field(default_factory=list)
    beside_damage: bool = False


def group_members(file: BinaryIO, num_bytes: int) -> Iterator[MemberGroup | Damage]:
    """The candidate samples of an open tar in order, and its damages where they lie.

    Files of one key before and after a damage form one group, which comes after the damage."""
    group: MemberGroup | None = None
    links: list[tuple[str, Member]] = []  # of other keys, since the group began
    is_damaged = False
    for entry in walk(file, num_bytes):
        if isinstance(entry, Damage):
            is_damaged = True
            if group is not None:
                group.beside_damage = True
            yield entry
            continue
        key, member = entry
        if group is not None and group.key != key and member.extension == LINK:
            links.append((key, member))
            continue
        if group is None or group.key != key:
            if group is not None:
                yield group
            group = MemberGroup(key, beside_damage=is_damaged)
            # A link ends no sample; it may belong to the next one, or to one elsewhere in the tar.
            group.members += [link for of_key, link in links if of_key == key]
            yield from (MemberGroup(of_key, [link]) for of_key, link in links if of_key != key)
            links.clear()
        group.members.append(member)
        is_damaged = False
    if group is not None:
        yield group
    yield from (MemberGroup(of_key, [link]) for of_key, link in links)


def scattered_keys(found: Iterable[MemberGroup | Damage]) -> set[str]:
    """Keys of which one group has media or links, but lacks the .json that another one has."""
    with_text: set[str] = set()
    without: set[str] = set()
    for entry in found:
        if isinstance(entry, MemberGroup):
            if any(member.extension == "json" for member in entry.members):
                with_text.add(entry.key)
            elif has_media(entry.members):
                without.add(entry.key)
    return with_text & without


def has_media(members: Iterable[Member]) -> bool:
    """Whether some of these files are pictures, video or audio, or links to what may be."""
    return any(member.extension == LINK or _MEDIA.fullmatch(member.extension) for member in members)


def check_media(members: Iterable[Member], pictures: Iterable[Member]) -> None:
    """Compares a sample's files with those taken for its pictures: training on the rest alone would teach something
    else.

    Raises:
        SampleFault: a link, a picture of another kind or under another name, video or audio.
    """
    taken = set(pictures)
    for member in members:
        if member in taken or not has_media([member]):
            continue
        end = shown(member.extension)
        if member.extension == LINK:
            problem = "one of its files is a link: pack what it links to (tar --dereference --hard-dereference)"
            raise SampleFault(Fault.unreadable_image, problem)
        if _VIDEO_OR_AUDIO.fullmatch(member.extension):
            raise SampleFault(Fault.video_or_audio, f".{end} is video or audio, which this trainer cannot learn from")
        kinds = "JPEG, PNG, WebP, GIF, BMP or TIFF"
        problem = f".{end} is not read: pictures are KEY.EXTENSION or KEY.NUMBER.EXTENSION, in {kinds}"
        raise SampleFault(Fault.unreadable_image, problem)


def walk(file: BinaryIO, num_bytes: int) -> Iterator[tuple[str, Member] | Damage]:
    """(key, member) of every file of a tar that can belong to a sample, in order, without reading its content. Links
    come with the extension "(link)": they have no content of their own."""
    position = 0
    name: str | None = None  # from an extended header, for the header that follows
    size: int | None = None
    while True:
        start = position
        try:
            header = _header(file, position)
        except tarfile.HeaderError:
            damage = _end_or_damage(file, position, num_bytes)
            if damage is None:
                return
            yield damage
            position, name, size = damage.end, None, None
            if position >= num_bytes:
                return
            continue
        content = position + _BLOCK
        num_content = header.size if size is None or _is_extended(header) else size
        if header.type in (tarfile.LNKTYPE, tarfile.SYMTYPE):
            num_content = 0
        position = content + -(-num_content // _BLOCK) * _BLOCK
        if content + num_content > num_bytes:
            cut_key = _split_name(name or header.name)[0]
            what = f"{header.name!r} should end at byte {content + num_content}, but the file has {num_bytes}"
            yield Damage(start, num_bytes, f"cut off: {what}", "" if _is_extended(header) else cut_key)
            return
        if _is_extended(header):
            if num_content > _MAX_EXTENDED_HEADER_BYTES:
                yield Damage(start, position, f"an extended header of {num_content} bytes")
                continue
            file.seek(content)
            found_name, found_size = _extended(header, file.read(num_content))
            name, size = name if found_name is None else found_name, size if found_size is None else found_size
            continue
        full_name, name, size = name or header.name, None, None
        if header.type == tarfile.DIRTYPE or header.name.endswith("/") or _OF_NO_SAMPLE.match(full_name):
            continue
        key, extension = _split_name(full_name)
        is_file = header.type in tarfile.REGULAR_TYPES and header.type != tarfile.GNUTYPE_SPARSE
        yield key, Member(extension if is_file else LINK, content, num_content)


def _header(file: BinaryIO, position: int) -> tarfile.TarInfo:
    file.seek(position)
    header = tarfile.TarInfo.frombuf(file.read(_BLOCK), "utf-8", "backslashreplace")
    if header.size < 0:
        raise tarfile.HeaderError("negative size")
    return header


def _is_extended(header: tarfile.TarInfo) -> bool:
    return header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE) or header.type in (
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
    )


def _extended(header: tarfile.TarInfo, content: bytes) -> tuple[str | None, int | None]:
    """The name and size that an extended header gives to the file that follows, where it does."""
    if header.type == tarfile.GNUTYPE_LONGNAME:
        return content.rstrip(b"\0").decode("utf-8", "backslashreplace"), None
    if header.type not in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
        return None, None
    name = size = None
    position = 0
    while content[position : position + 1].isdigit():
        length = content[position : position + 10].partition(b" ")[0]
        if not length.isdigit():
            break
        record = content[position : position + int(length)]
        position += int(length)
        keyword, _, value = record[len(length) + 1 : -1].partition(b"=")
        if not record.endswith(b"\n"):
            break
        if keyword == b"path":
            name = value.decode("utf-8", "backslashreplace")
        elif keyword == b"size" and value.isdigit():
            size = int(value)
    return name, size


def _split_name(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key is all up to the first dot of the last part of the name."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _end_or_damage(file: BinaryIO, position: int, num_bytes: int) -> Damage | None:
    """What a block that is no header means: zeros up to the end of the file end a tar, unless there are too many."""
    if position >= num_bytes:
        return Damage(position, num_bytes, "cut off: the file ends without a tar's closing zeros")
    if position + _BLOCK > num_bytes:
        return Damage(position, num_bytes, "cut off: the file ends within a header")
    if _only_zeros(file, position):
        num_zeros = num_bytes - position
        if num_zeros <= _MOST_END_BYTES:
            return None
        what = f"bytes {position} to {num_bytes} are zeros, {num_zeros} of them, where a tar ends with "
        return Damage(position, num_bytes, f"{what}{_MOST_END_BYTES} at most: it was never written to its end")
    end = _next_header(file, position + 1, num_bytes)
    file.seek(position)
    block = file.read(_BLOCK)
    kind = next((kind for magic, kind in _COMPRESSED.items() if block.startswith(magic)), None)
    if position == 0 and kind:
        return Damage(0, num_bytes, f"no tar but a {kind} file; unpack it first")
    until = f"readable again from byte {end}" if end < num_bytes else "to the end of the file"
    what = "garbage" if any(block) else "zeros"
    return Damage(position, end, f"{what} instead of a tar header at byte {position}, {until}")


def _only_zeros(file: BinaryIO, position: int) -> bool:
    file.seek(position)
    while chunk := file.read(_CHUNK_BYTES):
        if chunk.count(0) != len(chunk):
            return False
    return True


def _next_header(file: BinaryIO, position: int, num_bytes: int) -> int:
    """Where the next whole header starts, at any offset (bytes may have been lost or added); num_bytes if there is
    none. Its checksum must be right, so that the content of a file is hardly ever taken for a header."""
    first = position
    while position < num_bytes:
        file.seek(position)
        chunk = file.read(_CHUNK_BYTES)
        place = chunk.find(_MAGIC)
        while place >= 0:
            start = position + place - _MAGIC_OFFSET
            if start >= first and _is_header(file, start):
                return start
            place = chunk.find(_MAGIC, place + 1)
        if len(chunk) < _CHUNK_BYTES:
            break
        position += len(chunk) - len(_MAGIC) + 1
    return num_bytes


def _is_header(file: BinaryIO, position: int) -> bool:
    try:
        _header(file, position)
    except tarfile.HeaderError:
        return False
    return True
