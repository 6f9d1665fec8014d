"""Indexes and counts of many samples: the same as in memory, made again when they must be, shared by processes."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from laver_megatron.data.index import counts as counts_module
from laver_megatron.data.index import index_file, mapped
from laver_megatron.data.index.build import index_tars
from laver_megatron.data.index.counts import count_samples, read_counts, write_counts
from laver_megatron.data.index.index_file import read_index, write_index
from laver_megatron.data.index.opening import find_shards, open_indexes
from laver_megatron.data.index.shard_index import ShardIndex, select, successive
from tests.unit.data.index.test_formats import assert_same, the_counts, the_index


@pytest.fixture
def path(demo_dir, tmp_path, monkeypatch):
    """An index above the limit from which indexes are mapped, and read in several parts."""
    monkeypatch.setattr(mapped, "SMALLEST", 1)
    monkeypatch.setattr(index_file, "_ROWS_A_GROUP", 37)
    write_index(index_tars(find_shards(demo_dir / "shards")), tmp_path / "data" / "index.parquet")
    return tmp_path / "data" / "index.parquet"


@pytest.fixture(autouse=True)
def data_folder(tmp_path):
    (tmp_path / "data").mkdir()


def in_memory(path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(mapped, "SMALLEST", 1 << 40)
        return read_index(path)


def is_mapped(array):
    """Whether a file stands behind an array, that is no process's own memory."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array.base is not None and not array.flags.writeable


def test_a_mapped_index_is_the_one_in_memory(path, monkeypatch):
    expected, made, kept = in_memory(path, monkeypatch), read_index(path), read_index(path)
    for index in (made, kept):
        assert_same(index, expected)
        assert index.fingerprint == expected.fingerprint
        assert [index.sample(row) for row in range(len(index))] == [expected.sample(row) for row in range(len(index))]
        columns = [getattr(index, field.name) for field in fields(ShardIndex)]
        assert all(is_mapped(column) for column in columns if isinstance(column, np.ndarray))
    assert not is_mapped(expected.shard_I)


def test_all_kinds_of_samples_and_names(tmp_path, path, monkeypatch):
    write_index(the_index(tmp_path), tmp_path / "all.parquet")
    monkeypatch.setattr(index_file, "_ROWS_A_GROUP", 2)
    for _ in range(2):
        assert_same(read_index(tmp_path / "all.parquet"), the_index(tmp_path), without=("path",))
    write_counts(the_counts(), tmp_path / "counts.parquet")
    for _ in range(2):
        counts = read_counts(tmp_path / "counts.parquet", 3)
        assert_same(counts, the_counts())
        assert is_mapped(counts.tokens_I)


def test_small_ones_are_not_mapped(path, monkeypatch):
    monkeypatch.setattr(mapped, "SMALLEST", len(read_index(path)) + 1)
    path.with_suffix(".mapped").unlink()
    read_index(path)
    assert not path.with_suffix(".mapped").exists()


def test_counts_are_mapped_from_the_first_time_on(path, tokenizer, preprocessor, monkeypatch):
    index = read_index(path)
    counted = count_samples(index, tokenizer, preprocessor, 0)
    monkeypatch.setattr(counts_module, "_count", lambda *arguments: pytest.fail("counted again"))
    kept = count_samples(index, tokenizer, preprocessor, 0)
    assert_same(kept, counted)
    assert is_mapped(counted.tokens_I) and is_mapped(kept.fault_I)


def test_the_file_is_one_that_safetensors_reads(path):
    index, columns = read_index(path), load_file(path.with_suffix(".mapped"))
    np.testing.assert_array_equal(columns["checksum_I"], index.checksum_I)
    np.testing.assert_array_equal(columns["image_width_P"], index.image_width_P)


def test_an_index_that_was_replaced_is_mapped_anew(path, demo_dir, caplog):
    old = read_index(path)
    write_index(index_tars(find_shards(demo_dir / "shards")[:1]), path)
    new = read_index(path)
    assert len(new) < len(old) and new.fingerprint != old.fingerprint
    assert "it was made from another file" in caplog.text
    assert old.sample(len(old) - 1).text.size > 0  # whoever has the old one mapped goes on


@pytest.mark.parametrize("damage", ["header", "first column", "last column", "end", "empty"])
def test_a_damaged_file_is_written_again(path, damage, caplog):
    expected = read_index(path)
    file = path.with_suffix(".mapped")
    content = bytearray(file.read_bytes())
    place = {"header": 20, "first column": len(content) - len(content) // 2, "last column": -1, "end": 0, "empty": 0}
    content[place[damage]] ^= 255
    kept = {"end": content[:-9], "empty": b""}.get(damage, content)
    file.unlink()  # not in the place of what `expected` has mapped
    file.write_bytes(kept)
    assert_same(read_index(path), expected)
    [record] = caplog.records
    assert f"{file} could not be used (it is damaged: " in record.message
    assert record.message.endswith(f"the columns of {path} are now in {file}")
    caplog.clear()
    read_index(path)
    assert not caplog.text


@pytest.mark.parametrize(
    "damage",
    [
        lambda header: header["shard_I"].update(shape=[]),
        lambda header: header["shard_I"].update(shape=[10**30]),
        lambda header: header["shard_I"].update(shape=[-1]),
        lambda header: header["image_offset_P"].update(shape=[10**30]),
        lambda header: header["letters"].update(data_offsets=[0, 10**30]),
        lambda header: header["letters"].update(data_offsets=[-8, 0]),
        lambda header: header["letters"].update(data_offsets=[0.5, "1"]),
        lambda header: header["fault_I"].update(dtype="U8"),
        lambda header: header["fault_I"].update(dtype="F99"),
        lambda header: header.update(fault_I=3),
        lambda header: header.pop("fault_I"),
        lambda header: header.update(more=header["fault_I"]),
        lambda header: header.update(__metadata__=[]),
        lambda header: header["__metadata__"].update(checksums="[]"),
        lambda header: header["__metadata__"].update(checksums="{}"),
        lambda header: header["__metadata__"].update(checksums="[" * 100_000),
        lambda header: header["__metadata__"].pop("identity"),
    ],
)
def test_a_damaged_header_is_written_again(path, damage, caplog):
    expected, file = read_index(path), path.with_suffix(".mapped")
    content = file.read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + header_bytes])
    damage(header)
    damaged = json.dumps(header).encode()
    damaged += b" " * (-len(damaged) % 8)
    file.unlink()
    file.write_bytes(len(damaged).to_bytes(8, "little") + damaged + content[8 + header_bytes :])
    caplog.clear()
    assert_same(read_index(path), expected)
    [record] = caplog.records
    assert f"{file} could not be used (it is damaged: " in record.message
    assert file.read_bytes() == content


@pytest.mark.parametrize("header", [b"[" * 100_000, b"\xff" * 64, b"3" * 64, b"null" + b" " * 60])
def test_a_header_that_is_none_is_written_again(path, header, caplog):
    expected, file = read_index(path), path.with_suffix(".mapped")
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(len(header).to_bytes(8, "little") + header + content)
    caplog.clear()
    assert_same(read_index(path), expected)
    assert len(caplog.records) == 1 and file.read_bytes() == content


def test_a_file_that_cannot_be_read_is_left_alone(path, tmp_path, monkeypatch, caplog):
    expected, file = in_memory(path, monkeypatch), path.with_suffix(".mapped")
    file.mkdir()
    assert_same(read_index(path), expected)
    [record] = caplog.records
    assert record.message.startswith(f"{file} cannot be read (Is a directory); {path} is held in memory by each reader")
    caplog.clear()
    index = read_index(path, spare=tmp_path / "cache")
    assert_same(index, expected)
    [record] = caplog.records
    assert is_mapped(index.shard_I) and f"the columns of {path} are now in {tmp_path / 'cache'}" in record.message
    caplog.clear()
    assert is_mapped(read_index(path, spare=tmp_path / "cache").shard_I) and not caplog.text


def test_a_user_who_may_not_read_it(path, caplog):
    is_root = os.geteuid() == 0
    # A folder of its own, because every folder of tmp_path, of which there are more under xdist, is closed to others.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        path = Path(shutil.copy2(path, folder))
        expected = read_index(path)
        path.with_suffix(".mapped").chmod(0)
        if is_root:  # to whom permissions do not apply
            os.seteuid(65534)
        try:
            index = read_index(path)
        finally:
            if is_root:
                os.seteuid(0)
    assert_same(index, expected)
    [record] = caplog.records
    assert "cannot be read (Permission denied)" in record.message and not is_mapped(index.shard_I)


def test_errors_of_whoever_reads_a_parquet_file_stay_what_they_are(path):
    read_index(path)
    with pytest.raises(PermissionError, match="mine"), index_file.open_parquet(path):
        raise PermissionError("mine")


def test_what_does_not_match_its_fingerprint_is_not_kept(path):
    table = pq.read_table(path)
    place = table.schema.get_field_index("checksum")
    pq.write_table(table.set_column(place, "checksum", table["checksum"].take(list(range(len(table)))[::-1])), path)
    with pytest.raises(ValueError, match=r"cannot be used: it is damaged: its content has the hash"):
        read_index(path)
    assert not [name for name in os.listdir(path.parent) if name.endswith((".mapped", ".tmp"))]


def test_folders_that_cannot_be_written_to(path, tmp_path, monkeypatch, caplog):
    real = mapped.FileLock

    def refuse(name):
        if Path(name).parent == path.parent:
            raise PermissionError(13, "Permission denied", str(name))
        return real(name)

    monkeypatch.setattr(mapped, "FileLock", refuse)
    expected, file = in_memory(path, monkeypatch), path.with_suffix(".mapped")
    file.write_bytes(b"of something else")
    assert_same(read_index(path, spare=tmp_path / "cache"), expected)
    [record] = caplog.records
    assert record.message.startswith(f"{file} could not be used (it is damaged: it ends in its header); cannot be ")
    assert f"written (Permission denied); the columns of {path} are now in {tmp_path / 'cache'}" in record.message
    assert [file.suffix for file in (tmp_path / "cache").iterdir() if file.suffix != ".lock"] == [".mapped"]
    caplog.clear()
    index = read_index(path, spare=tmp_path / "cache")
    assert is_mapped(index.shard_I) and not caplog.text
    (tmp_path / "file").touch()
    for spare in (None, tmp_path / "file" / "below"):
        caplog.clear()
        assert not is_mapped(read_index(path, spare=spare).shard_I)
        [record] = caplog.records
        assert f"{path} is held in memory by each reader; start once where its folder can be" in record.message


@pytest.mark.processes
def test_two_readers_share_the_pages(path):
    index = read_index(path)
    code = (
        "import sys; from laver_megatron.data.index import index_file, mapped; mapped.SMALLEST = 1\n"
        "index = index_file.read_index(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "open\n"
        mine, theirs = (pages_of(process, path.with_suffix(".mapped")) for process in ("self", other.pid))
        other.communicate()
    num_bytes = path.with_suffix(".mapped").stat().st_size
    for pages in (mine, theirs):
        assert pages["Rss"] * 1024 >= num_bytes * 0.9 and pages["Shared_Clean"] == pages["Rss"]
    assert len(index)


def pages_of(process, file):
    """KiB of a process's mapping of a file, by kind."""
    lines = Path(f"/proc/{process}/smaps").read_text().splitlines()
    [start] = [number for number, line in enumerate(lines) if line.endswith(str(file))]
    return {line.split(":")[0]: int(line.split()[1]) for line in lines[start + 1 : start + 16]}


@pytest.mark.parametrize(("first", "last"), [(0, 1), (1, 2), (2, 2)])
def test_successive_shards_stay_mapped(path, demo_dir, tmp_path, first, last):
    train, valid = find_shards(demo_dir / "shards")
    shards = [shutil.copy(shard, tmp_path / f"{number}.tar") for number, shard in enumerate((train, valid, train))]
    write_index(index_tars(shards), path)
    index = read_index(path)
    part = successive(index, first, last)
    expected = select(index, np.flatnonzero((index.shard_I >= first) & (index.shard_I <= last)))
    assert index.is_by_shard
    assert_same(part, expected, without=("keys",))
    assert part.keys.to_pylist() == expected.keys.to_pylist() and part.fingerprint == expected.fingerprint
    assert part.sample(len(part) - 1) == expected.sample(len(part) - 1)
    assert is_mapped(part.checksum_I) and is_mapped(part.image_offset_P) and is_mapped(part.shard_I) == (first == 0)


def test_a_glob_of_successive_shards_stays_mapped(path, demo_dir):
    folder = path.parent
    for shard in find_shards(demo_dir / "shards"):
        shutil.copy(shard, folder)
    write_index(index_tars(find_shards(folder)), path)
    [index] = open_indexes([folder / "train-*.tar"])
    assert len(index) == 96 and is_mapped(index.shard_I) and index.path == path
