import json
import os
from dataclasses import fields, replace

import numpy as np
import pytest

from laver_megatron.data.index import counts as counts_module
from laver_megatron.data.index.build import index_tars
from laver_megatron.data.index.counts import count_samples
from laver_megatron.data.index.faults import Fault
from laver_megatron.data.index.index_file import read_index, write_index
from laver_megatron.data.index.opening import find_shards
from laver_megatron.data.read.conversations import parse_conversation
from laver_megatron.objective.language import IGNORE_LABEL
from tests.content import picture_bytes, question, read_member


@pytest.fixture
def index(demo_dir, tmp_path):
    write_index(index_tars(find_shards(demo_dir / "shards")), tmp_path / "index.parquet")
    return read_index(tmp_path / "index.parquet")


@pytest.fixture
def count(tokenizer, preprocessor):
    def count_(index, num_workers=0, limits=None, preprocessor=preprocessor):
        return count_samples(index, tokenizer, preprocessor, num_workers, limits)

    return count_


@pytest.fixture
def no_counting(monkeypatch):
    """Calling it makes all further counting a failure."""
    return lambda: monkeypatch.setattr(counts_module, "_count", lambda *arguments: pytest.fail("counted again"))


def same(one, other):
    for field in fields(one):
        left, right = getattr(one, field.name), getattr(other, field.name)
        assert left.dtype == right.dtype and np.array_equal(left, right), field.name


def caches(index):
    return sorted(path.name for path in index.path.parent.glob("counts-*.parquet"))


def test_counts_are_those_of_the_encoder(index, count, encoder, preprocessor):
    counts = count(index)
    assert {getattr(counts, f"{name}_I").dtype for name in ("tokens", "visual", "images", "labels")} == {np.dtype("i4")}
    for row in range(len(index)):
        sample = index.sample(row)
        messages = parse_conversation(read_member(sample, sample.text), len(sample.images), sample.name).messages
        encoded = encoder.encode(messages, [preprocessor.grid(*size) for size in index.image_sizes(row)], sample.key)
        assert counts.tokens_I[row] == len(encoded) and counts.images_I[row] == len(sample.images)
        assert counts.visual_I[row] == encoded.num_visual_tokens
        assert counts.labels_I[row] == (encoded.labels_T != IGNORE_LABEL).sum() > 0
    assert not counts.fault_I.any()


@pytest.mark.processes
def test_processes_and_the_file_change_nothing(index, count, no_counting, monkeypatch):
    monkeypatch.setattr(counts_module, "_SAMPLES_A_TASK", 7)
    alone = count(replace(index, path=None))
    same(count(index, num_workers=3), alone)
    assert len(caches(index)) == 1
    no_counting()
    same(count(index), alone)


def test_what_counts_depend_on_has_a_file_of_its_own(index, count, preprocessor, tokenizer):
    count(index)
    count(index, limits=(100, 100))
    preprocessor = type(preprocessor)(preprocessor.processor, height=64, width=64, patch_size=16)
    assert count(index, preprocessor=preprocessor).visual_I.max() * 4 == count(index).visual_I.max()
    other = replace(index, checksum_I=index.checksum_I + np.uint64(1))
    assert other.fingerprint != index.fingerprint
    count(other)
    assert len(caches(index)) == 4


def test_limits_shorten_samples(tmp_path, write_shard, count):
    turns = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "a"}]
    shard = write_shard(
        {"k": {"json": json.dumps(turns * 2).encode(), "0.jpg": picture_bytes(), "1.jpg": picture_bytes()}}
    )
    index = index_tars([shard])
    whole, short = count(index), count(index, limits=(1000, 100))
    assert whole.visual_I.tolist() == [128] and whole.images_I.tolist() == [2]
    assert short.visual_I.tolist() == [64] and short.images_I.tolist() == [1]
    assert short.labels_I[0] * 2 == whole.labels_I[0]


def test_faults_of_the_index_and_of_the_tokens(write_shard, tmp_path, count, caplog):
    samples = {
        "good": {"json": question("?")},
        "bad": {"json": b"{"},
        "spelt-out": {"json": question("<|image_pad|>")},
    }
    write_index(index_tars([write_shard(samples)]), tmp_path / "index.parquet")
    index = read_index(tmp_path / "index.parquet")
    for _ in range(2):  # counted, and from the file
        counts = count(index)
        assert counts.fault_I.tolist() == [0, Fault.invalid_json.code, Fault.image_count.code]
        assert counts.tokens_I[0] > 0 and not counts.tokens_I[1:].any()
    assert "'spelt-out' cannot be used (image_count, 1 so far)" in caplog.text


def test_a_damaged_file_is_made_anew(index, count, caplog):
    whole = count(index)
    [name] = caches(index)
    path = index.path.with_name(name)
    path.write_bytes(path.read_bytes()[:-20])
    assert (count(index).tokens_I == whole.tokens_I).all()
    assert f"{name} cannot be used" in caplog.text
    caplog.clear()
    assert (count(index).tokens_I == whole.tokens_I).all() and not caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only(index, count, caplog):
    index.path.parent.chmod(0o500)
    try:
        assert count(index).tokens_I.all()
    finally:
        index.path.parent.chmod(0o700)
    assert "cannot be kept beside it" in caplog.text


def test_a_folder_that_cannot_hold_the_counts(index, count, caplog, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(counts_module.FileLock, "acquire", refuse)
    assert count(index).tokens_I.all()
    assert "cannot be kept beside it" in caplog.text and not caches(index)
