"""Runs of real processes that stand still, and what the watchdog says of them; the status that a run leaves."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from laver_megatron.resilience.status_report import run_report
from laver_megatron.runtime.exit_status import FAILED, HUNG
from tests.programs import ROOT, python_path

FAULTY_RUN = Path(__file__).with_name("faulty_run.py")
SECONDS = 200
ONE_EACH = ["--tensor-model-parallel-size", 1, "--pipeline-model-parallel-size", 1, "--no-sequence-parallel"]


class Run:
    """The demo on some processes under torchrun; its output in a file."""

    def __init__(self, demo_dir, directory):
        self.demo_dir, self.dir, self.log_file = demo_dir, directory / "run", directory / "log"
        self.process = None

    def start(self, num_ranks, fault="none", rank=0, *flags, minutes=None):
        """minutes: the limits for a step and its data; more ranks than cores need more time."""
        minutes = minutes or (0.1 if num_ranks < 4 else 0.3)
        data = self.demo_dir / "shards"
        arguments = [
            "--config", ROOT / "examples" / "demo.yaml", "--load", f"hf:{self.demo_dir}/model",
            "--encoder", self.demo_dir / "encoder", "--data-path", data / "train-*.tar",
            "--valid-data-path", data / "valid-*.tar", "--eval-interval", 1000, "--run-dir", self.dir,
            "--num-workers", 0, "--step-timeout-minutes", minutes, "--data-timeout-minutes", minutes,
        ]  # fmt: skip
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", num_ranks, FAULTY_RUN]
        command = [sys.executable, *torchrun, fault, rank, *arguments, *flags]
        foreign = ("SLURM_", "TORCHELASTIC_", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LAVER_")
        environ = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen(
                [str(word) for word in command], env={**environ, "PYTHONPATH": python_path()}, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    @property
    def log(self):
        return self.log_file.read_text()

    @property
    def status(self):
        return json.loads((self.dir / "status.json").read_text())

    def wait(self):
        """The exit statuses that torchrun names of its ranks, or 0."""
        code = self.process.wait(SECONDS)
        found = {int(it) for it in re.findall(r"exitcode\s*: (-?\d+)", self.log)}
        return found if code else 0

    def reach(self, iteration):
        """Waits until that many iterations are done."""
        metrics, end = self.dir / "metrics.jsonl", time.monotonic() + SECONDS
        while not metrics.exists() or len(metrics.read_text().splitlines()) < iteration:
            assert time.monotonic() < end and self.process.poll() is None, self.log[-3000:]
            time.sleep(0.1)

    def pids(self):
        """{rank: process}."""
        children = subprocess.run(
            ["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=True
        ).stdout.split()
        ranks = {}
        for pid in map(int, children):
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            for variable in variables:
                if variable.startswith(b"RANK="):
                    ranks[int(variable[5:])] = pid
        return ranks

    def wait_until_said(self):
        """Until the watchdog has announced its verdict."""
        end = time.monotonic() + SECONDS
        while "laver: the run hangs: " not in self.log:
            assert time.monotonic() < end and self.process.poll() is None, self.log[-3000:]
            time.sleep(0.1)

    def said(self):
        """What the watchdog announced; there is one such line."""
        (line,) = re.findall(r"^.*laver: (the run hangs: .*)$", self.log, re.MULTILINE)
        return line

    def stacks(self):
        """{rank: text of its file}."""
        return {int(file.name[5:9]): file.read_text() for file in (self.dir / "faults").glob("rank_*.txt")}


@pytest.fixture
def run(demo_dir, tmp_path):
    run = Run(demo_dir, tmp_path)
    yield run
    if run.process is not None and run.process.poll() is None:
        for pid in run.pids().values():
            os.kill(pid, signal.SIGKILL)
        os.killpg(run.process.pid, signal.SIGKILL)
        run.process.wait()


def assert_hung(run, rank, others):
    """That rank is named and nobody else; the others have written their stacks and ended with the status for it."""
    assert run.wait() >= {HUNG}, run.log[-3000:]
    said = run.said()
    assert re.findall(r"rank (\d+) \(process", said) == [str(rank)], said
    assert f"Ending with exit status {HUNG}" in said
    stacks = run.stacks()
    for other in others:
        assert "Current thread" in stacks[other] and "in train" in stacks[other], stacks[other]  # a step, or its end
    assert run.status["state"] == "hung" and f"rank {rank} (process" in run.status["message"]
    assert run_report(run.dir)["state"] == "hung"
    return said, stacks


@pytest.mark.processes
@pytest.mark.parametrize("num_ranks, rank", [(2, 1), pytest.param(4, 0, marks=pytest.mark.faults)])
def test_a_stopped_rank_is_named(run, num_ranks, rank):
    """SIGSTOP: it cannot write its stacks, and that is said."""
    run.start(num_ranks, "none", rank, *(ONE_EACH if num_ranks == 2 else []))
    run.reach(2)
    pid = run.pids()[rank]
    os.kill(pid, signal.SIGSTOP)
    run.wait_until_said()
    os.kill(pid, signal.SIGKILL)  # as torchrun would half a minute later
    said, stacks = assert_hung(run, rank, set(range(num_ranks)) - {rank})
    assert f"rank {rank} (process {pid} on" in said and "has given no heartbeat for" in said
    assert f"rank {rank} wrote none: stopped or gone" in said and not stacks[rank]


@pytest.mark.processes
@pytest.mark.parametrize(
    "num_ranks, fault, rank, where",
    [
        (2, "loop", 1, "spin"),
        pytest.param(4, "data", 2, "faulty_run.py", marks=pytest.mark.faults),
        pytest.param(1, "loop", 0, "spin", marks=pytest.mark.faults),  # nobody else watches
        pytest.param(2, "data", 0, "faulty_run.py", marks=pytest.mark.faults),
    ],
)
def test_a_rank_that_stands_still_is_named_with_its_place(run, num_ranks, fault, rank, where):
    run.start(num_ranks, fault, rank, *(ONE_EACH if num_ranks < 4 else []))
    said, stacks = assert_hung(run, rank, range(num_ranks))
    assert "is alive but has not moved for" in said and where in said and "wrote none" not in said
    assert where in stacks[rank]


@pytest.mark.faults
@pytest.mark.processes
def test_a_rank_whose_checkpoint_is_not_written_is_named(run):
    """Its writer stands still in the background; the next save waits for it."""
    run.start(2, "save", 1, *ONE_EACH, "--save-interval", 2, "--save-timeout-minutes", 0.2, minutes=1)
    said, stacks = assert_hung(run, 1, [0])
    assert "in phase save after iteration 6" in said and "called by writer.py" in said and "stall" in stacks[1]


@pytest.mark.faults
@pytest.mark.processes
def test_a_rank_whose_gil_is_held_is_named_and_writes_its_stacks(run):
    """None of its threads runs; Python's own timer writes what they do."""
    run.start(2, "gil", 1, *ONE_EACH)
    said, stacks = assert_hung(run, 1, [0])
    assert "has given no heartbeat for" in said and "wrote none" not in said
    assert "faulty_run.py" in stacks[1] and "faulty" in stacks[1]


@pytest.mark.faults
@pytest.mark.processes
def test_a_store_that_does_not_answer_ends_every_rank(run):
    """As where its host is cut off. torchrun keeps it; stopped, it cannot end the ranks: they do so by themselves."""
    run.start(2, "none", 0, *ONE_EACH)
    run.reach(2)
    ranks = run.pids()
    os.kill(run.process.pid, signal.SIGSTOP)
    end = time.monotonic() + SECONDS
    while any(Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z" for pid in ranks.values()):
        assert time.monotonic() < end
        time.sleep(0.1)
    os.kill(run.process.pid, signal.SIGCONT)
    # The first that ends closes its connections, which may end the other by an error before its own limit.
    assert HUNG in run.wait() <= {HUNG, FAILED}, run.log[-3000:]
    assert "rank 0 has not reached the store of the process group for" in run.said()
    assert any("Current thread" in text for text in run.stacks().values())


@pytest.mark.faults
@pytest.mark.processes
def test_a_straggler_is_named(run):
    """The slow rank and no other; the run ends in order. (Of a run without one: test_chaos.py.)"""
    run.start(2, "slow", 1, *ONE_EACH, "--train-iters", 35, "--straggler-percent", 40, minutes=1)
    assert run.wait() == 0, run.log[-3000:]
    named = re.findall(r"^straggler: (.*)$", run.log, re.MULTILINE)
    assert named and all(re.findall(r"rank (\d+) \(process", line) == ["1"] for line in named), run.log[-3000:]
    assert run_report(run.dir)["state"] == "finished" and not (run.dir / "faults").exists()


@pytest.mark.faults
@pytest.mark.processes
def test_accounts_of_a_run_that_was_killed(run):
    """The parts add up to the time since birth, the dead time and the lost iterations among them."""
    run.start(2, "none", 0, *ONE_EACH, "--save-interval", 4, "--train-iters", 12, minutes=1)
    run.reach(6)
    began = run.status["born"]
    for pid in run.pids().values():
        os.kill(pid, signal.SIGKILL)
    run.process.wait(SECONDS)
    assert run_report(run.dir)["state"] == "gone"
    time.sleep(3)
    run.start(2, "none", 0, *ONE_EACH, "--save-interval", 4, "--train-iters", 12, minutes=1)
    assert run.wait() == 0, run.log[-3000:]
    status = run.status
    seconds = status["ledger"]["seconds"]
    assert status["born"] == pytest.approx(began)
    assert sum(seconds.values()) == pytest.approx(status["updated"] - began, abs=0.5)
    assert seconds["restart"] >= 3 and seconds["start"] > 0 and seconds["save"] > 0 and seconds["lost"] >= 0
    lines = [json.loads(line) for line in (run.dir / "metrics.jsonl").read_text().splitlines()]
    kept = sum(line["elapsed_seconds"] - line["data_seconds"] for line in lines)
    assert len(lines) == 12 and seconds["step"] == pytest.approx(kept, abs=0.1)
