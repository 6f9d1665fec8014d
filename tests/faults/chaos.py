"""A run under its supervisor, with a random fault every few seconds, and what is left of it in the end.

    python -m tests.faults.chaos --minutes 40 --every 20 --output runs/chaos

trains the demo's model at TP2 x PP2 undisturbed and disturbed, compares weights, teacher, centre, optimizer and metrics
to the bit, and prints a table of faults.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.faults.processes import TOKEN, kill_all, processes
from tests.programs import ROOT, python_path

# What a record says of the clock, the machine or a restart; everything else must be the same.
MEASURED = ("second", "per_gpu", "mfu", "hfu", "memory", "skew", "straggler", "time")


FAULTS = ("kill_rank", "kill_child", "stop_rank", "terminate", "flip_byte", "cut_shard", "fill_disk")


@dataclass
class Disturbed:
    """A run that is disturbed until it is done.

    Attributes:
        command: `laver train` and its flags; started again when it has stopped in order or given up.
        shards: those of the training data, of which one may be cut.
        faults: names of methods; each comes once before any comes again.
        at_iterations: when metrics.jsonl tells of them, instead of by the clock, and in the order of `faults`.
        events: (seconds since the start, fault, what it hit).
    """

    run_dir: Path
    command: Sequence[str]
    shards: Sequence[Path]
    random: random.Random
    faults: Sequence[str] = FAULTS
    at_iterations: Sequence[int] = ()
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    events: list[tuple[float, str, str]] = field(default_factory=list)
    endings: Counter[int] = field(default_factory=Counter)
    _queue: list[str] = field(default_factory=list)
    _process: subprocess.Popen[bytes] | None = None
    _born: float = field(default_factory=time.monotonic)

    # --- faults: each says what it hit, or "" if there was nothing to hit ---

    def kill_rank(self) -> str:
        return self._signal_one(signal.SIGKILL, child=False)

    def kill_child(self) -> str:
        """A loader's worker, or a checkpoint's writer."""
        return self._signal_one(signal.SIGKILL, child=True)

    def stop_rank(self) -> str:
        return self._signal_one(signal.SIGSTOP, child=False)

    def terminate(self) -> str:
        if self._process is None or self._process.poll() is not None:
            return ""
        self._process.terminate()
        return "the launcher"

    def flip_byte(self) -> str:
        """One bit of the newest checkpoint."""
        checkpoints = sorted((self.run_dir / "checkpoints").glob("iter_*"))
        files = sorted(file for file in checkpoints[-1].rglob("*") if file.is_file()) if checkpoints else []
        files = [file for file in files if file.stat().st_size]
        if not files:
            return ""
        file = self.random.choice(files)
        with suppress(FileNotFoundError), file.open("r+b") as stream:
            place = self.random.randrange(file.stat().st_size)
            stream.seek(place)
            old = stream.read(1)[0]
            stream.seek(place)
            stream.write(bytes([old ^ 1 << self.random.randrange(8)]))
            return str(file.relative_to(self.run_dir))
        return ""

    def cut_shard(self) -> str:
        """Half of a shard is missing for some seconds."""
        shard = self.random.choice(self.shards)
        content = shard.read_bytes()
        os.truncate(shard, len(content) // 2)
        time.sleep(4)
        shard.write_bytes(content)
        return shard.name

    def fill_disk(self) -> str:
        """No space for some seconds; where the run directory has a small file system of its own."""
        filler = self.run_dir.parent / "filler"
        if shutil.disk_usage(self.run_dir.parent).total > 4 << 30:
            return ""
        with suppress(OSError), filler.open("wb", buffering=0) as stream:
            while stream.write(bytes(1 << 20)):
                pass
        time.sleep(5)
        filler.unlink()
        return "the file system"

    # --- the run ---

    def finish(self, every_seconds: float, max_faults: int, deadline_seconds: float) -> None:
        """Disturbs the run until it is done; without faults after `max_faults` of them.

        Raises:
            TimeoutError: it is not done in time.
        """
        next_fault = time.monotonic() + self._wait(every_seconds)
        try:
            while True:
                if self._process is None:
                    self._start()
                assert self._process is not None
                status = self._process.poll()
                if status is not None:
                    self.endings[status] += 1
                    self._process = None
                    if status == 0 and (self.run_dir / "DONE").exists():
                        return
                now = time.monotonic()
                if now - self._born > deadline_seconds:
                    raise TimeoutError(f"not done in {deadline_seconds} s: {self.events}, {dict(self.endings)}")
                is_due = self._has_reached_next() if self.at_iterations else now >= next_fault
                if is_due and len(self.events) < max_faults:
                    if not self._queue:
                        mixed = self.random.sample(self.faults, len(self.faults))
                        self._queue = list(self.faults[::-1]) if self.at_iterations else mixed
                    fault = self._queue.pop()
                    if hit := getattr(self, fault)():
                        self.events.append((round(now - self._born, 1), fault, hit))
                        next_fault = time.monotonic() + self._wait(every_seconds)
                time.sleep(0.2)
        finally:
            kill_all(self.token)

    def _start(self) -> None:
        log = (self.run_dir.parent / f"{self.run_dir.name}.log").open("ab")
        environment = {**os.environ, TOKEN: self.token, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            self.command, stdout=log, stderr=log, env=environment, cwd=ROOT, start_new_session=True
        )

    def _has_reached_next(self) -> bool:
        if len(self.events) >= len(self.at_iterations):
            return False
        file, iteration = self.run_dir / "metrics.jsonl", self.at_iterations[len(self.events)]
        return file.exists() and f'"iteration": {iteration},' in file.read_text()

    def _wait(self, seconds: float) -> float:
        return self.random.uniform(0.5, 1.5) * seconds

    def _signal_one(self, number: signal.Signals, *, child: bool) -> str:
        found = [p for p in processes(self.token) if p.rank is not None and p.is_child == child]
        if not found:
            return ""
        hit = self.random.choice(found)
        return f"{'child of ' if child else ''}rank {hit.rank}" if hit.send(number) else ""


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by key."""
    reader = torch_checkpoint.FileSystemReader(checkpoint)
    stored = reader.read_metadata().state_dict_metadata
    entries = {key: entry for key, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}
    state = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in entries.items()}
    torch_checkpoint.load(state, storage_reader=torch_checkpoint.FileSystemReader(checkpoint), no_dist=True)
    return state


def records_of(run_dir: Path) -> dict[int, dict]:
    """What was logged of each iteration, without what depends on the clock."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        line["iteration"]: {name: value for name, value in line.items() if not any(word in name for word in MEASURED)}
        for line in lines
    }


def differences(one: Path, other: Path) -> list[str]:
    """Tensors of the last checkpoint and logged iterations in which two runs differ."""
    states = [tensors_of(max((run / "checkpoints").glob("iter_*"))) for run in (one, other)]
    found = sorted(states[0].keys() ^ states[1].keys())
    found += [key for key in states[0].keys() & states[1].keys() if not torch.equal(states[0][key], states[1][key])]
    records = [records_of(run) for run in (one, other)]
    found += [f"iteration {i}" for i in records[0].keys() | records[1].keys() if records[0].get(i) != records[1].get(i)]
    return found


@contextmanager
def small_disk(directory: Path) -> Iterator[Path]:
    """A file system of 400 MB that can be filled, where that is permitted; else a folder."""
    directory.mkdir(parents=True, exist_ok=True)
    is_mounted = not subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", str(directory)]).returncode
    try:
        yield directory
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(directory)], check=True)  # a process may still hold it


def train_command(config: Path, run_dir: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "laver_megatron", "train", "--config", str(config), "--run-dir", str(run_dir), *flags]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=40, help="how long faults go on, about (default: 40)")
    parser.add_argument("--every", type=float, default=20, help="seconds between faults, on average (default: 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-iters", type=int, default=300)
    parser.add_argument("--output", type=Path, default=Path("runs/chaos"))
    parser.add_argument("flags", nargs="*", help="further flags of laver train, after --")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    demo = ROOT / "runs/demo"
    if not (demo / "shards").is_dir():
        subprocess.run([sys.executable, "tools/make_demo.py", "--dir", str(demo)], cwd=ROOT, check=True)
    shutil.rmtree(output / "chaos", ignore_errors=True)
    shutil.copytree(demo / "shards", output / "shards", dirs_exist_ok=True)
    limits = [f"--{phase}-timeout-minutes" for phase in ("data", "step", "save")]
    flags = [
        *(word for limit in limits for word in (limit, "0.4")),
        "--data-path", f"{output}/shards/train-*.tar", "--train-iters", str(arguments.train_iters),
        # A sample that cannot be read while a shard is cut must end the run, not be left out.
        "--max-bad-fraction", "0", "--save-interval", "5", "--keep-last", "3", "--eval-interval", "none",
        *arguments.flags,
    ]  # fmt: skip
    os.environ["NPROC_PER_NODE"] = "4"
    environment = {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    calm = train_command(ROOT / "examples/demo.yaml", output / "calm", *flags)
    if not (output / "calm" / "DONE").exists():  # else it is there from an earlier call
        subprocess.run(calm, cwd=ROOT, env=environment, check=True)
    calm_summary = json.loads((output / "calm" / "run_summary.json").read_text())
    flags += ["--restarts", "1000", "--restart-same-step-limit", "10", "--save-failure", "continue"]
    with small_disk(output / "disk") as disk:
        command = train_command(ROOT / "examples/demo.yaml", disk / "chaos", *flags)
        shards = sorted((output / "shards").glob("train-*.tar"))
        run = Disturbed(disk / "chaos", command, shards, random.Random(arguments.seed))
        started = time.monotonic()
        run.finish(arguments.every, int(arguments.minutes * 60 / arguments.every), arguments.minutes * 60 * 4)
        seconds = time.monotonic() - started
        different = differences(output / "calm", disk / "chaos")
        summary = json.loads((disk / "chaos" / "run_summary.json").read_text())
        shutil.copytree(disk / "chaos", output / "chaos", ignore=shutil.ignore_patterns("checkpoints"))
    print("\n| fault | times |\n|---|---|")
    for name, count in Counter(name for _, name, _ in run.events).most_common():
        print(f"| {name} | {count} |")
    training = calm_summary["time"]["training_seconds"]
    print(f"\nundisturbed {training:.0f} s of training, disturbed {seconds:.0f} s; endings {dict(run.endings)}")
    print(f"restarts {len(summary['restarts'])}, goodput {json.dumps(summary.get('goodput'))}")
    print(f"different from the undisturbed run: {different or 'nothing'}")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
