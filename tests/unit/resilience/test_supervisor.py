"""What the supervisor does with the ends of ranks that are not run."""

import json
import signal
from types import SimpleNamespace

import pytest

from laver_megatron.config.fields import Config
from laver_megatron.resilience import supervisor
from laver_megatron.resilience.agent import Ending, _ending
from laver_megatron.resilience.rendezvous import Alone
from laver_megatron.run_log.run_summary import read_run_records

KILLED = Ending(1, rank=3, exit_code=-signal.SIGKILL)


@pytest.fixture
def supervised(tmp_path, monkeypatch):
    """Runs ranks that end one way after another, each having come to an iteration; (exit status, message)."""
    request = SimpleNamespace(signal=0, at_once=False, waited=[])
    request.sleep = request.waited.append
    monkeypatch.setattr(supervisor, "StopRequest", lambda: request)
    waited = request.waited

    def run(*endings, iterations=None, asks=False, capsys=None, **settings):
        ends = iter(zip(endings, iterations or range(10, 1000, 10), strict=False))

        def run_ranks(given, plan):
            ending, iteration = next(ends)
            (tmp_path / "metrics.jsonl").write_text(json.dumps({"iteration": iteration}) + "\n")
            request.signal = signal.SIGTERM if asks else 0
            return ending

        needed = {"data_path": ("none",), "seq_length": 8, "visual_seq_length": 8, "train_iters": 9}
        config = Config.of(**{**needed, "run_dir": str(tmp_path), **settings})
        status = 0
        try:
            supervisor.supervise(run_ranks, config, Alone())
        except SystemExit as end:
            status = end.code
        assert next(ends, None) is None or status == 0 or len(endings) == 1, "ended too early"
        return status, waited

    return run


def test_an_orderly_end_is_the_end(supervised, tmp_path):
    assert supervised(Ending(0), restarts=2) == (0, [])
    assert not (tmp_path / "restarts.jsonl").exists()


def test_a_fault_is_followed_by_a_start_that_is_written_down(supervised, tmp_path, capsys):
    assert supervised(KILLED, Ending(0), iterations=[10, 20], restarts=2) == (0, [1.0])
    (line,) = [json.loads(line) for line in (tmp_path / "restarts.jsonl").read_text().splitlines()]
    assert line["cause"] == "rank 3 ended by SIGKILL (out of memory?)"
    assert (line["attempt"], line["iteration"], line["from_iteration"]) == (1, 11, 0)
    assert (line["rank"], line["exit_status"]) == (3, -9)
    assert read_run_records(tmp_path)[2] == [line]
    assert "starting again from iteration 0 in 1 s (restart 1 of 2)" in capsys.readouterr().err


def test_restarts_are_counted(supervised, capsys):
    assert supervised(KILLED, KILLED, KILLED, restarts=2) == (1, [1.0, 1.0])
    assert "the run is over after 2 restarts (--restarts)" in capsys.readouterr().err
    status, waited = supervised(KILLED)
    assert status == 1 and capsys.readouterr().err == "rank 3 ended by SIGKILL (out of memory?): the run is over\n"


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


@pytest.mark.parametrize(
    "agent_status, failures, expected",
    [
        (0, [], Ending(0)),
        (1, [(0, 1, ""), (1, -9, ""), (2, 1, "")], Ending(1, 1, -9)),
        (1, [(0, -15, ""), (1, 1, "")], Ending(1, 1, 1)),
        (1, [(0, 1, ""), (1, 75, "it was lost")], Ending(75, 1, 75, "it was lost")),
        (1, [(0, 2, ""), (1, -9, "")], Ending(2, 0, 2)),
        (-9, [], Ending(1)),
        (130, [], Ending(130)),
    ],
)
def test_the_rank_that_says_most(agent_status, failures, expected):
    assert _ending(agent_status, failures) == expected
