"""A read-only index of local WebDataset-format tars: what each sample is made of and where its bytes lie.

A sample is a run of members that share a key: `0001.json` with `0001.jpg`, or `0002.json` with `0002.0.png`,
`0002.1.jpg`. Headers are read once, with Python's tarfile; nothing is ever extracted or unpickled, and a key
is only ever a name in messages, never a path.
"""

import glob
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from PIL import Image
from PIL.ContainerIO import ContainerIO

_IMAGE_EXTENSION = re.compile(r"(?:(\d+)\.)?(?:jpe?g|png|webp)")
_SWAPS_SIDES = range(5, 9)  # EXIF orientations that turn the picture by a quarter
_EXIF_ORIENTATION = 0x0112
_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a sample. extension: what follows the key's dot, in lower case (`json`, `jpg`, `0.png`)."""

    extension: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class ShardSample:
    """One sample of a shard. images: its pictures in order (`jpg`, or `0.jpg`, `1.jpg`, ... by number)."""

    shard: Path
    key: str
    text: Member
    images: tuple[Member, ...]

    @property
    def name(self) -> str:
        """Shard and key, for messages."""
        return f"{self.shard}: {self.key!r}"

    def read(self, member: Member) -> bytes:
        """The member's bytes.

        Raises:
            ValueError: the shard is shorter than when it was indexed.
        """
        with open(self.shard, "rb") as file:
            file.seek(member.offset)
            content = file.read(member.size)
        if len(content) != member.size:
            raise ValueError(
                f"{self.name}: .{member.extension} has {member.size} bytes in the index but {len(content)} "
                "could be read: the shard has changed since the run started"
            )
        return content

    def image_sizes(self) -> list[tuple[int, int]]:
        """(width, height) in pixels of each picture as it is to be seen, from the pictures' headers alone.

        Raises:
            OSError, SyntaxError, ValueError: what Pillow raises for a header that it cannot read.
        """
        sizes = []
        with open(self.shard, "rb") as file:
            for member in self.images:
                with Image.open(ContainerIO(file, member.offset, member.size)) as image:
                    width, height = image.size
                    # A PNG is decoded whole if asked for EXIF that it has not announced in front.
                    exif = image.getexif() if "exif" in image.info else {}
                    turned = exif.get(_EXIF_ORIENTATION) in _SWAPS_SIDES
                    sizes.append((height, width) if turned else (width, height))
        return sizes


def find_shards(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    """The tars that paths, directories (their `*.tar`) and globs name, each once, sorted within each entry.

    Raises:
        ValueError: what is missing or empty, all of it in one message.
    """
    entries = [paths] if isinstance(paths, str | Path) else list(paths)
    shards: dict[Path, None] = {}
    problems = [] if entries else ["no shards were named"]
    for entry in entries:
        found, problem = _expand(str(entry))
        problems += [problem] if problem else []
        for shard in found:
            if shard.stat().st_size == 0:
                problems.append(f"{shard} is empty (0 bytes)")
            shards[shard] = None
    if problems:
        raise ValueError("shards: " + "; ".join(problems))
    return list(shards)


def _expand(entry: str) -> tuple[list[Path], str]:
    """The files an entry stands for, and what is wrong with it."""
    path = Path(entry)
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
        return found, "" if found else f"the directory {entry} holds no .tar file"
    if path.is_file():
        return [path], ""
    if glob.has_magic(entry):
        found = sorted(Path(match) for match in glob.glob(entry, recursive=True) if Path(match).is_file())
        return found, "" if found else f"no file matches {entry}"
    return [], f"{entry} does not exist"


def index_shards(paths: str | Path | Iterable[str | Path]) -> tuple[list[ShardSample], Counter[str]]:
    """All samples of the shards, in the order of the files, and how many were left out, by reason.

    Members without a `.json` of their key are left out and counted.

    Raises:
        ValueError: missing or empty shards, tars that break off or hold garbage, tars without any sample.
    """
    samples: list[ShardSample] = []
    left_out: Counter[str] = Counter()
    for shard in find_shards(paths):
        before = len(samples)
        for key, members in groupby(_members(shard), key=lambda pair: pair[0]):
            sample = _sample(shard, key, [member for _, member in members])
            if sample is None:
                left_out["no .json"] += 1
            else:
                samples.append(sample)
        if len(samples) == before:
            raise ValueError(f"{shard} holds no complete sample: each needs a KEY.json, with KEY.jpg, KEY.0.png, ...")
    return samples, left_out


def _sample(shard: Path, key: str, members: list[Member]) -> ShardSample | None:
    extensions = Counter(member.extension for member in members)
    twice = [extension for extension, count in extensions.items() if count > 1]
    if twice:
        raise ValueError(f"{shard}: {key!r} has .{twice[0]} {extensions[twice[0]]} times; keys must be unique")
    texts = [member for member in members if member.extension == "json"]
    numbered = []
    for member in members:
        match = _IMAGE_EXTENSION.fullmatch(member.extension)
        if match:
            # A picture without a number comes first.
            numbered.append((int(match[1] or -1), member.extension, member))
    images = tuple(member for *_, member in sorted(numbered, key=lambda entry: entry[:2]))
    return ShardSample(shard, key, texts[0], images) if texts else None


def _members(shard: Path) -> Iterator[tuple[str, Member]]:
    """(key, member) of every regular file of a tar, without reading its payload."""
    file_size = shard.stat().st_size
    end = 0
    try:
        with tarfile.open(shard, "r:") as tar:
            for info in tar:
                end = tar.offset
                if info.offset_data + (info.size if info.isreg() else 0) > file_size:
                    raise ValueError(
                        f"{shard} is cut off: {info.name!r} should end at byte "
                        f"{info.offset_data + info.size}, but the file has {file_size}"
                    )
                if info.isreg() and not info.issparse():
                    yield _split_name(info.name, info)
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
    except tarfile.TarError as error:
        raise ValueError(f"{shard} is not a readable tar: {error}, at byte {end} or a little after") from error
    _check_end(shard, end)


def _split_name(name: str, info: tarfile.TarInfo) -> tuple[str, Member]:
    """WebDataset's rule: the key is all up to the first dot of the last part of the name."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, Member(extension.lower(), info.offset_data, info.size)


def _check_end(shard: Path, end: int) -> None:
    """tarfile takes a garbage header for the end of the archive; the real end is a block of zeros."""
    with open(shard, "rb") as file:
        file.seek(end)
        block = file.read(_BLOCK)
    if len(block) < _BLOCK:
        raise ValueError(f"{shard} is cut off: it ends at byte {end + len(block)} without a tar's closing zeros")
    if any(block):
        raise ValueError(f"{shard} holds garbage instead of a tar header at byte {end}")
