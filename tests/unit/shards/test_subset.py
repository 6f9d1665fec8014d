import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laver_megatron.data.index.build import index_tars
from laver_megatron.data.index.index_file import check_index, read_index, write_index
from laver_megatron.data.index.opening import open_indexes
from laver_megatron.data.index.shard_index import concatenate, select
from laver_megatron.shards.subset import choose, manifest_hash, read_manifest, write_subset
from tests.content import picture_bytes, question, read_member
from tests.programs import run_here

TOOL = Path(__file__).parents[3] / "tools" / "subset_shards.py"
NUM_SAMPLES = 40


@pytest.fixture
def shards(write_shard):
    """Four shards of ten samples, of which number 7 and 17 cannot be used; every third has a picture."""
    paths = []
    for shard in range(4):
        samples = {}
        for number in range(10 * shard, 10 * shard + 10):
            text = "Q" if number % 3 else "<image>Q"
            answer = "" if number in (7, 17) else f"Answer {number}"
            files = {} if number % 3 else {"jpg": picture_bytes((20 + number, 20))}
            samples[f"{number % 20:03d}"] = {"json": question(text, answer), **files}  # keys come twice
        paths.append(write_shard(samples, f"s-{shard}.tar"))
    return paths


@pytest.fixture
def index(shards):
    return index_tars(shards)


def chosen(index):
    return {(index.key(row), int(index.checksum_I[row])) for row in range(len(index))}


def test_smaller_subsets_lie_within_larger_ones(index):
    subsets = [chosen(choose(index, num_samples, seed=1)) for num_samples in range(1, NUM_SAMPLES - 1)]
    assert [len(subset) for subset in subsets] == list(range(1, NUM_SAMPLES - 1))
    assert all(small < large for small, large in zip(subsets, subsets[1:], strict=False))


def test_seeds_choose_differently_and_each_sample_alike(index):
    counts = dict.fromkeys(chosen(choose(index, NUM_SAMPLES - 2, 1)), 0)
    for seed in range(300):
        for sample in chosen(choose(index, 19, seed)):
            counts[sample] += 1
    # Half of 300 each, +- 8.7; the largest of 38 deviations stays within five times that.
    assert all(abs(count - 150) < 44 for count in counts.values())


@settings(deadline=None, max_examples=20)
@given(st.permutations(range(4)), st.integers(1, NUM_SAMPLES - 2))
def test_the_order_of_shards_changes_nothing(shared_index, order, num_samples):
    rows = np.concatenate([np.flatnonzero(shared_index.shard_I == shard) for shard in order])
    other = choose(select(shared_index, rows), num_samples, seed=3)
    subset = choose(shared_index, num_samples, seed=3)
    assert chosen(other) == chosen(subset)
    assert manifest_hash(other) == manifest_hash(subset)


@pytest.fixture(scope="module")
def shared_index(tmp_path_factory):
    from webdataset import TarWriter

    folder = tmp_path_factory.mktemp("shards")
    for shard in range(4):
        with TarWriter(str(folder / f"{shard}.tar"), encoder=False, mtime=0) as tar:
            for number in range(10):
                answer = "" if (shard, number) in ((0, 7), (1, 7)) else f"{shard}.{number}"
                tar.write({"__key__": f"{number}", "json": question("Q", answer)})
    return index_tars(sorted(folder.glob("*.tar")))


def test_only_usable_samples_in_the_order_of_the_index(index):
    subset = choose(index, NUM_SAMPLES - 2, seed=1)
    assert not subset.fault_I.any()
    assert [subset.sample(row) for row in range(len(subset))] == [
        index.sample(row) for row in range(len(index)) if row not in (7, 17)
    ]


def test_more_than_there_are(index):
    for num_samples in (0, -1, NUM_SAMPLES - 1, 10**12):
        with pytest.raises(ValueError, match="the index has 38 usable samples of 40"):
            choose(index, num_samples, 1)


def test_paths_are_those_of_the_tars_from_wherever_the_subset_lies(index, shards, tmp_path):
    manifest = write_subset(index, 12, 1, tmp_path / "studies" / "a" / "subset.parquet")
    subset = read_index(tmp_path / "studies" / "a" / "subset.parquet")
    check_index(subset)
    assert {Path(shard.path) for shard in subset.shards} <= set(shards)
    for row in range(len(subset)):
        sample = subset.sample(row)
        assert b"Answer" in read_member(sample, sample.text)
    assert manifest.hash == manifest_hash(subset)
    assert read_manifest(tmp_path / "studies" / "a" / "subset.parquet") == manifest
    assert (manifest.num_samples, manifest.of_samples, manifest.of_fingerprint) == (12, 38, index.fingerprint)
    assert [path.name for path in (tmp_path / "studies" / "a").iterdir()] == ["subset.parquet"]


def test_data_and_subset_move_together(index, shards, tmp_path):
    write_subset(index, 12, 1, tmp_path / "subset.parquet")
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in (*shards, tmp_path / "subset.parquet"):
        shutil.move(path, moved / path.name)
    [subset] = open_indexes(moved / "subset.parquet")
    assert {Path(shard.path).parent for shard in subset.shards} == {moved}


def test_manifest_hash_tells_samples_apart(index):
    rows = np.arange(20)
    hashes = {manifest_hash(select(index, part)) for part in (rows, rows[1:], rows + 1, rows + 20)}
    assert len(hashes) == 4
    assert manifest_hash(select(index, rows)) == manifest_hash(select(index, rows[::-1]))


def test_a_plain_index_has_no_manifest(index, tmp_path):
    write_index(index, tmp_path / "index.parquet")
    with pytest.raises(ValueError, match="is no subset"):
        read_manifest(tmp_path / "index.parquet")


def test_remote_shards_are_chosen_from_without_fetching_any(index, tmp_path):
    far = replace(index, shards=tuple(replace(s, path=f"https://host/{s.name}") for s in index.shards))
    write_index(far, tmp_path / "far.parquet")
    output = tmp_path / "subset.parquet"
    done = run_here(TOOL, "--index", tmp_path / "far.parquet", "--num-samples", 38, "--output", output)
    assert done.returncode == 0, done.stderr
    assert [shard.path for shard in read_index(output).shards] == [shard.path for shard in far.shards]
    with pytest.raises(ValueError, match="there is no folder for copies"):
        open_indexes(output)


@pytest.mark.processes
def test_the_command_line(index, shards, tmp_path):
    write_index(index, tmp_path / "index.parquet")
    large = tmp_path / "large.parquet"
    command = [sys.executable, TOOL, "--index", tmp_path, "--num-samples", "30", "--seed", "2", "--output", large]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"manifest hash: {read_manifest(large).hash}" in done.stdout
    small = tmp_path / "small.parquet"
    assert run_here(TOOL, "--index", *shards, "--num-samples", 10, "--seed", 2, "--output", small).returncode == 0
    assert chosen(read_index(small)) < chosen(read_index(large))
    again = run_here(TOOL, "--index", tmp_path, "--num-samples", 10, "--output", small)
    assert again.returncode == 2 and "replace it with --overwrite" in again.stderr
    before = read_manifest(small).hash
    assert run_here(TOOL, "--index", tmp_path, "--num-samples", 10, "--output", small, "--overwrite").returncode == 0
    assert read_manifest(small).hash != before  # the default seed is another
    assert run_here(TOOL, "--index", tmp_path, "--num-samples", 99, "--output", tmp_path / "b.parquet").returncode == 2
    assert (
        "must end with .parquet"
        in run_here(TOOL, "--index", tmp_path, "--num-samples", 9, "--output", tmp_path / "b").stderr
    )


def test_several_indexes_are_one(index, shards):
    parts = [index_tars(shards[:1]), index_tars(shards[1:])]
    assert chosen(choose(concatenate(parts), 15, 1)) == chosen(choose(index, 15, 1))
