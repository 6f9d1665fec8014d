"""Against a server of this machine that does what servers do."""

import contextlib
import http.server
import sys
import threading
import time

import fsspec
import psutil
import pytest
from fsspec.implementations.http import HTTPFileSystem

from laver_megatron.data.index.shard_index import Shard
from laver_megatron.data.read import fetching, shard_cache
from laver_megatron.data.read.fetching import RefusedError, fetch_into
from laver_megatron.data.read.shard_cache import ShardCache

CONTENT = bytes(range(256)) * 400


class Server(http.server.BaseHTTPRequestHandler):
    """/whole; /500, /404, ...: that status; /flaky: 503 twice, then whole; /short: half of it, as if that were all;
    /cut: breaks off in the middle; /stall: half of it, and then nothing; /silent: not even a header; /trickle: a byte
    now and then; /moved: to /whole."""

    def do_GET(self):  # noqa: N802
        name = self.path.strip("/")
        self.server.asked.append(name)
        name = name.partition("?")[0]
        if name == "flaky" and self.server.asked.count("flaky") < 3:
            name = "503"
        if name == "silent":
            self.server.over.wait(30)
        elif name.isdigit():
            self.send_error(int(name))
        elif name == "moved":
            self.send_response(302)
            self.send_header("Location", "/whole")
            self.end_headers()
        else:
            self.send_content(name)

    def send_content(self, name):
        half = CONTENT[: len(CONTENT) // 2]
        self.send_response(200)
        self.send_header("Content-Length", str(len(half if name == "short" else CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT if name in ("whole", "flaky") else b"" if name == "trickle" else half)
        if name == "stall":
            self.server.over.wait(30)
        while name == "trickle" and not self.server.over.wait(0.05):
            self.wfile.write(b"x")
            self.wfile.flush()

    def handle(self):
        with contextlib.suppress(OSError):  # whoever asked has given up
            super().handle()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.asked, server.over = [], threading.Event()
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.over.set()
        server.shutdown()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_cache.time, "sleep", lambda seconds: None)
    return ShardCache(tmp_path / "cache", 10**6, allow_pipe=True)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(fetching, "_PATIENCE_SECONDS", 1)
    monkeypatch.setattr(fetching, "_MIN_BYTES", 10_000)


@pytest.fixture
def fetched(tmp_path):
    """fetched(url, num_bytes=None) -> what came"""

    def fetch(url, num_bytes=None):
        (tmp_path / "target").write_bytes(b"of an earlier attempt" * 10_000)
        num_arrived = fetch_into(url, tmp_path / "target", num_bytes)
        content = (tmp_path / "target").read_bytes()
        assert num_arrived >= len(content) and (num_bytes is None) <= (num_arrived == len(content))
        return content

    return fetch


def children():
    return [child for child in psutil.Process().children(recursive=True) if child.name() in ("curl", "sleep", "sh")]


@pytest.mark.parametrize("name", ["whole", "moved"])
def test_what_is_there(server, fetched, tmp_path, name):
    assert fetched(f"{server.url}/{name}") == CONTENT
    assert fetch_into(f"{server.url}/{name}", tmp_path / "x", 1000) > 1000
    assert fetch_into(f"{server.url}/{name}", tmp_path / "x", len(CONTENT)) == len(CONTENT)


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_refusal_is_final(server, cache, fetched, status):
    url = f"{server.url}/{status}"
    with pytest.raises(RefusedError, match=f"the server answers {status}"):
        fetched(url)
    with pytest.raises(ValueError, match=f"{url} cannot be fetched: the server answers {status}; look at the URL"):
        cache.open(Shard(url, 10, 1))
    assert server.asked == [str(status)] * 2


@pytest.mark.parametrize("url, package", [("s3://b/a", "s3fs"), ("gs://b/a", "gcsfs")])
def test_a_missing_package_is_told_at_once(cache, url, package, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, package, None)  # so that importing it fails
    extra = url.partition(":")[0]
    with pytest.raises(ValueError, match=rf"{url} cannot be fetched: .*{package}.*laver_megatron\[{extra}\]"):
        cache.open(Shard(url, 10, 1))
    assert not caplog.messages


def test_signed_urls_reach_the_server_as_they_are(server, fetched):
    name = "whole?signature=a%2Fb%2B%7E&list=%28x%29"
    server.url = f"{server.url}/{name}"
    assert fetched(server.url) == CONTENT
    assert server.asked == [name]


class Denying(HTTPFileSystem):
    async def _get_file(self, *_, **__):
        raise PermissionError("Access Denied")


def test_a_store_that_denies_access_is_final(cache, monkeypatch):
    """Stores raise Python's own errors, without a file's name."""
    fsspec.register_implementation("denying", Denying)
    monkeypatch.setitem(fetching.SCHEMES, "denying", lambda url: {})
    with pytest.raises(ValueError, match="the server answers 403; look at the URL"):
        cache.open(Shard("denying://b/a", 10, 1))


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_what_may_pass_is_asked_for_again_a_few_times(server, cache, status, caplog):
    url = f"{server.url}/{status}"
    with pytest.raises(ValueError, match=rf"{url} cannot be fetched: .*{status} \(tried 8 times\); look at the server"):
        cache.open(Shard(url, 10, 1))
    assert len(server.asked) == 8
    assert len(caplog.messages) == 7 and f"{url} cannot be fetched" in caplog.messages[0]
    assert caplog.messages[1].endswith("once more in 3 s (2 of 8)")


def test_an_outage_is_waited_for(server, cache):
    assert cache.fetch(f"{server.url}/flaky", len(CONTENT)).read_bytes() == CONTENT
    assert server.asked == ["flaky"] * 3


def test_bodies_that_are_not_whole(server, cache, fetched):
    with pytest.raises(OSError, match="transfer closed with .* bytes remaining"):
        fetched(f"{server.url}/cut")
    assert len(fetched(f"{server.url}/short")) == len(CONTENT) // 2
    for name in ("cut", "short"):
        with pytest.raises(ValueError, match=rf"{name} cannot be fetched: .* \(tried 8 times\)"):
            cache.open(Shard(f"{server.url}/{name}", len(CONTENT), 1))
    assert not list(cache.folder.glob("*.part")) and not list(cache.folder.glob("*.copy"))


@pytest.mark.parametrize("name", ["stall", "silent", "trickle"])
def test_a_server_that_stalls_is_given_up(server, impatient, fetched, name):
    started = time.monotonic()
    with pytest.raises(OSError, match="it stalls"):
        fetched(f"{server.url}/{name}", len(CONTENT))
    assert time.monotonic() - started < 6 and not children()


@pytest.mark.processes
@pytest.mark.parametrize("command", ["printf abc; sleep 60; true", "exec >&-; sleep 60; true"])
def test_a_command_that_stalls_is_ended_with_all_it_started(impatient, fetched, command):
    started = time.monotonic()
    with pytest.raises(OSError, match="it stalls: 3 bytes in 1 s|does not end within 1 s"):
        fetched(f"pipe:{command}")
    assert time.monotonic() - started < 6 and not children()


@pytest.mark.processes
def test_a_slow_command_is_waited_for_as_long_as_enough_comes(impatient, fetched, monkeypatch):
    """It takes longer than a silence may, and is never silent for nearly so long."""
    monkeypatch.setattr(fetching, "_MIN_BYTES", 1)
    monkeypatch.setattr(fetching, "_PATIENCE_SECONDS", 4)
    assert fetched("pipe:for i in 1 2 3 4 5 6 7 8 9; do sleep 0.5; printf x; done") == b"x" * 9


@pytest.mark.processes
def test_a_command_that_fails(cache):
    with pytest.raises(ValueError, match="cannot be fetched: its command failed with exit code 3"):
        cache.open(Shard("pipe:printf abc; exit 3", 3, 1))
