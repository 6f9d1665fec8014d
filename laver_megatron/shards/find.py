"""Which files the user means, and which format they have."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from laver_megatron.data.index.index_file import INDEX_NAME
from laver_megatron.shards.llava import LlavaSource
from laver_megatron.shards.parquet import ParquetSource
from laver_megatron.shards.record_source import RecordSource
from laver_megatron.shards.tars import TarSource, holds_packed

FORMATS = ("llava", "parquet", "onevision15", "webdataset")
_DESCRIPTIONS = ("made.json", "dataset_info.json", "dataset_infos.json")  # lie beside data and hold none
_SUFFIXES = {".json": "llava", ".jsonl": "llava", ".parquet": "parquet", ".tar": "tars"}


def open_source(
    entries: Sequence[Path], format_name: str | None, images: Path | None, min_ratings: Mapping[str, float]
) -> RecordSource:
    """The source that files, or folders with everything in them, form.

    Args:
        format_name: one of FORMATS; None: recognised from the files.
        images: the folder of LLaVA's pictures.
        min_ratings: see ParquetSource.

    Raises:
        ValueError: nothing is found, files of several formats, or options that the format does not have.
    """
    kind, paths = _find(entries, format_name)
    name = format_name or kind
    if format_name is None and kind == "tars":
        name = "onevision15" if holds_packed(paths[0]) else "webdataset"
    if images is not None and name != "llava":
        raise ValueError(f"--images belongs to the format llava, but {paths[0]} is {name}: its pictures are inside")
    if images is not None and not images.is_dir():
        raise ValueError(f"--images {images} is not a folder")
    if min_ratings and name != "parquet":
        raise ValueError(f"--min-... filter by the ratings of Parquet files, but {paths[0]} is {name}")
    if name == "llava":
        return LlavaSource(paths, images)
    return ParquetSource(paths, min_ratings) if name == "parquet" else TarSource(paths, packed=name == "onevision15")


def _find(entries: Sequence[Path], format_name: str | None) -> tuple[str, list[Path]]:
    """A kind of files, and all files of it in order: entries as they were named, folders sorted."""
    wanted = None if format_name is None else format_name if format_name in _SUFFIXES.values() else "tars"
    found: dict[str, dict[Path, None]] = {}
    for entry in entries:
        if not entry.exists():
            raise ValueError(f"--source {entry} does not exist")
        if not entry.is_dir():
            kind = wanted or _SUFFIXES.get(entry.suffix.lower())
            if kind is None:
                raise ValueError(f"--source {entry}: its name says nothing of its format; name it with --format")
            found.setdefault(kind, {})[entry] = None
            continue
        for path in sorted(entry.rglob("*")):
            kind = _SUFFIXES.get(path.suffix.lower())
            is_hidden = any(part.startswith(".") for part in path.relative_to(entry).parts)
            if kind is None or wanted not in (None, kind) or is_hidden or path.name in _DESCRIPTIONS:
                continue
            if path.is_file():
                found.setdefault(kind, {})[path] = None
    if "tars" in found and "parquet" in found:  # indexes that lie beside tars
        rest = {p: None for p in found["parquet"] if p.name != INDEX_NAME and not p.name.startswith("counts-")}
        found["parquet"] = rest
    found = {kind: paths for kind, paths in found.items() if paths}
    if len(found) != 1:
        what = (
            ", ".join(f"{len(paths)} {kind}" for kind, paths in found.items()) or "no .json, .jsonl, .parquet or .tar"
        )
        raise ValueError(
            f"--source {' '.join(map(str, entries))}: found {what}; name files of one format, or choose with --format"
        )
    [(kind, paths)] = found.items()
    return kind, list(paths)
