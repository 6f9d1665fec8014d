"""Seeded, nested subsets of indexed samples, for studies of how much data is needed.

Every usable sample has a position in an order that depends on the seed, its key and its checksum alone, and a subset of
N is the first N. So a smaller subset lies within every larger one of the same seed, however the samples are spread over
shards.

Letters: I samples.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import xxhash

from laver_megatron.data.index.index_file import read_table, write_index, write_table
from laver_megatron.data.index.shard_index import ShardIndex, select
from laver_megatron.shards.build import UsageError

_METADATA_KEY = b"laver_subset"


@dataclass(frozen=True)
class Manifest:
    """Which samples a subset holds.

    Attributes:
        hash: of their keys and checksums, in any order.
        of_samples, of_fingerprint: the number of usable samples to select from, and the index that they were in.
    """

    hash: str
    num_samples: int
    seed: int
    of_samples: int
    of_fingerprint: str


def choose(index: ShardIndex, num_samples: int, seed: int) -> ShardIndex:
    """The subset, in the order of the index.

    Raises:
        UsageError: there are fewer usable samples, or none is wanted.
    """
    usable_I = np.flatnonzero(index.fault_I == 0)
    if not 0 < num_samples <= len(usable_I):
        raise UsageError(
            f"--num-samples {num_samples:,}: the index has {len(usable_I):,} usable samples of {len(index):,}; choose "
            "between 1 and that"
        )
    hash_I = _hashes(index, seed)[usable_I]
    first_I = np.lexsort((index.checksum_I[usable_I], hash_I))[:num_samples]
    return select(index, np.sort(usable_I[first_I]))


def write_subset(index: ShardIndex, num_samples: int, seed: int, path: Path) -> Manifest:
    """Writes a subset as an index over the same tars, with its manifest inside, atomically.

    Raises:
        UsageError: as `choose`.
    """
    subset = choose(index, num_samples, seed)
    manifest = Manifest(
        hash=manifest_hash(subset),
        num_samples=num_samples,
        seed=seed,
        of_samples=int((index.fault_I == 0).sum()),
        of_fingerprint=index.fingerprint,
    )
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    unmarked = path.with_name(f".{path.stem}.unmarked.parquet")
    try:
        write_index(subset, unmarked)
        table = read_table(unmarked)
        metadata = {**(table.schema.metadata or {}), _METADATA_KEY: json.dumps(asdict(manifest)).encode()}
        write_table(table.replace_schema_metadata(metadata), path)
    finally:
        unmarked.unlink(missing_ok=True)
    return manifest


def read_manifest(path: Path) -> Manifest:
    """The manifest of a subset's file.

    Raises:
        ValueError: the file is no subset.
    """
    content = (read_table(path).schema.metadata or {}).get(_METADATA_KEY)
    if content is None:
        raise ValueError(f"{path} is no subset: it has no manifest; `laver shards subset` makes subsets")
    return Manifest(**json.loads(content))


def manifest_hash(index: ShardIndex) -> str:
    """Hash of which samples an index holds: their keys and checksums, in any order."""
    samples = zip(index.checksum_I.tolist(), _keys(index), strict=True)
    digest = hashlib.sha256()
    for line in sorted(f"{checksum:016x} {key}\n" for checksum, key in samples):
        digest.update(line.encode())
    return digest.hexdigest()


def _hashes(index: ShardIndex, seed: int) -> np.ndarray:
    """The place of each sample in the order of the seed, uint64 `[I]`."""
    checksums = index.checksum_I.astype("<u8").tobytes()
    hashes = (
        xxhash.xxh3_64_intdigest(checksums[8 * row : 8 * row + 8] + key.encode(), seed=seed)
        for row, key in enumerate(_keys(index))
    )
    return np.fromiter(hashes, np.uint64, len(index))


def _keys(index: ShardIndex) -> Iterator[str]:
    """All keys, a part of them in memory at a time."""
    for start in range(0, len(index), 1 << 16):
        yield from index.keys.slice(start, 1 << 16).to_pylist()
