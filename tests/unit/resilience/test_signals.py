"""Signals that ask a rank to stop, on processes that train nothing."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from laver_megatron.resilience import signals
from tests.attacks import cut, write_checkpoint

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.processes


def rank(body: str, run_dir: Path, **environment: str) -> subprocess.CompletedProcess:
    """A process that heeds signals and then does `body`."""
    program = (
        "import os, signal, sys, time\nfrom laver_megatron.resilience import signals\n"
        f"signals.heed_signals({str(run_dir)!r})\nme = os.getpid()\n"
        "def note(*numbers):\n for n in numbers: os.kill(me, n); time.sleep(0.3)\n"
        f"{body}\n"
    )
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("LAVER_", "TORCHELASTIC_"))}
    environ |= {"PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_a_signal_is_noted_and_nothing_else_happens(tmp_path, name):
    done = rank(f"note(*[signal.{name}] * 3); print(signals.asked())", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{getattr(signal, name):d}\n", "")


def test_the_first_counts(tmp_path):
    done = rank("note(signal.SIGUSR2, signal.SIGTERM); print(signals.asked())", tmp_path)
    assert done.stdout == f"{signal.SIGUSR2:d}\n"


@pytest.mark.parametrize("says_it", [True, False])
def test_ctrl_c_says_what_happens_and_the_second_ends_at_once(tmp_path, says_it):
    """Where a launcher speaks, the ranks do not."""
    environment = {} if says_it else {"LAVER_LAUNCHED": "1"}
    once = rank("note(signal.SIGINT); print(signals.asked())", tmp_path, **environment)
    assert (once.returncode, once.stdout) == (0, f"{signal.SIGINT:d}\n")
    twice = rank("note(signal.SIGINT, signal.SIGINT); print('not reached')", tmp_path, **environment)
    assert (twice.returncode, twice.stdout) == (130, "")
    kept = f"interrupted; {tmp_path} has no checkpoint yet: the same command starts over\n"
    assert once.stderr == (f"{signals.CTRL_C}\n" if says_it else "")
    assert twice.stderr == (f"{signals.CTRL_C}\n{kept}" if says_it else "")


def test_what_is_forked_from_a_rank_finishes_its_work(tmp_path):
    body = (
        "child = os.fork()\nif child == 0: os.kill(os.getpid(), signal.SIGTERM); os._exit(7)\n"
        "time.sleep(0.3); print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), signals.asked())"
    )
    assert rank(body, tmp_path).stdout == "7 0\n"


def test_a_rank_that_waits_in_a_library_hears_the_second_ctrl_c(tmp_path):
    """As in a collective of a rank that is gone, no line of Python ends there."""
    body = (
        "import ctypes, threading\nthreading.Thread(target=note, args=(signal.SIGINT, signal.SIGINT)).start()\n"
        "for _ in range(9): ctypes.CDLL(None).sleep(100)"
    )
    assert rank(body, tmp_path).returncode == 130


def test_after_the_run_nothing_is_stopped(tmp_path):
    body = "signals.ignore_signals()\nnote(*signals.STOP_SIGNALS)\nprint(signals.asked())"
    assert rank(body, tmp_path).stdout == "0\n"


AGENT = """
import os, signal, subprocess, sys, time
def rank(body):
    words = [sys.executable, "-c", "import os, signal, time; from laver_megatron.resilience import signals; "
             "signals.heed_signals('nowhere'); print('ready', flush=True); " + body]
    made = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    made.stdout.readline()
    return made
"""


def agent(body: str) -> subprocess.CompletedProcess:
    """A process in the place of torchrun's agent."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("LAVER_")}
    environ |= {"PYTHONPATH": str(ROOT), "TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, "-c", AGENT + body]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=100)


def test_sigterm_after_a_fault_ends_the_ranks_that_are_left(tmp_path):
    """A rank that waits for one that is gone would never see the end of its step."""
    waits = "time.sleep(60)"
    done = agent(
        f"first, second = rank({waits!r}), rank({waits!r})\nfirst.send_signal(signal.SIGTERM)\n"
        "time.sleep(1); print(first.poll())\nsecond.kill(); second.wait()\n"
        "first.send_signal(signal.SIGTERM); print(first.wait(30))"
    )
    assert done.stdout == "None\n1\n", done.stderr


# The agent ends while its children are counted.
COUNTS = """import psutil; agent = os.getppid()
def children(process):
    print("counting", flush=True)
    while os.getppid() == agent:
        time.sleep(0.01)
    return []
psutil.Process.children = children; print("waiting", flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux tells a process that its parent has ended")
@pytest.mark.parametrize("counts", ["", COUNTS])
def test_the_end_of_the_agent_asks_for_a_stop(tmp_path, counts):
    file = tmp_path / "asked"
    waits = f"[time.sleep(0.1) for _ in range(300) if not signals.asked()]; open({str(file)!r}, 'w').write('stopped')"
    waits_until = (
        "assert made.stdout.readline() == 'waiting\\n'; made.send_signal(signal.SIGTERM); made.stdout.readline()"
    )
    agent(f"made = rank({counts + waits!r}); {waits_until if counts else ''}\nos.kill(os.getpid(), signal.SIGKILL)")
    for _ in range(300):
        if file.exists() and file.read_text() == "stopped":
            return
        signal.sigtimedwait([], 0.1)
    pytest.fail("the rank was not told")


def test_torchrun_by_hand_is_warned_of(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", signals.LAUNCHED, signals.TORCHRUN_PATIENCE):
        monkeypatch.delenv(name, raising=False)
    assert signals.torchrun_warning() == ""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in signals.torchrun_warning()
    monkeypatch.setenv(signals.TORCHRUN_PATIENCE, "600")
    assert signals.torchrun_warning() == ""


def test_an_interruption_says_what_is_kept(tmp_path):
    assert signals.interruption_message(str(tmp_path)).endswith("has no checkpoint yet: the same command starts over")
    checkpoint, newest = (write_checkpoint(tmp_path / "checkpoints", iteration) for iteration in (30, 60))
    assert f"{newest} is kept" in signals.interruption_message(str(tmp_path))
    cut(newest / "__0_0.distcp")
    kept = f"interrupted; {checkpoint} is kept: the same command resumes from it ({newest}/__0_0.distcp has "
    assert signals.interruption_message(str(tmp_path)).startswith(kept)
    cut(checkpoint / "__0_0.distcp")
    assert "has no checkpoint that is whole (" in signals.interruption_message(str(tmp_path))
