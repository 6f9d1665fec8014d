"""Files of each version that was ever written, kept as they were: they stay readable, or say which version they are.

Whoever changes a format raises its version (`_VERSION` in index_file.py, counts.py), adds a file of the new one here
with `python -m tests.unit.data.index.test_formats`, and says below what becomes of the old one.
"""

import json
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from laver_megatron.data.index import counts as counts_module
from laver_megatron.data.index import index_file
from laver_megatron.data.index.counts import SampleCounts, read_counts, write_counts
from laver_megatron.data.index.faults import FAULTS, Fault
from laver_megatron.data.index.index_file import read_index, write_index
from laver_megatron.data.index.shard_index import Shard, ShardIndex

GOLDEN = Path(__file__).parents[3] / "data" / "golden"


def int32(*values):
    return np.array(values, np.int32)


def the_index(folder: Path) -> ShardIndex:
    """One sample for each fault and three usable ones, in three shards of all kinds of names."""
    codes = [0, 0, 0, *(fault.code for fault in FAULTS)]
    num = len(codes)
    return ShardIndex(
        shards=(
            Shard(str(folder / "a.tar"), 10240, 2),
            Shard(str(folder / "below" / "b.tar"), 1 << 40, 1),
            Shard("https://host/c.tar", 512, num - 3),
        ),
        extensions=("jpg", "0.png", "1.webp"),
        shard_I=int32(0, 0, 1, *[2] * (num - 3)),
        keys=pa.array([f"key/é{i}" for i in range(num)], pa.large_string()),
        text_offset_I=np.arange(num) * 1000 + 512,
        text_size_I=np.arange(num) + 70,
        image_start_I=np.array([0, 1, 1, 3, *[3] * (num - 3)]),
        image_offset_P=np.array([5_000_000_000, 1536, 2048]),
        image_size_P=int32(2**31 - 1, 300, 400),
        image_extension_P=np.array([0, 1, 2], np.int16),
        image_width_P=int32(640, 0, 1),
        image_height_P=int32(480, 0, 200),
        checksum_I=np.arange(num, dtype=np.uint64) + np.uint64(2**64 - num),
        fault_I=np.array(codes, np.int8),
        left_out=Counter({"no_json": 2}),
        ignored=Counter({"txt": 7}),
        other_keys=Counter({"turns.name": 3}),
    )


def the_counts() -> SampleCounts:
    return SampleCounts(
        tokens_I=int32(100, 0, 4096),
        visual_I=int32(64, 0, 0),
        images_I=int32(1, 0, 0),
        labels_I=int32(9, 0, 2000),
        dropped_I=int32(0, 0, 3),
        fault_I=np.array([0, Fault.unsafe_key.code, 0], np.int8),
    )


def assert_same(found, expected, without=()):
    for field in fields(expected):
        if field.name not in without:
            one, other = getattr(found, field.name), getattr(expected, field.name)
            if isinstance(other, np.ndarray):
                assert one.dtype == other.dtype
                np.testing.assert_array_equal(one, other, field.name)
            else:
                assert one == other, field.name


def test_an_index_of_version_2_is_read():
    index = read_index(GOLDEN / "index-2.parquet")
    assert_same(index, the_index(GOLDEN), without=("path",))
    assert index.fingerprint == "3d45de859ea07880bd4797a26a58da01", "runs that go on, and counts, know their data by it"


def test_an_index_of_version_1_is_refused():
    """It took records for usable that are refused now, and samples for whole whose files were scattered."""
    with pytest.raises(ValueError, match=r"it is no index of version 2 \(it says 1\); index the shards again with"):
        read_index(GOLDEN / "index-1.parquet")


def test_counts_of_version_3_are_read():
    assert_same(read_counts(GOLDEN / "counts-3.parquet", 3), the_counts())


def test_counts_of_version_2_are_made_anew():
    """They counted the labels of answers that are marked as not to be trained."""
    with pytest.raises(ValueError, match="they are of version 2, not 3"):
        read_counts(GOLDEN / "counts-2.parquet", 3)


def written(path: Path) -> tuple[pa.Schema, dict]:
    """What decides whether a file can be read: the columns and what stands beside them."""
    table = pq.read_table(path)
    return table.schema.remove_metadata(), {key: json.loads(value) for key, value in table.schema.metadata.items()}


def test_what_is_written_today_is_the_newest_version(tmp_path):
    write_index(the_index(tmp_path), tmp_path / "index.parquet")
    write_counts(the_counts(), tmp_path / "counts.parquet")
    assert written(tmp_path / "index.parquet") == written(GOLDEN / f"index-{index_file._VERSION}.parquet")
    assert written(tmp_path / "counts.parquet") == written(GOLDEN / f"counts-{counts_module._VERSION}.parquet")


def test_other_versions_say_which_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(index_file, "_VERSION", 7)
    monkeypatch.setattr(counts_module, "_VERSION", 8)
    with pytest.raises(ValueError, match=r"it is no index of version 7 \(it says 2\); index the shards again with"):
        read_index(GOLDEN / "index-2.parquet")
    with pytest.raises(ValueError, match="they are of version 3, not 8"):
        read_counts(GOLDEN / "counts-3.parquet", 3)
    with pytest.raises(ValueError, match=r"no index of version 7 \(it says nothing\)"):
        read_index(GOLDEN / "counts-3.parquet")


if __name__ == "__main__":
    write_index(the_index(GOLDEN), GOLDEN / f"index-{index_file._VERSION}.parquet")
    write_counts(the_counts(), GOLDEN / f"counts-{counts_module._VERSION}.parquet")
