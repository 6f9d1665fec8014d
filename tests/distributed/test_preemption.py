"""Stopping, killing and starting again real runs of two processes: nothing is left behind, nothing is lost."""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from socketserver import BaseRequestHandler, TCPServer
from threading import Thread

import pytest

from laver_megatron.checkpoint.choice import next_choice
from laver_megatron.resilience.signals import CTRL_C
from laver_megatron.resilience.status import read_status
from tests.faults.chaos import differences
from tests.runs import RealRun

pytestmark = pytest.mark.processes
NUM_STEPS = 8
FAULTY_RUN = Path(__file__).with_name("faulty_run.py")


@pytest.fixture
def runs():
    """Ends what a test leaves."""
    started: list[RealRun] = []
    yield started
    for run in started:
        run.end()


@pytest.fixture(scope="module")
def undisturbed(demo_dir, tmp_path_factory):
    run = RealRun.launch(demo_dir, tmp_path_factory.mktemp("undisturbed") / "run", train_iters=NUM_STEPS)
    assert run.wait() == 0, run.log
    return run


@pytest.mark.faults  # by SIGTERM to the launcher: tests/faults/test_chaos.py
@pytest.mark.parametrize("to", ["launcher", "rank"])
def test_stopped_it_gives_the_same_numbers(demo_dir, tmp_path, undisturbed, runs, to):
    """One more step at most, a save, status 0; then it goes on."""
    run_dir = tmp_path / "run"
    runs.append(first := RealRun.launch(demo_dir, run_dir, train_iters=NUM_STEPS))
    first.wait_for_iteration(2)
    target = first.ranks()[1].pid if to == "rank" else first.process.pid
    os.kill(target, signal.SIGUSR2)
    assert first.wait() == 0, first.log
    assert first.wait_until_all_are_gone(5) == []
    marker = json.loads((run_dir / "PREEMPTED").read_text())
    assert marker["reason"] == "as SIGUSR2 asks" and 2 <= marker["iteration"] < NUM_STEPS
    assert len(first.records()) == marker["iteration"]

    runs.append(second := RealRun.launch(demo_dir, run_dir, train_iters=NUM_STEPS))
    assert second.wait() == 0, second.log
    assert (run_dir / "DONE").exists() and not (run_dir / "PREEMPTED").exists()
    assert second.exact_records() == undisturbed.exact_records()


@pytest.mark.faults
def test_a_killed_rank_is_started_again(demo_dir, tmp_path, undisturbed, runs):
    run_dir = tmp_path / "run"
    runs.append(run := RealRun.launch(demo_dir, run_dir, train_iters=NUM_STEPS, restarts=2, save_interval=2))
    run.wait_for_iteration(3)
    run.ranks()[1].kill()
    assert run.wait() == 0, run.log
    assert run.wait_until_all_are_gone(5) == []
    assert run.exact_records() == undisturbed.exact_records()
    (restart,) = json.loads((run_dir / "run_summary.json").read_text())["restarts"]
    assert restart["cause"] == "rank 1 was killed by SIGKILL (out of memory?)" and restart["from_iteration"] >= 2


ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs the kernel to tell the ranks")


def assert_ranks_saved(run):
    """None outlives what started them, and they have saved first."""
    run.wait()
    assert run.wait_until_all_are_gone(90) == []
    assert json.loads((run.run_dir / "PREEMPTED").read_text())["reason"] == "as SIGTERM asks"


@ON_LINUX
def test_a_second_run_is_refused_and_the_ranks_of_a_killed_launcher_stop(demo_dir, tmp_path, runs):
    """The second ends with status 2, naming the first, which goes on; no restart."""
    run_dir = tmp_path / "run"
    runs.append(first := RealRun.launch(demo_dir, run_dir, train_iters=5000))
    first.wait_for_iteration(1)
    first.wait_for_file("faults/rank_0001_*.txt")
    before = sorted(run_dir.rglob("[!.]*"))
    runs.append(second := RealRun.launch(demo_dir, run_dir, train_iters=5000, restarts=3))
    assert second.wait() == 2, second.log
    assert f"another run is using {run_dir}: process {first.ranks()[0].pid} on" in second.log
    assert sorted(run_dir.rglob("[!.]*")) == before
    assert read_status(run_dir)["state"] == "running"
    first.wait_for_iteration(first.records()[-1]["iteration"] + 1)

    first.process.kill()
    assert_ranks_saved(first)


@ON_LINUX
@pytest.mark.faults
@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2", "SIGTERM"])
def test_the_ranks_of_a_torchrun_that_ends_stop(demo_dir, tmp_path, runs, name):
    runs.append(run := RealRun.torchrun(demo_dir, tmp_path / "run", train_iters=5000))
    run.wait_for_iteration(2)
    os.kill(run.process.pid, getattr(signal, name))
    assert_ranks_saved(run)


@pytest.mark.faults
@pytest.mark.parametrize("limit", ["duration", "SLURM"])
def test_all_ranks_stop_when_the_time_is_up(demo_dir, tmp_path, runs, limit):
    """Two stages of two replicas, at one iteration somewhere in the run, after a checkpoint of it."""
    end = int(time.time()) + 180
    environment = {"NPROC_PER_NODE": "4", **({"SLURM_JOB_END_TIME": str(end)} if limit == "SLURM" else {})}
    settings = {"pipeline_model_parallel_size": 2, "train_iters": 5000}
    settings |= {"exit_duration_minutes": 1} if limit == "duration" else {}
    runs.append(run := RealRun.launch(demo_dir, tmp_path / "run", environment=environment, **settings))
    assert run.wait() == 0, run.log
    print(f"\n{limit}: ended {end - time.time():.1f} s before the end of the job")
    assert run.wait_until_all_are_gone(5) == []
    marker = json.loads((run.run_dir / "PREEMPTED").read_text())
    assert marker["reason"] == {"duration": "after --exit-duration-minutes 1"}.get(limit, "before SLURM's time limit")
    assert [record["iteration"] for record in run.records()] == list(range(1, marker["iteration"] + 1))
    assert next_choice(run.run_dir).checkpoint.name == f"iter_{marker['iteration']:07d}"


@pytest.mark.faults
def test_a_rank_is_killed_while_a_checkpoint_is_written(demo_dir, tmp_path, undisturbed, runs):
    """Training has gone on; the checkpoint before stands, and the next start gives the same bits."""
    run_dir, settings = tmp_path / "run", {"train_iters": NUM_STEPS, "save_interval": 2}
    runs.append(first := RealRun.torchrun(demo_dir, run_dir, program=(FAULTY_RUN, "save", 1), **settings))
    first.wait_for_iteration(5)
    names = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert names == {"iter_0000002", "latest", ".iter_0000004.incomplete"}
    first.ranks()[1].kill()
    assert first.wait() != 0 and first.wait_until_all_are_gone(5) == []
    choice = next_choice(run_dir)
    assert choice.checkpoint.name == "iter_0000002" and not choice.passed_over

    runs.append(second := RealRun.launch(demo_dir, run_dir, **settings))
    assert second.wait() == 0, second.log
    assert second.exact_records() == undisturbed.exact_records()
    assert differences(undisturbed.run_dir, run_dir) == []
    assert not list((run_dir / "checkpoints").glob(".iter_*"))


@pytest.mark.faults
def test_the_second_ctrl_c_ends_at_once(demo_dir, tmp_path, runs):
    """A step takes a quarter of a second, a save several: no checkpoint is written in between."""
    runs.append(run := RealRun.launch(demo_dir, tmp_path / "run", train_iters=5000))
    run.wait_for_iteration(1)
    os.kill(run.process.pid, signal.SIGINT)
    run.wait_for_line(CTRL_C)  # two at once would be one
    os.kill(run.process.pid, signal.SIGINT)
    assert run.wait() == 130, run.log
    assert run.wait_until_all_are_gone(10) == []
    assert run.log.count(CTRL_C) == 1
    assert run.log.endswith("run has no checkpoint yet: the same command starts over\n")


@pytest.mark.slow("starts two agents twice; `make test` has one agent")
def test_two_nodes_start_again_together(demo_dir, tmp_path, undisturbed, runs):
    """Each with a launcher of its own: a rank of the second is killed, both start again and meet."""
    run_dir = tmp_path / "run"
    nodes = {"NNODES": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_ports()), "NPROC_PER_NODE": "1"}
    for node in range(2):
        environment = {**nodes, "NODE_RANK": str(node)}
        settings = {"train_iters": NUM_STEPS, "restarts": 2, "save_interval": 2}
        runs.append(RealRun.launch(demo_dir, run_dir, environment=environment, **settings))
    for run in runs:
        run.wait_for_iteration(3)
    runs[1].ranks()[0].kill()
    assert [run.wait() for run in runs] == [0, 0], runs[0].log + runs[1].log
    assert runs[0].exact_records() == undisturbed.exact_records()
    assert len((run_dir / "restarts.jsonl").read_text().splitlines()) == 1


class Stranger(BaseRequestHandler):
    def handle(self) -> None:
        self.request.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")


@pytest.mark.faults
def test_another_program_has_the_port_where_nodes_meet(demo_dir, tmp_path, runs):
    """The second node's launcher says so and ends."""
    with TCPServer(("localhost", 0), Stranger) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        nodes = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port + 1)}
        nodes |= {"NPROC_PER_NODE": "1"}
        runs.append(run := RealRun.launch(demo_dir, tmp_path / "run", environment=nodes, restarts=2))
        assert run.wait() == 2, run.log
        server.shutdown()
    assert run.log.splitlines()[-1].startswith(f"localhost port {port}, one below MASTER_PORT"), run.log
    assert "Traceback" not in run.log and "which answers 'SSH-2.0-OpenSSH_9.6'" in run.log


def free_ports() -> int:
    """A port that is free, and probably the next ones."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return min(listener.getsockname()[1], 60000)
