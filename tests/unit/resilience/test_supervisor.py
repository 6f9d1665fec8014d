"""What the supervisor does with the ends of ranks that are not run."""

import json
import signal
import time
from types import SimpleNamespace

import pytest

from laver_megatron.config.fields import Config
from laver_megatron.resilience import status, supervisor
from laver_megatron.resilience.endings import PEER_LOST, Ending
from laver_megatron.resilience.rendezvous import Alone, Plan
from laver_megatron.run_log.run_summary import read_run_records
from tests.attacks import cut, write_checkpoint
from tests.unit.resilience.test_status import STATUS

KILLED = Ending(1, rank=3, exit_code=-signal.SIGKILL)


@pytest.fixture
def supervised(tmp_path, monkeypatch):
    """Runs ranks that end one way after another, each having come to an iteration; (exit status, message)."""
    request = SimpleNamespace(signal=0, at_once=False, waited=[])
    request.sleep = request.waited.append
    monkeypatch.setattr(supervisor, "StopRequest", lambda: request)
    waited = request.waited

    def run(*endings, iterations=None, asks=False, plan=None, **settings):
        ends = iter(zip(endings, iterations or range(10, 1000, 10), strict=False))

        def run_ranks(given, plan):
            ending, iteration = next(ends)
            (tmp_path / "metrics.jsonl").write_text(json.dumps({"iteration": iteration}) + "\n")
            request.signal = signal.SIGTERM if asks else 0
            return ending

        needed = {"data_path": ("none",), "seq_length": 8, "visual_seq_length": 8, "train_iters": 9}
        config = Config.of(**{**needed, "run_dir": str(tmp_path), **settings})
        ended = 0
        try:
            rendezvous = Alone()
            if plan is not None:
                monkeypatch.setattr(rendezvous, "_agree", lambda *arguments: plan)
            supervisor.supervise(run_ranks, config, rendezvous)
        except SystemExit as end:
            ended = end.code
        assert next(ends, None) is None or ended == 0 or len(endings) == 1, "ended too early"
        return ended, waited

    return run


def test_an_orderly_end_is_the_end(supervised, tmp_path):
    assert supervised(Ending(0), restarts=2) == (0, [])
    assert not (tmp_path / "restarts.jsonl").exists()


def test_a_fault_is_followed_by_a_start_that_is_written_down(supervised, tmp_path, capsys):
    assert supervised(KILLED, Ending(0), iterations=[10, 20], restarts=2) == (0, [1.0])
    (line,) = [json.loads(line) for line in (tmp_path / "restarts.jsonl").read_text().splitlines()]
    assert line["cause"] == "rank 3 was killed by SIGKILL (out of memory?)"
    assert (line["attempt"], line["iteration"], line["from_iteration"]) == (1, 11, 0)
    assert (line["rank"], line["exit_status"]) == (3, -9)
    assert read_run_records(tmp_path)[2] == [line]
    assert "starting again from iteration 0 in 1 s (restart 1 of 2)" in capsys.readouterr().err


def test_the_checkpoint_that_will_be_used_is_named(supervised, tmp_path, capsys):
    """Not a newer one that is damaged; nor any, where none is whole."""
    older, newest = (write_checkpoint(tmp_path / "checkpoints", iteration) for iteration in (5, 10))
    supervised(KILLED, Ending(0), restarts=1)
    assert "starting again from iteration 10 in 1 s" in capsys.readouterr().err
    cut(newest / "__0_0.distcp")
    supervised(KILLED, Ending(0), restarts=1)
    said = capsys.readouterr().err
    assert "starting again from iteration 5 in 1 s" in said
    assert f"WARNING: going back to {older}: {newest}/__0_0.distcp has" in said
    assert read_run_records(tmp_path)[2][-1]["from_iteration"] == 5
    supervised(KILLED, Ending(0), restarts=1, strict_load=True)
    assert "WARNING: cannot start" in (said := capsys.readouterr().err) and "--strict-load goes on from" in said


def test_a_full_disk_does_not_end_the_supervisor(supervised, tmp_path, capsys):
    """The restart is written down when there is room."""
    restarts = tmp_path / "restarts.jsonl"
    restarts.symlink_to("/dev/full")
    assert supervised(KILLED, Ending(0), restarts=1) == (0, [1.0])
    assert f"WARNING: {restarts}: No space left on device" in capsys.readouterr().err
    restarts.unlink()
    restarts.mkdir()

    def is_freed():
        yield 10
        restarts.rmdir()
        yield 20

    supervised(KILLED, Ending(0), iterations=is_freed(), restarts=1)
    assert [json.loads(line)["iteration"] for line in restarts.read_text().splitlines()] == [11]


def test_a_terminal_obeys_no_reason(supervised, capsys):
    """A file's name, say, stands in the words of an error."""
    supervised(*2 * [Ending(1, 0, 1, "\x1b[2Jgone\n")], restarts=1)
    said = capsys.readouterr().err
    assert said.count(r"\x1b[2Jgone\n") == 2 and "\x1b" not in said


def test_restarts_are_counted(supervised, capsys):
    assert supervised(KILLED, KILLED, KILLED, restarts=2) == (1, [1.0, 1.0])
    assert "the run is over after 2 restarts (--restarts)" in capsys.readouterr().err
    status, waited = supervised(KILLED)
    assert status == 1 and capsys.readouterr().err == "rank 3 was killed by SIGKILL (out of memory?): the run is over\n"


def test_it_waits_longer_without_progress_and_gives_up(supervised, capsys):
    faults = [KILLED] * 4
    status, waited = supervised(*faults, iterations=[4, 7, 7, 7], restarts=9)
    assert (status, waited) == (1, [1.0, 1.0, 2.0])
    assert "after 3 faults in a row at iteration 8" in capsys.readouterr().err
    waited.clear()
    assert supervised(KILLED, KILLED, iterations=[7, 7], restarts=9, restart_same_step_limit=2) == (1, [1.0])


@pytest.mark.parametrize("status", [2, 130])
def test_mistakes_and_interruptions_are_not_repeated(supervised, status):
    assert supervised(Ending(status, 0, status), restarts=9) == (status, [])


def test_who_asks_for_a_stop_gets_no_restart(supervised):
    assert supervised(KILLED, asks=True, restarts=9) == (130, [])


def test_the_status_gets_the_cause(supervised, tmp_path):
    """Whatever rank wrote first, as long as it was started by this launcher."""
    times = dict.fromkeys(("updated", "born", "phase_since"), time.time())
    message = "rank 0 on host: RuntimeError: Connection closed by peer"
    for started, expected in ((time.time() + 5, "rank 3 was killed by SIGKILL (out of memory?)"), (9.0, message)):
        content = {**STATUS, **times, "started": started, "host": "here", "pid": 1, "message": message}
        status.write_status(tmp_path, {**content, "state": "failed"})
        assert supervised(KILLED)[0] == 1
        assert status.read_status(tmp_path)["message"] == expected


@pytest.mark.parametrize("rank, state", [(0, "running"), (1, "failed")])
def test_a_mistake_of_one_rank_is_in_the_status(supervised, tmp_path, rank, state):
    """Rank 0's may be that another run has the directory, whose status this is."""
    times = dict.fromkeys(("updated", "born", "phase_since", "started"), time.time() + 5)
    status.write_status(tmp_path, {**STATUS, **times, "host": "here", "pid": 1, "state": "running"})
    assert supervised(Ending(2, rank, 2))[0] == 2
    assert status.read_status(tmp_path)["state"] == state


def test_of_several_nodes_the_one_that_failed_first_is_recorded(supervised, tmp_path):
    said = {"away": "rank 9 was killed by SIGBUS"}
    lost_peer = Ending(1, 0, 1, "Connection closed by peer", PEER_LOST)
    assert supervised(lost_peer, Ending(0), restarts=1, plan=Plan(1, (0, 1), said, "away")) == (0, [1.0])
    (line,) = read_run_records(tmp_path)[2]
    assert (line["cause"], line["host"], line["rank"]) == ("rank 9 was killed by SIGBUS", "away", None)
