"""Which of several ranks failed first, by what the ranks left and what torchrun's agent saw."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from laver_megatron.resilience.agent import StopRequest, _log_directory, run_agent
from laver_megatron.resilience.endings import (
    KILLED,
    MISTAKE,
    NO_REASON,
    OWN_REASON,
    PEER_LOST,
    TOLD_TO_STOP,
    Ending,
    Reason,
    explain,
    explain_error,
    first_ending,
    reasons_in,
)
from laver_megatron.runtime.exit_status import OF_ANOTHER_RANK
from tests.unit.resilience.test_watch import GLOO

VERDICT = Reason(1, 75, "rank 3 has given no heartbeat", 10.0)
DISK = Reason(2, 1, "OSError: no space left", 11.5)
LOST = Reason(0, 1, "RuntimeError: Connection closed by peer", 9.0, is_follow_up=True)


@pytest.mark.parametrize(
    "agent_status, exits, reasons, expected",
    [
        (0, [], [], Ending(0)),
        (1, [(0, 1), (1, -9), (2, 1)], [], Ending(1, 1, -9, "", KILLED)),
        (1, [(0, -15), (1, 1)], [], Ending(1, 1, 1, "", NO_REASON)),
        (1, [(0, -15)], [], Ending(1, 0, -15, "", TOLD_TO_STOP)),
        (1, [(0, 2), (1, -9)], [VERDICT], Ending(2, 0, 2, "", MISTAKE)),
        # What torchrun saw is that rank 0 had lost its peer.
        (1, [(0, 1), (1, 75)], [LOST, VERDICT], Ending(75, 1, 75, VERDICT.message, OWN_REASON)),
        (1, [(0, 1)], [LOST, DISK], Ending(1, 2, 1, DISK.message, OWN_REASON)),
        (1, [(0, 1), (3, -9)], [LOST], Ending(1, 3, -9, "", KILLED)),
        (1, [(0, 1), (3, -6)], [LOST, DISK], Ending(1, 2, 1, DISK.message, OWN_REASON)),
        (1, [(0, 1), (2, -15)], [DISK, VERDICT, LOST], Ending(75, 1, 75, VERDICT.message, OWN_REASON)),
        (1, [(0, 1)], [LOST], Ending(1, 0, 1, LOST.message, PEER_LOST)),
        (-9, [], [], Ending(1)),
        (-9, [], [DISK], Ending(1, 2, 1, DISK.message, OWN_REASON)),
        (130, [], [], Ending(130)),
    ],
)
def test_the_rank_that_failed_first(agent_status, exits, reasons, expected):
    assert first_ending(agent_status, exits, {reason.rank: reason for reason in reasons}) == expected


def test_in_words():
    assert str(Ending(1, 2, 1, "OSError: full")) == "rank 2 ended with exit status 1: OSError: full"
    assert str(Ending(75, 2, 75, "rank 1 stopped")) == "rank 2 ended with exit status 75, as rank 1 stopped"
    assert str(Ending(1, 2, -9)) == "rank 2 was killed by SIGKILL (out of memory?)"
    assert str(Ending(1, 2, -40)) == "rank 2 was killed by signal 40"
    assert str(Ending(1)) == "torchrun's agent failed"


@pytest.fixture
def of_rank_3(tmp_path, monkeypatch):
    """Where torchrun would have rank 3 leave its reason; what is found there."""
    file = tmp_path / "run" / "attempt_0" / "1" / "error.json"
    file.parent.mkdir(parents=True)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.setenv("RANK", "3")
    return file, lambda: reasons_in(tmp_path).get(3)


def test_the_first_reason_of_a_rank_stands(of_rank_3):
    file, found = of_rank_3
    explain("rank 1 hangs", 75)
    explain_error(RuntimeError(GLOO))
    assert (found().message, found().status, found().is_follow_up) == ("rank 1 hangs", 75, False)
    assert isinstance(json.loads(file.read_text())["timestamp"], int)  # or torchrun's agent would fail


@pytest.mark.parametrize(
    "error, status, is_follow_up",
    [
        (OSError(28, "full"), 1, False),
        (RuntimeError(GLOO), 1, True),
        (RuntimeError("[/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv"), 1, True),
        (SystemExit("rank 0: error"), 1, False),
        (SystemExit(2), 2, False),
    ],
)
def test_errors_say_whether_they_only_follow(of_rank_3, error, status, is_follow_up):
    explain_error(error)
    found = of_rank_3[1]()
    assert (found.status, found.is_follow_up) == (status, is_follow_up) and "GLHF" not in found.message


def test_an_error_that_all_raise_is_that_of_the_rank_it_came_from(of_rank_3):
    error = OSError("could not write: rank 1: full")
    error.add_note(OF_ANOTHER_RANK)
    explain_error(error)
    assert of_rank_3[1]().is_follow_up


def test_an_end_in_order_and_a_program_without_torchrun_leave_nothing(of_rank_3, monkeypatch):
    explain_error(SystemExit(0))
    for path in (os.devnull, "/nowhere/error.json"):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", path)
        explain("lost", 1)
    assert of_rank_3[1]() is None


def test_what_is_no_reason_of_ours_is_left_out(of_rank_3):
    file, found = of_rank_3
    ours = {"rank": 3, "status": 1, "message": "x", "time": 1.5, "is_follow_up": False}
    file.write_text(json.dumps(ours))
    assert found() == Reason(**ours)
    others = ({"rank": [3]}, {"status": 0}, {"status": "1"}, {"message": ["x"]}, {"time": "1"}, {"time": None})
    forged = [json.dumps(ours | other) for other in others]
    for text in ("", "[]", "[" * 60_000, '{"message": {"extraInfo": {}}}', '{"rank": 3, "status": 1}', *forged):
        file.write_text(text)
        assert found() is None


RANK = """
import os, signal, sys, time
from laver_megatron.resilience.endings import explain_error
rank = int(os.environ["RANK"])
mode = sys.argv[1]
if mode == "silent":
    ready = __file__ + ".ready"
    if rank == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the agent kills it, 30 s later
        open(ready, "w").close()
    else:
        while not os.path.exists(ready):
            time.sleep(0.05)
        sys.exit(3)
elif rank == 0:  # is seen first
    explain_error(RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1. Advice"))
    time.sleep(0.5)
    sys.exit(1)
elif mode == "error":
    explain_error(OSError(28, "No space left on device"))
else:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(600)
"""


@pytest.mark.parametrize(
    "mode, expected",
    [
        ("error", "rank 1 ended with exit status 1: OSError: [Errno 28] No space left on device"),
        ("kill", "rank 1 was killed by SIGKILL (out of memory?)"),
        pytest.param("silent", "rank 1 ended with exit status 3", marks=pytest.mark.faults),
    ],
)
def test_ranks_under_the_agent(tmp_path, monkeypatch, capfd, mode, expected):
    """Processes: rank 0 exits because its peer has gone, which is what torchrun sees first."""
    for name in list(os.environ):
        if name.startswith(("TORCHELASTIC_", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_")):
            monkeypatch.delenv(name)
    program = tmp_path / "rank.py"
    program.write_text(RANK)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        words = ["--standalone", "--nproc-per-node", "2", str(program), mode]
        ending = run_agent(words, 2, StopRequest())
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert str(ending) == expected and ending.status == max(ending.exit_code, 1)
    assert "elastic" not in capfd.readouterr().err, "torchrun's own log of it"


LAUNCHER = """
import time
from laver_megatron.resilience.agent import _log_directory
with _log_directory() as directory:
    print(directory, flush=True)
    time.sleep(600)
"""


def test_what_a_killed_launcher_has_left_is_removed(tmp_path, monkeypatch):
    """Not what another one uses."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    environ = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", LAUNCHER]
    both = [subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        killed, alive = (Path(process.stdout.readline().strip()) for process in both)
        both[0].kill()
        both[0].wait()
        with _log_directory() as ours:
            assert killed not in (alive, ours) and set(tmp_path.iterdir()) == {alive, ours}
        assert list(tmp_path.iterdir()) == [alive]
    finally:
        for process in both:
            process.kill()
            process.communicate()
