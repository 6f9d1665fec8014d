import http.server
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import fsspec
import pytest
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from laver_megatron.data.batch.data_spec import DataSpec
from laver_megatron.data.batch.pack_reader import open_reader
from laver_megatron.data.index.build import index_tars
from laver_megatron.data.index.counts import count_samples
from laver_megatron.data.index.faults import Fault, SampleFault
from laver_megatron.data.index.index_file import read_index, write_index
from laver_megatron.data.index.opening import find_shards, open_indexes
from laver_megatron.data.index.shard_index import Shard
from laver_megatron.data.read import shard_cache
from laver_megatron.data.read.fetching import SCHEMES
from laver_megatron.data.read.sample_files import SampleFiles
from laver_megatron.data.read.shard_cache import ShardCache
from tests.content import picture_bytes, question
from tests.programs import run_here
from tests.unit.data.batch.test_pack_reader import same


class Disk(LocalFileSystem):
    """Stands in for a store of objects; file: names what is local."""

    protocol = "disk"
    get_file = AbstractFileSystem.get_file  # in chunks, as others do


fsspec.register_implementation("disk", Disk)
SCHEMES["disk"] = lambda url: {}

TOOL = Path(__file__).parents[4] / "tools" / "index_shards.py"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        self.server.requests.append(self.path)


@pytest.fixture
def served(tmp_path):
    """(folder, its URL, the list of what was asked for)"""
    (tmp_path / "served").mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "served")) as server:
        server.requests = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path / "served", f"http://127.0.0.1:{server.server_port}", server.requests
        server.shutdown()


@pytest.fixture
def cache(tmp_path):
    return ShardCache(tmp_path / "cache", 1000)


@pytest.fixture
def files(tmp_path):
    """files(3, 400) -> three shards of 400 bytes, each of its own letter, named by URLs."""

    def make(number, num_bytes):
        shards = []
        for letter in "abcdefgh"[:number]:
            (tmp_path / letter).write_bytes(letter.encode() * num_bytes)
            shards.append(Shard(f"disk://{tmp_path / letter}", num_bytes, 1))
        return shards

    return make


def content(cache, shard):
    file = cache.open(shard)
    try:
        return os.read(file, 10_000)
    finally:
        os.close(file)


def copies(cache):
    return sorted(path.read_bytes()[:1].decode() for path in cache.folder.glob("*.copy"))


def test_the_least_recently_used_goes(cache, files):
    a, b, c = files(3, 400)
    assert content(cache, a) == b"a" * 400 and content(cache, b) == b"b" * 400
    for path in cache.folder.glob("*.copy"):
        os.utime(path, (1, 1) if path.read_bytes()[:1] == b"a" else (2, 2))
    assert content(cache, a) == b"a" * 400  # used now
    assert content(cache, c) == b"c" * 400
    assert copies(cache) == ["a", "c"]
    assert not list(cache.folder.glob("*.part"))


def test_a_copy_is_fetched_once(cache, files, monkeypatch):
    [shard] = files(1, 400)
    content(cache, shard)
    monkeypatch.setattr(shard_cache, "fetch_into", lambda *_: pytest.fail("fetched again"))
    assert content(ShardCache(cache.folder, 1000), shard) == b"a" * 400


def test_a_copy_that_goes_stays_readable(cache, files):
    a, b, c = files(3, 400)
    file = cache.open(a)
    content(cache, b), content(cache, c)
    assert copies(cache) == ["b", "c"] and os.read(file, 1000) == b"a" * 400
    os.close(file)


def test_another_size_than_in_the_index(cache, files, monkeypatch):
    monkeypatch.setattr(shard_cache.time, "sleep", lambda seconds: None)
    [shard] = files(1, 400)
    with pytest.raises(
        ValueError, match=r"disk://.* cannot be fetched: it has 400 bytes, but 401 in the index \(tried 8"
    ):
        cache.open(Shard(shard.path, 401, 1))
    with pytest.raises(ValueError, match="it has more than 399 bytes, but 399 in the index"):
        cache.open(Shard(shard.path, 399, 1))
    with pytest.raises(
        ValueError, match=r"index \(tried 8 times\); if it has been replaced, index it again with tools/"
    ):
        cache.open(Shard(shard.path, 399, 1))
    with pytest.raises(ValueError, match="gone cannot be fetched: .*No such file"):
        cache.open(Shard("disk:///gone", 1, 1))
    assert not copies(cache) and not list(cache.folder.glob("*.part"))


def test_what_a_killed_process_left(cache, files):
    a, b = files(2, 600)
    cache.folder.mkdir()
    for shard in (a, b):
        (cache.folder / cache._name(shard.path)).with_suffix(".part").write_bytes(b"x" * 300)
        (cache.folder / cache._name(shard.path)).with_suffix(".room").write_bytes(b"x" * 600)
    assert content(cache, a) == b"a" * 600
    assert not list(cache.folder.glob("*.part")) and not list(cache.folder.glob("*.room"))


def test_files_that_others_take_away_while_room_is_made(cache, files, monkeypatch):
    a, b, c = files(3, 400)
    content(cache, a), content(cache, b)
    listed = ShardCache._files

    def vanish(self, suffix):
        found = listed(self, suffix)
        for path in found:
            path.unlink()
        return found

    monkeypatch.setattr(ShardCache, "_files", vanish)
    assert content(cache, c) == b"c" * 400


def test_what_another_process_finishes_while_room_is_made_is_counted(cache, files, monkeypatch):
    a, b = files(2, 600)
    cache.folder.mkdir()
    part = (cache.folder / cache._name(a.path)).with_suffix(".part")
    part.write_bytes(b"a" * 600)
    listed = ShardCache._files

    def finish(self, suffix):
        found = listed(self, suffix)
        if part.exists():
            part.rename(part.with_suffix(".copy"))
        return found

    monkeypatch.setattr(ShardCache, "_files", finish)
    assert content(cache, b) == b"b" * 600
    monkeypatch.undo()
    assert copies(cache) == ["b"], "both are more than the folder may hold"


def test_a_copy_of_an_index_that_goes_before_it_is_read(served, demo_dir, tmp_path, monkeypatch):
    folder, url, _ = served
    for shard in find_shards(demo_dir / "shards"):
        shutil.copy(shard, folder)
    write_index(index_tars(find_shards(folder)), folder / "index.parquet")
    cache, fetch, fetched = ShardCache(tmp_path / "cache", 10_000_000), ShardCache.fetch, []

    def fetch_and_lose(self, *arguments):
        fetched.append(fetch(self, *arguments))
        if len(fetched) == 1:
            fetched[0].unlink()
        return fetched[-1]

    monkeypatch.setattr(ShardCache, "fetch", fetch_and_lose)
    [index] = open_indexes(f"{url}/index.parquet", cache=cache)
    assert len(index) == 120 and len(fetched) == 2


def read_all(cache, shards, number, failures):
    for turn in range(10):
        shard = shards[(turn * (number + 1) + number) % len(shards)]
        expected = shard.path[-1].encode() * shard.num_bytes
        if content(cache, shard) != expected:
            failures.put((number, turn))


@pytest.mark.processes
def test_processes_share_a_folder_that_is_too_small_for_all(cache, files):
    shards = files(5, 400)
    context = multiprocessing.get_context("fork")
    failures = context.Queue()
    readers = [context.Process(target=read_all, args=(cache, shards, number, failures)) for number in range(3)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
    assert [reader.exitcode for reader in readers] == [0, 0, 0] and failures.empty()
    assert len(copies(cache)) <= 2


@pytest.mark.processes
def test_no_shell_unless_asked_for_and_allowed(cache, tmp_path):
    command = Shard(f"pipe:cat {tmp_path}/x; touch {tmp_path}/ran", 3, 1)
    (tmp_path / "x").write_bytes(b"xyz")
    with pytest.raises(ValueError, match="would run a command in a shell; allow it with --allow-pipe"):
        cache.open(command)
    assert not (tmp_path / "ran").exists()
    allowed = ShardCache(cache.folder, 1000, allow_pipe=True)
    assert content(allowed, command) == b"xyz" and (tmp_path / "ran").exists()


@pytest.mark.parametrize("url", ["https://h/$(id)", "https://h/;touch ran", "s3://b/`touch ran`", "gs://b/|touch ran"])
def test_urls_are_never_part_of_a_command_line(cache, url, monkeypatch):
    monkeypatch.setattr(shard_cache.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a command was started"))
    with pytest.raises(ValueError, match="cannot be fetched: "):
        cache.open(Shard(url, 3, 1))


def test_unknown_kinds_and_shards_that_are_too_large(cache, files):
    with pytest.raises(ValueError, match="ftp: is not known; known are"):
        cache.open(Shard("ftp://host/a.tar", 1, 1))
    [index] = [index_of(files(1, 400)[0].path, 1001)]
    with pytest.raises(ValueError, match="has 1001 bytes, more than the 1000 .*--shard-cache-gb"):
        cache.check(index)


def index_of(path, num_bytes):
    from types import SimpleNamespace

    return SimpleNamespace(shards=[Shard(path, num_bytes, 1)])


def changed(text):
    """A shard's samples, all of the same size whatever the letter."""
    return {f"k{number}": {"json": question("<image>", text * 20), "jpg": PICTURE} for number in range(3)}


PICTURE = picture_bytes()


@pytest.fixture
def replaced(tmp_path, write_shard):
    """(the index of a remote shard, a cache that holds another shard of the same size as its copy)"""
    path = write_shard(changed("a"))
    name, num_bytes = f"disk://{path}", path.stat().st_size
    cache = ShardCache(tmp_path / "cache", 10**6)
    content(cache, Shard(name, num_bytes, 3))
    assert write_shard(changed("b")).stat().st_size == num_bytes
    index = index_tars([name], open_tar=cache_of(tmp_path / "other").open_once)
    write_index(index, tmp_path / "far.parquet")
    return read_index(tmp_path / "far.parquet"), cache


def cache_of(folder):
    return ShardCache(folder, 10**6)


def test_a_copy_of_what_a_shard_was_before_is_fetched_anew(replaced, caplog):
    index, cache = replaced
    files, others = SampleFiles(cache.open), SampleFiles(cache.open)
    others.read_member(index.shards[0], index.sample(0).text)  # a process that has the old copy open
    for row in range(3):
        assert b"bbb" in files.read(index.shards[0], index.sample(row))[0]
    [message] = caplog.messages
    assert index.shards[0].path in message and "'k0'" in message and "the copy is fetched anew" in message
    [copy] = cache.folder.glob("*.copy")
    before = copy.stat().st_ino
    assert b"bbb" in others.read(index.shards[0], index.sample(0))[0]
    assert copy.stat().st_ino == before, "what the first has fetched is good for the second"
    files.close(), others.close()


def test_a_shard_that_is_still_wrong_is_fetched_anew_once(replaced, write_shard, monkeypatch):
    index, cache = replaced
    write_shard(changed("c"))
    fetches, download = [], ShardCache._download
    monkeypatch.setattr(ShardCache, "_download", lambda *a: (fetches.append(1), download(*a)))
    files = SampleFiles(cache.open)
    for row in range(3):
        with pytest.raises(SampleFault, match="checksum .* fetched anew, and is no better") as caught:
            files.read(index.shards[0], index.sample(row))
        assert caught.value.fault is Fault.damaged_shard
    assert len(fetches) == 1
    files.close()


def test_counts_are_not_those_of_an_old_copy(replaced, tokenizer, preprocessor):
    index, cache = replaced
    counts = count_samples(index, tokenizer, preprocessor, 0, open_shard=cache.open)
    fresh = count_samples(
        replace(index, path=None), tokenizer, preprocessor, 0, open_shard=cache_of(cache.folder / "x").open
    )
    assert not counts.fault_I.any() and counts.tokens_I.tolist() == fresh.tokens_I.tolist()
    assert "b" * 3 in content(cache, index.shards[0]).decode(errors="replace")


# --- all of it -----------------------------------------------------------------------------------------


@pytest.mark.processes
@pytest.mark.parametrize("num_workers", [0, 2])
def test_remote_shards_give_the_same_packs(served, demo_dir, tmp_path, tokenizer, preprocessor, num_workers):
    folder, url, requests = served
    shards = find_shards(demo_dir / "shards")
    for shard in shards:
        shutil.copy(shard, folder)
    write_index(index_tars(find_shards(folder)), folder / "index.parquet")
    cache = ShardCache(tmp_path / "cache", 10_000_000)
    spec = DataSpec([demo_dir / "shards"], 256, 192, 1)
    local = open_reader(spec, tokenizer, preprocessor)
    remote = replace(spec, paths=[f"{url}/index.parquet"], num_workers=num_workers, cache=cache)
    far = open_reader(remote, tokenizer, preprocessor)
    try:
        assert far.fingerprint == local.fingerprint
        for first in (0, 4, 8):
            for one, other in zip(local.read(first, 4, 2), far.read(first, 4, 2), strict=True):
                same(one, other)
    finally:
        far.close()
    assert sorted(requests) == ["/index.parquet", *(f"/{shard.name}" for shard in shards)]  # each once


def test_remote_data_need_a_cache_and_an_index(served):
    _, url, _ = served
    with pytest.raises(ValueError, match="is remote, but there is no folder"):
        open_indexes(f"{url}/index.parquet")
    with pytest.raises(ValueError, match="opened through an index of them"):
        open_indexes(f"{url}/a.tar")


@pytest.mark.processes
def test_the_tool_indexes_remote_shards(served, demo_dir, tmp_path):
    folder, url, _ = served
    for number, shard in enumerate(find_shards(demo_dir / "shards")):
        shutil.copy(shard, folder / f"{number}.tar")
    output = tmp_path / "far.parquet"
    local = shutil.copy(folder / "1.tar", tmp_path / "here.tar")
    names = [f"{url}/{{0..1}}.tar", local, f"pipe:cat {folder}/0.tar"]
    command = [TOOL, "--shards", *names, "--output", output, "--num-workers", "2"]
    refused = run_here(*command)
    assert refused.returncode == 2 and "--allow-pipe" in refused.stderr and not output.exists()
    done = subprocess.run([sys.executable, *command, "--allow-pipe"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    index = read_index(output)
    names = [str(local), f"{url}/0.tar", f"{url}/1.tar", f"pipe:cat {folder}/0.tar"]
    assert [shard.path for shard in index.shards] == names
    assert len(index) == 24 + 96 + 24 + 96
    local_index = index_tars([local, folder / "0.tar", folder / "1.tar", folder / "0.tar"])
    assert index.checksum_I.tolist() == local_index.checksum_I.tolist()


def test_messages_name_the_url_and_not_its_copy(served, write_shard, tmp_path, caplog):
    folder, url, _ = served
    write_shard({"bad": {"json": b"{"}, "good": {"json": question("?")}}).rename(folder / "0.tar")
    assert run_here(TOOL, "--shards", f"{url}/0.tar", "--output", tmp_path / "far.parquet").returncode == 0
    assert f"{url}/0.tar: 'bad' cannot be used (invalid_json" in caplog.text
    assert read_index(tmp_path / "far.parquet").shards[0].path == f"{url}/0.tar"
    missing = run_here(TOOL, "--shards", f"{url}/1.tar", "--output", tmp_path / "far.parquet", "--overwrite")
    assert missing.returncode == 1 and f"{url}/1.tar cannot be fetched: the server answers 404" in missing.stderr
    unplaced = run_here(TOOL, "--shards", f"{url}/0.tar")
    assert "with --output" in unplaced.stderr
