"""Two hosts as two network namespaces with a link between them, which is cut while a run trains over it."""

import json
import os
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.faults.chaos import differences, records_of
from tests.runs import LAUNCHER, RealRun, flags_of

pytestmark = pytest.mark.faults
NUM_STEPS = 12
STEP_MINUTES = 0.2
LAYOUTS = {"DP2": {}, "PP2": {"pipeline_model_parallel_size": 2}, "TP2": {"tensor_model_parallel_size": 2}}
# With which a layout's order of summation is not amplified from step to step; see distributed/test_two_agents.py.
CALM = {"adam_eps": 1e-3, "student_temperature": 0.2, "teacher_temperature": 0.2}


def ip(*words: str, check: bool = True) -> None:
    subprocess.run(["ip", *words], check=check, capture_output=True)


class Hosts:
    """host0 and host1: each with a network and a name of its own, on the disk of this machine."""

    names = ("host0", "host1")

    def __init__(self) -> None:
        self._spaces = [f"laver{os.getpid()}-{name}" for name in self.names]
        self._devices = [f"laver{os.getpid() % 100000}{side}" for side in "ab"]
        for space in self._spaces:
            ip("netns", "add", space)
        ip("link", "add", self._devices[0], "type", "veth", "peer", "name", self._devices[1])
        for number, (space, device) in enumerate(zip(self._spaces, self._devices, strict=True)):
            ip("link", "set", device, "netns", space)
            ip("-n", space, "addr", "add", f"{self.address(number)}/24", "dev", device)
            for name in ("lo", device):
                ip("-n", space, "link", "set", name, "up")

    def address(self, number: int) -> str:
        return f"10.213.7.{number + 1}"

    def cut(self) -> None:
        ip("-n", self._spaces[1], "link", "set", self._devices[1], "down")

    def heal(self) -> None:
        ip("-n", self._spaces[1], "link", "set", self._devices[1], "up")

    def launch(self, number: int, demo_dir, run_dir, *flags: str, **settings) -> RealRun:
        """The launcher on one of them, with one rank."""
        as_host = 'hostname "$0"; exec "$@"'
        command = [
            "ip", "netns", "exec", self._spaces[number], "unshare", "--uts", "sh", "-c", as_host, self.names[number],
            "bash", str(LAUNCHER), *flags_of(demo_dir, run_dir, **settings), *flags,
        ]  # fmt: skip
        environment = {
            "NNODES": "2", "NODE_RANK": str(number), "NPROC_PER_NODE": "1", "MASTER_ADDR": self.address(0),
            "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": self._devices[number],
        }  # fmt: skip
        return RealRun(command, run_dir, **environment)

    def remove(self) -> None:
        for space in self._spaces:
            ip("netns", "del", space, check=False)  # and the link with it


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    try:
        made = Hosts()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")
    yield made
    made.remove()


@pytest.fixture
def runs(hosts):
    """Ends what a test leaves, before the hosts are removed."""
    started: list[RealRun] = []
    yield started
    for run in started:
        run.end()


def wait_for(runs, text: str) -> list[float]:
    """Seconds until each has printed it, one after the other."""
    began, seconds = time.monotonic(), []
    for run in runs:
        run.wait_for_line(text)
        seconds.append(round(time.monotonic() - began, 1))
    return seconds


def line_of(run, text: str) -> str:
    return next(line for line in run.log.splitlines() if text in line)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_link_is_cut_and_healed(hosts, runs, demo_dir, tmp_path, layout):
    """Both sides end within the limit for a step and name the lost host, start again together, and lose nothing."""
    settings = {"train_iters": NUM_STEPS, "save_interval": 2, **LAYOUTS[layout]}
    runs.append(calm := RealRun.launch(demo_dir, tmp_path / "calm", **settings))
    assert calm.wait() == 0, calm.log

    settings |= {"restarts": 2, "step_timeout_minutes": STEP_MINUTES}
    two = [hosts.launch(number, demo_dir, tmp_path / "run", **settings) for number in range(2)]
    runs += two
    for run in two:
        run.wait_for_iteration(3)
    hosts.cut()
    seconds = wait_for(two, "starting again from iteration")
    assert max(seconds) < 60 * STEP_MINUTES + 60
    first, second = (line_of(run, "starting again from iteration") for run in two)
    assert first.startswith("host0: rank 0 ended with exit status 75, as rank 1 (process ") and "on host1) has" in first
    assert second.startswith("host1: rank 1 ended with exit status 75, as rank 1 has not reached the store")
    assert f"which host {hosts.address(0)} (MASTER_ADDR) keeps" in second

    hosts.heal()
    healed = time.monotonic()
    assert [run.wait() for run in two] == [0, 0], two[0].log + two[1].log
    print(
        f"\n{layout}: both sides ended {seconds} s after the cut, done {time.monotonic() - healed:.1f} s after healing"
    )
    assert differences(tmp_path / "calm", tmp_path / "run") == []
    (restart,) = [json.loads(line) for line in (tmp_path / "run" / "restarts.jsonl").read_text().splitlines()]
    assert restart["nodes"] == [0, 1] and list(restart["said"]) == ["host0", "host1"]
    assert all(not run.wait_until_all_are_gone(5) for run in two)


def test_a_host_is_lost_for_good(hosts, runs, demo_dir, tmp_path):
    """With --elastic the other goes on with all of the data: the same samples in the same order."""
    settings = {"train_iters": NUM_STEPS, "save_interval": 2, **CALM}
    runs.append(calm := RealRun.launch(demo_dir, tmp_path / "calm", **settings))
    assert calm.wait() == 0, calm.log

    settings |= {"restarts": 2, "step_timeout_minutes": STEP_MINUTES, "node_timeout_minutes": 0.5}
    two = [hosts.launch(number, demo_dir, tmp_path / "run", "--elastic", **settings) for number in range(2)]
    runs += two
    for run in two:
        run.wait_for_iteration(3)
    hosts.cut()
    two[1].end()
    lost = time.monotonic()
    assert two[0].wait() == 0, two[0].log
    print(f"\nelastic: done {time.monotonic() - lost:.1f} s after the loss")
    (restart,) = [json.loads(line) for line in (tmp_path / "run" / "restarts.jsonl").read_text().splitlines()]
    assert restart["nodes"] == [0] and "on host1) has given no heartbeat" in restart["cause"]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["world_size"] == 1
    expected, found = records_of(tmp_path / "calm"), records_of(tmp_path / "run")
    assert found.keys() == expected.keys()
    for iteration, record in expected.items():
        assert found[iteration]["consumed_samples"] == record["consumed_samples"]
        assert found[iteration] == pytest.approx(record, rel=2e-6), iteration  # 1.1e-6 was seen, in a gradient norm


def test_a_mistake_on_one_host_ends_both(hosts, runs, demo_dir, tmp_path):
    """Another run has the directory, which rank 0 alone finds; the rank of host1 would wait for it for an hour."""
    runs.append(first := RealRun.launch(demo_dir, tmp_path / "run", train_iters=5000))
    first.wait_for_iteration(1)
    settings = {"train_iters": NUM_STEPS, "restarts": 5}
    two = [hosts.launch(number, demo_dir, tmp_path / "run", **settings) for number in range(2)]
    runs += two
    began = time.monotonic()
    assert [run.wait() for run in two] == [2, 2], two[0].log + two[1].log
    print(f"\nmistake: both ended after {time.monotonic() - began:.1f} s")
    assert "node 0 has ended the run: rank 0 ended with exit status 2" in two[1].log
    assert all(not run.wait_until_all_are_gone(5) for run in two)
