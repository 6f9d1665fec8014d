"""Real runs of the demo's model by the real launcher, for tests that end them in all kinds of ways."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = ROOT / "examples" / "pretrain_laver.sh"
# A start takes ten seconds on two busy cores; what takes this long hangs.
LONGEST_SECONDS = 420
# Of metrics.jsonl: what does not depend on the clock or on where the run was interrupted.
EXACT = (
    "iteration", "loss", "lm_loss", "mim_loss", "gram_loss", "grad_norm", "teacher_entropy", "num_masked_tokens",
    "consumed_samples", "consumed_packs", "consumed_tokens",
)  # fmt: skip


def flags_of(demo_dir: Path, run_dir: Path, **settings: object) -> list[str]:
    """The demo on two data-parallel ranks, in small steps."""
    given: dict[str, object] = {
        "config": ROOT / "examples" / "demo.yaml",
        "load": f"hf:{demo_dir}/model",
        "encoder": demo_dir / "encoder",
        "data-path": demo_dir / "shards" / "train-*.tar",
        "valid-data-path": "none",
        "eval-interval": "none",
        "run-dir": run_dir,
        "tensor-model-parallel-size": 1,
        "pipeline-model-parallel-size": 1,
        "micro-batch-size": 2,
        "global-batch-size": 4,
        "num-workers": 0,
        **{name.replace("_", "-"): value for name, value in settings.items()},
    }
    words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
    return [*words, "--no-sequence-parallel"]


class RealRun:
    """A run as a process of its own, in a session of its own, with its output in a file."""

    def __init__(self, command: list[str], run_dir: Path, **environment: str) -> None:
        foreign = ("SLURM_", "LAVER_", "TORCHELASTIC_", "MASTER_", "NNODES", "NPROC", "NODE_RANK", "RANK", "WORLD_SIZE")
        environ = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}"
        environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environ.get("PYTHONPATH")])])
        self.run_dir, self._log = run_dir, run_dir.with_name(f"{run_dir.name}.{time.monotonic_ns()}.log")
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                env={**environ, "NPROC_PER_NODE": "2", **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._seen: dict[int, psutil.Process] = {}

    @classmethod
    def launch(cls, demo_dir: Path, run_dir: Path, *, environment: dict | None = None, **settings: object) -> "RealRun":
        """By `bash examples/pretrain_laver.sh`."""
        command = ["bash", str(LAUNCHER), *flags_of(demo_dir, run_dir, **settings)]
        return cls(command, run_dir, **(environment or {}))

    @classmethod
    def torchrun(
        cls, demo_dir: Path, run_dir: Path, *, program: Sequence[object] = (LAUNCHER,), **settings: object
    ) -> "RealRun":
        """By torchrun itself."""
        words = ["torchrun", "--standalone", "--nproc-per-node", "2", *map(str, program)]
        return cls([*words, *flags_of(demo_dir, run_dir, **settings)], run_dir)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def records(self) -> list[dict]:
        file = self.run_dir / "metrics.jsonl"
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        return [json.loads(line) for line in lines]

    def exact_records(self) -> list[dict]:
        return [{name: record[name] for name in EXACT} for record in self.records()]

    def wait_for_iteration(self, iteration: int) -> None:
        """Until metrics.jsonl tells of it."""
        deadline = time.monotonic() + LONGEST_SECONDS
        while not any(record["iteration"] >= iteration for record in self.records()):
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.05)
        self.descendants()

    def wait_for_line(self, text: str) -> None:
        """Until it has printed it."""
        deadline = time.monotonic() + LONGEST_SECONDS
        while text not in self.log:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log
            time.sleep(0.02)

    def wait_for_file(self, pattern: str) -> None:
        """Until its directory has such a file."""
        deadline = time.monotonic() + LONGEST_SECONDS
        while not any(self.run_dir.glob(pattern)):
            assert self.process.poll() is None and time.monotonic() < deadline, self.log
            time.sleep(0.05)

    def descendants(self) -> list[psutil.Process]:
        """Everything that it has started, as far as it was seen."""
        try:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                self._seen.setdefault(child.pid, child)
        except psutil.NoSuchProcess:
            pass
        return list(self._seen.values())

    def ranks(self) -> list[psutil.Process]:
        """Its ranks: the leaders of sessions of their own."""
        return [child for child in self.descendants() if child.is_running() and os.getsid(child.pid) == child.pid]

    def wait(self) -> int:
        return self.process.wait(LONGEST_SECONDS)

    def wait_until_all_are_gone(self, seconds: float) -> list[psutil.Process]:
        """What is left after so many seconds."""
        return psutil.wait_procs(self.descendants(), seconds)[1]

    def end(self) -> None:
        for process in (*self.descendants(), psutil.Process()):
            if process.pid != os.getpid() and process.is_running():
                process.kill()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
