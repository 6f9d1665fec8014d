"""From what a user names as data (a folder of shards, an index, tars, a glob, URLs) to indexes."""

import glob
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from braceexpand import braceexpand
from tqdm import tqdm

from laver_megatron.data.index.build import index_tars
from laver_megatron.data.index.index_file import INDEX_NAME, PROGRESS_NAME, check_index, is_url, local_path, read_index
from laver_megatron.data.index.shard_index import ShardIndex, concatenate, select, successive
from laver_megatron.data.read.record_keys import keys_line
from laver_megatron.data.read.shard_cache import ShardCache
from laver_megatron.runtime.files import open_file

logger = logging.getLogger(__name__)

_TOOL = "tools/index_shards.py"


def find_shards(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    """The tars that paths, directories (their `*.tar`), globs and brace lists (`x-{000..099}.tar`) name, each once,
    sorted within each entry.

    Raises:
        ValueError: what is missing or empty, all of it in one message.
    """
    entries = _entries(paths)
    shards: dict[Path, Path] = {}  # by their absolute paths, so that each comes once
    problems = [] if entries else ["no shards were named"]
    for entry in entries:
        found, problem = _expand(entry)
        problems += [problem] if problem else []
        for shard in found:
            if shard.stat().st_size == 0:
                problems.append(f"{shard} is empty (0 bytes)")
            shards.setdefault(shard.absolute(), shard)
    for folder in sorted({shard.parent for shard in shards}):
        if (folder / PROGRESS_NAME).exists():
            problems.append(f"{folder} is not finished; go on with tools/make_shards.py --resume")
    if problems:
        raise ValueError("shards: " + "; ".join(problems))
    return list(shards.values())


def find_shards_and_urls(entries: Sequence[str]) -> list[str]:
    """As `find_shards`, followed by the entries that are URLs, with `{00000..00099}` expanded."""
    entries = _entries(entries)
    urls = [entry for entry in entries if is_url(entry)]
    local = [entry for entry in entries if not is_url(entry)]
    found = [str(shard) for shard in find_shards(local)] if local or not urls else []
    return [*found, *(name for url in urls for name in braceexpand(url))]


def path_problems(paths: Sequence[str]) -> list[str]:
    """Problems of entries that show without reading them; remote entries are checked when they are opened."""
    problems = []
    for named in paths:
        try:
            [entry] = _entries(named)
            path = Path(entry)
            if (path.is_dir() and (path / INDEX_NAME).is_file()) or (is_url(entry) and not path.is_file()):
                continue
            find_shards(entry)
        except ValueError as error:
            problems.append(str(error).removeprefix("shards: "))
    return problems


def open_indexes(
    paths: str | Path | Iterable[str | Path],
    num_workers: int = 1,
    cache: ShardCache | None = None,
    *,
    reads_shards: bool = True,
) -> list[ShardIndex]:
    """One index for each entry, compared with its shards.

    Args:
        paths: each a folder (its index.parquet, else all its tars), an index (`*.parquet`), a tar, or a glob of tars.
            Tars that an index.parquet beside them lists are taken from it; all others are read whole and indexed now.
        cache: for remote indexes and shards.
        reads_shards: False if no sample will be read: remote shards then need no cache.

    Raises:
        ValueError: entries that are missing or empty; an index that does not match its shards; with the remedy.
    """
    entries = _entries(paths)
    if not entries:
        raise ValueError("shards: no shards were named")
    indexes = [_open(entry, num_workers, cache, reads_shards) for entry in entries]
    for entry, index in zip(entries, indexes, strict=True):
        if index.other_keys:
            logger.info("%s: unused keys of records: %s", entry, keys_line(index.other_keys))
    entry_of: dict[str, str] = {}
    for entry, index in zip(entries, indexes, strict=True):
        twice = [shard.path for shard in index.shards if shard.path in entry_of]
        if twice:
            other = entry_of[twice[0]]
            logger.warning("%s and %s both have samples of %s; they may come twice", other, entry, twice[0])
        entry_of.update(dict.fromkeys((shard.path for shard in index.shards), entry))
    return indexes


def index_with_bar(
    shards: Sequence[str | Path], num_workers: int, open_tar: Callable[[str], int] = open_file
) -> ShardIndex:
    """`index_tars` with a progress bar over bytes, where there is a terminal."""
    are_local = not any(is_url(str(shard)) for shard in shards)
    total = sum(Path(shard).stat().st_size for shard in shards) if are_local else None
    hidden = not sys.stderr.isatty()
    with tqdm(total=total, desc="indexing", unit="B", unit_scale=True, disable=hidden, leave=False) as bar:
        return index_tars(shards, num_workers, bar.update, open_tar=open_tar)


def _entries(paths: str | Path | Iterable[str | Path]) -> list[str]:
    return [local_path(str(path)) for path in ([paths] if isinstance(paths, str | Path) else paths)]


def _open(entry: str, num_workers: int, cache: ShardCache | None, reads_shards: bool) -> ShardIndex:
    path = Path(entry)
    spare = None if cache is None else cache.folder
    if path.is_dir() and (path / INDEX_NAME).is_file():
        index = read_index(path / INDEX_NAME, spare=spare)
        _check_complete(index, path)
    elif is_url(entry) and not path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"{entry}: remote shards are opened through an index of them ({_TOOL} makes one)")
        index = _fetch_index(_need(cache, entry), entry)
    elif path.suffix == ".parquet":
        index = read_index(path, spare=spare)
    else:
        return _of_tars(find_shards(entry), num_workers, spare)
    check_index(index)
    remote = [shard.path for shard in index.shards if is_url(shard.path)]
    if remote and reads_shards:
        _need(cache, remote[0]).check(index)
    return index


def _fetch_index(cache: ShardCache, url: str) -> ShardIndex:
    while True:
        copy = cache.fetch(url)
        try:
            return read_index(copy, url)
        except ValueError:
            if copy.exists():
                raise  # else another process made room in between


def _need(cache: ShardCache | None, url: str) -> ShardCache:
    if cache is None:
        raise ValueError(f"{url} is remote, but there is no folder for copies of remote shards")
    return cache


def _check_complete(index: ShardIndex, folder: Path) -> None:
    listed = {Path(shard.path) for shard in index.shards}
    missing = [path.name for path in sorted(folder.absolute().glob("*.tar")) if path not in listed]
    if missing:
        raise ValueError(
            f"{index.path} lists {len(listed)} shards but not {missing[0]}"
            + (f" and {len(missing) - 1} more of its folder" if len(missing) > 1 else "")
            + f"; index them with {_TOOL} --shards {folder} --overwrite, or name the index file itself"
        )


def _of_tars(shards: list[Path], num_workers: int, spare: Path | None) -> ShardIndex:
    """The tars' index, in their order: from the indexes of their folders as far as these list them."""
    parts = []
    for folder in dict.fromkeys(shard.parent for shard in shards):
        parts += _of_folder(folder, [shard for shard in shards if shard.parent == folder], num_workers, spare)
    return parts[0] if len(parts) == 1 else concatenate(parts)


def _of_folder(folder: Path, shards: list[Path], num_workers: int, spare: Path | None) -> list[ShardIndex]:
    parts, others = [], shards
    if (folder / INDEX_NAME).is_file():
        index = read_index(folder / INDEX_NAME, spare=spare)
        number_of = {Path(shard.path): number for number, shard in enumerate(index.shards)}
        listed = [shard for shard in shards if shard.absolute() in number_of]
        others = [shard for shard in shards if shard.absolute() not in number_of]
        if listed:
            parts.append(_only(index, [number_of[shard.absolute()] for shard in listed]))
            check_index(parts[0])
    if others:
        logger.info(
            "indexing %d shards of %s, which no index lists; %s --shards %s does it once and for all",
            len(others), folder, _TOOL, folder,
        )  # fmt: skip
        parts.append(index_with_bar(others, num_workers))
    return parts


def _only(index: ShardIndex, numbers: list[int]) -> ShardIndex:
    """The samples of some shards, in the order of these shards."""
    if numbers == list(range(len(index.shards))):
        return index
    if numbers == list(range(numbers[0], numbers[-1] + 1)) and index.is_by_shard:
        return replace(successive(index, numbers[0], numbers[-1]), path=index.path)
    rank = np.full(len(index.shards), -1, np.int64)
    rank[numbers] = np.arange(len(numbers))
    rank_I = rank[index.shard_I]
    rows_I = np.flatnonzero(rank_I >= 0)
    rows_I = rows_I[np.argsort(rank_I[rows_I], kind="stable")]
    return replace(select(index, rows_I), path=index.path)


def _expand(entry: str) -> tuple[list[Path], str]:
    """The files an entry stands for, and what is wrong with it."""
    path = Path(entry)
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
        return found, "" if found else f"the directory {entry} holds no .tar file"
    if path.is_file():
        return [path], ""
    if "{" in entry:
        return _expand_braces(entry)
    if glob.has_magic(entry):
        found = sorted(Path(match) for match in glob.glob(entry, recursive=True) if Path(match).is_file())
        return found, "" if found else f"no file matches {entry}"
    return [], f"{entry} does not exist"


def _expand_braces(entry: str) -> tuple[list[Path], str]:
    """The files of a brace list, every one of which must be there."""
    try:
        names = list(braceexpand(entry))
    except ValueError as error:  # unbalanced
        return [], f"{entry}: {error}"
    found, problems = [], []
    for name in names:
        files, problem = ([], f"{name} does not exist") if "{" in name else _expand(name)
        found += files
        problems += [problem] if problem else []
    more = f" and {len(problems) - 1} more of {entry}" if len(problems) > 1 else ""
    return found, f"{problems[0]}{more}" if problems else ""
