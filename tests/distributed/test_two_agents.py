"""Two torchrun agents, as on two machines, give the numbers of one process: the real launcher, configuration
file, tokenizer, images and shards of a small demo.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from laver_megatron.config.command_line import read_command_line
from laver_megatron.train import setup, train
from tests.distributed.harness import Layout

ROOT = Path(__file__).parents[2]
LAUNCHER = ROOT / "examples" / "pretrain_laver.sh"
NUM_STEPS = 5
# Layouts sum in other orders: some 1e-6 in the gradient norm of one step, 1e-7 in losses. At the demo's own settings
# later steps would amplify it: Adam makes whole steps of gradients that are nothing but rounding, and the teacher's
# temperature of 0.04 multiplies what that moves by 25 before a softmax (1.4e-5 in mim_loss at the third step was seen).
# With an epsilon above such gradients steps are in proportion to gradients, and with warm temperatures logits count as
# they are; then every number of every step was within 1.1e-6, while the run still moves (below).
CALM = {"--adam-eps": 1e-3, "--student-temperature": 0.2, "--teacher-temperature": 0.2}
TOLERANCE = 1e-5
AGENT_SECONDS = 300
FIELDS = (
    "loss", "lm_loss", "mim_loss", "gram_loss", "grad_norm", "student_visual_similarity", "teacher_visual_similarity",
    "teacher_entropy", "num_masked_tokens", "num_tokens", "consumed_samples", "consumed_packs",
)  # fmt: skip


def arguments(demo_dir, run_dir, *, tp=1, pp=1, micro_batch_size=4):
    """The demo at another layout: five steps from its model on a few of its shards."""
    settings = {
        "--config": ROOT / "examples" / "demo.yaml",
        "--load": f"hf:{demo_dir}/model",
        "--encoder": demo_dir / "encoder",
        "--data-path": demo_dir / "shards" / "train-*.tar",
        "--valid-data-path": demo_dir / "shards" / "valid-*.tar",
        "--run-dir": run_dir,
        "--tensor-model-parallel-size": tp,
        "--pipeline-model-parallel-size": pp,
        "--micro-batch-size": micro_batch_size,
        "--train-iters": NUM_STEPS,
        "--lr": 1e-3,
        "--num-workers": 0,
        **CALM,
    }
    flags = [str(word) for pair in settings.items() for word in pair]
    return [*flags, "--sequence-parallel" if tp > 1 else "--no-sequence-parallel"]


def records(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(1, NUM_STEPS + 1))
    return [{name: line[name] for name in FIELDS} for line in lines]


def run_in_process(layout, command_line):
    """Job: the trainer without its launcher."""
    train(setup(read_command_line(command_line).config))


@pytest.fixture(scope="module")
def one_process(pool, demo_dir, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("one") / "run"
    pool.run(run_in_process, Layout(), arguments(demo_dir, run_dir))
    return records(run_dir)


class Agents:
    """Agents started one by one, as on machines of their own."""

    def __init__(self, directory):
        self.directory, self.processes = directory, []
        # What would tell torchrun and the launcher about another cluster or job stays outside.
        foreign = ("SLURM_", "TORCHELASTIC_", "MASTER_", "NNODES", "NODE_RANK", "NPROC_PER_NODE", "RANK", "WORLD_SIZE")
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        self.environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{self.environment['PATH']}"

    def start(self, command, **environment):
        """One agent, its output in a file, in a session of its own with all its processes."""
        with self._log(len(self.processes)).open("w") as log:
            process = subprocess.Popen(
                [str(word) for word in command],
                env={**self.environment, **environment},
                cwd=self.directory,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(process)

    def finish(self):
        """Waits for all agents; AssertionError with their last words unless all ended well."""
        codes = [process.wait(AGENT_SECONDS) for process in self.processes]
        logs = "\n".join(self._log(number).read_text()[-4000:] for number in range(len(codes)))
        assert not any(codes), f"agents ended with {codes}\n{logs}"

    def end(self):
        """Ends those that still run."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(60)

    def _log(self, number):
        return self.directory / f"agent-{number}.log"


@pytest.fixture
def agents(tmp_path):
    agents = Agents(tmp_path)
    yield agents
    agents.end()


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return str(listener.getsockname()[1])


def assert_same(found, expected):
    for step, (record, wanted) in enumerate(zip(found, expected, strict=True)):
        for name in FIELDS:
            assert record[name] == pytest.approx(wanted[name], rel=TOLERANCE), f"{name} at step {step}"


def test_the_run_moves(one_process):
    """What the steps do to the weights shows in the later records, by far more than the tolerance."""
    first, last = one_process[0], one_process[-1]
    for name, least in (("lm_loss", 0.01), ("mim_loss", 0.1), ("grad_norm", 0.1)):
        assert last[name] < (1 - least) * first[name], name


@pytest.mark.parametrize(
    "tp", [1, pytest.param(2, marks=pytest.mark.slow(reason="tensor parallelism within a machine, as without agents"))]
)
def test_shell_agents_share_a_pipeline(agents, demo_dir, one_process, tmp_path, tp):
    """`bash pretrain_laver.sh` on each of two machines: TP within a machine, a pipeline stage on each, the number
    of processes found by the launcher. One agent alone would have too few ranks to start."""
    run_dir = tmp_path / "run"
    command = ["bash", LAUNCHER, *arguments(demo_dir, run_dir, tp=tp, pp=2, micro_batch_size=2)]
    port = free_port()
    for node in range(2):
        agents.start(command, NNODES="2", NODE_RANK=str(node), MASTER_ADDR="localhost", MASTER_PORT=port)
    agents.finish()
    assert_same(records(run_dir), one_process)


@pytest.mark.slow(reason="the launcher's own agents meet in the same way")
def test_torchrun_agents_share_the_data(agents, demo_dir, one_process, tmp_path):
    """`torchrun --nnodes 2 ... pretrain_laver.sh` on each of two machines, data parallel across them."""
    run_dir = tmp_path / "run"
    port = free_port()
    for node in range(2):
        agents.start(
            ["torchrun", "--nnodes", 2, "--nproc-per-node", 1, "--node-rank", node, "--master-addr", "localhost",
             "--master-port", port, LAUNCHER, *arguments(demo_dir, run_dir)]
        )  # fmt: skip
    agents.finish()
    assert_same(records(run_dir), one_process)
