"""The teacher's update and the checkpoint, each beside the bare work that it cannot do without; Markdown.

    python -m tools.benchmarks.state                      the model of 512 x 8 layers, on the CPU
    python -m tools.benchmarks.state --device cuda --bf16 --shape 1.5b --dir /data/scratch

- teacher's update: against `torch._foreach_lerp_` and `torch._foreach_copy_` on tensors of the same sizes
- save: against writing as many bytes to one file in the same folder, flushed to the disk
- resume: `load_checkpoint`, which verifies every byte, against reading the same files
- step while a checkpoint is written: against steps without
- save, while training stands still: with --async-save, against without
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from laver_megatron import train
from laver_megatron.checkpoint.directory import latest_checkpoint
from laver_megatron.checkpoint.saver import save_checkpoint
from laver_megatron.checkpoint.state import load_checkpoint
from laver_megatron.runtime.backend import shut_down_parallelism, use_backend
from tools.benchmarks import report
from tools.benchmarks.memory import resident
from tools.benchmarks.our_step import make_config, make_trainer, write_model
from tools.benchmarks.plain_steps import wait_for
from tools.benchmarks.step_shapes import SHAPES

_BLOCK = 64 << 20


def seconds_in_turns(works: Sequence[Callable[[], object]], rounds: int, device: torch.device) -> list[list[float]]:
    """Seconds of each work by round, after one that is not counted."""
    seconds: list[list[float]] = [[] for _ in works]
    for number in range(rounds + 1):
        for place, work in enumerate(works):
            started = wait_for(device)
            work()
            if number:
                seconds[place].append(wait_for(device) - started)
    return seconds


def bare_update(trainer: train.Trainer) -> Callable[[], None]:
    """The average and the copy into the run's dtype, on tensors of the same sizes and nothing else."""
    assert trainer.teacher is not None
    accumulators = [torch.zeros_like(accumulator) for accumulator in trainer.teacher.accumulators()]
    masters = [torch.ones_like(accumulator) for accumulator in accumulators]
    dtype = torch.bfloat16 if trainer.config.training.bf16 else torch.float32
    weights = [torch.empty_like(accumulator, dtype=dtype) for accumulator in accumulators]

    def update() -> None:
        with torch._C.DisableTorchFunction():
            torch._foreach_lerp_(accumulators, masters, 0.05)
            torch._foreach_copy_(weights, accumulators)

    return update


def folder_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def write_bytes(path: Path, num_bytes: int) -> None:
    """One file of that many bytes, flushed to the disk."""
    block = os.urandom(_BLOCK)
    with path.open("wb") as file:
        for start in range(0, num_bytes, _BLOCK):
            file.write(block[: num_bytes - start])
        file.flush()
        os.fsync(file.fileno())


def read_files(path: Path) -> None:
    for file in path.rglob("*"):
        if file.is_file():
            with file.open("rb", buffering=0) as stream:
                while stream.read(_BLOCK):
                    pass


def measure(trainer: train.Trainer, directory: Path, rounds: int) -> str:
    """The table."""
    device, teacher, config = trainer.backend.device, trainer.teacher, trainer.config
    assert teacher is not None
    train.train_step(trainer)  # an optimizer without a step has nothing to save
    update, bare = seconds_in_turns([lambda: teacher.update(0.95), bare_update(trainer)], 5 * rounds, device)
    checkpoints = directory / "checkpoints"

    def save() -> None:
        save_checkpoint(checkpoints, trainer.state, trainer.model_dir, trainer.encoder_dir, config.flat())

    save()
    path = latest_checkpoint(checkpoints)
    assert path is not None
    num_bytes = folder_bytes(path)
    before = resident("VmRSS")
    saving, writing = seconds_in_turns([save, lambda: write_bytes(directory / "bytes", num_bytes)], rounds, device)
    loading, reading = seconds_in_turns(
        [lambda: load_checkpoint(path, trainer.state), lambda: read_files(path)], rounds, device
    )
    steps, steps_beside = step_seconds_beside_saves(trainer, rounds)
    num_parameters = sum(accumulator.numel() for accumulator in teacher.accumulators())
    rows = [
        [f"teacher's update, {num_parameters / 1e6:.1f}M parameters", *_cells(update, bare)],
        [f"save, {num_bytes / 1e9:.2f} GB", *_cells(saving, writing)],
        [f"resume, {num_bytes / 1e9:.2f} GB", *_cells(loading, reading)],
        ["step while a checkpoint is written", *_cells(steps_beside, steps)],
        ["save, while training stands still", *_cells(*stopped_seconds(trainer, rounds))],
    ]
    memory = (
        f"Resident set: {before / 2**20:.0f} MiB before the saves, {resident('VmHWM') / 2**20:.0f} MiB at the peak."
    )
    return report.table(["what", "ms", "bare work, ms", "ratio"], rows) + "\n\n" + memory


def step_seconds_beside_saves(trainer: train.Trainer, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds a step without a save, and of those during which one was on its way to the disk, by round."""
    device, saver = trainer.backend.device, trainer.saver
    alone: list[float] = []
    beside: list[float] = []
    for _ in range(rounds):
        for steps in (alone, beside):
            if steps is beside:
                saver.save(trainer.state, last=False)
            seconds = []
            for number in range(3):
                is_counted = steps is alone or number == 0 or saver.is_writing
                started = wait_for(device)
                train.train_step(trainer)
                if is_counted:
                    seconds.append(wait_for(device) - started)
            steps.append(sum(seconds) / len(seconds))
            saver.publish()
    return alone, beside


def stopped_seconds(trainer: train.Trainer, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds that training stands still for a save, in the background and at once."""
    saver = trainer.saver
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for last, found in zip((False, True), seconds, strict=True):
            saver.save(trainer.state, last=last)
            while saver.is_writing:  # as in the steps after it
                time.sleep(0.01)
            saver.publish()
            found.append(saver.stopped_seconds)
    return seconds


def _cells(ours: Sequence[float], bare: Sequence[float]) -> list[str]:
    in_ms = [report.spread([1e3 * seconds for seconds in values], ".4g") for values in (ours, bare)]
    return [*in_ms, report.ratio(ours, bare)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=tuple(SHAPES), default="h512-l8-s1024", help="default: h512-l8-s1024")
    add("--rounds", type=int, default=3, help="saves and resumes; updates are five times as many (default: 3)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--bf16", action="store_true", help="compute in bf16, with fp32 master weights")
    add("--dir", type=Path, help="a folder for the checkpoints (default: the system's for temporary files)")
    add("--quick", action="store_true", help="a tiny shape, one round")
    add("--output", type=Path, help="a file for the report (default: standard output)")
    options = parser.parse_args(argv)
    if options.quick:
        options.shape, options.rounds = "tiny", 1
    device = report.chosen_device(use_backend().device, options.device)
    shape = SHAPES[options.shape]
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        directory = Path(name)
        write_model(shape, directory, torch.bfloat16 if options.bf16 else torch.float32)
        trainer = make_trainer(make_config(shape, directory, laver=True, bf16=options.bf16), shape)
        started = time.perf_counter()
        text = measure(trainer, directory, options.rounds)
        shut_down_parallelism()
    facts = f"{shape.name}, vocabulary {shape.vocab_size}; {time.perf_counter() - started:.0f} s in all."
    report.write("Teacher and checkpoint", device, [facts, text], options.output)


if __name__ == "__main__":
    main()
