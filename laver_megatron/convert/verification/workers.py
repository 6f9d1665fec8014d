"""Runs a function in fresh processes, one result each, by way of files.

A fresh process starts without the parallel groups, device state and memory of the one before, so several
models can be run one after the other, at layouts of their own.
"""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

_POLL_SECONDS = 0.05
# After the first failure the others may still report a reason of their own; then they are taken to wait for it.
_GRACE_SECONDS = 2.0


class WorkerFailed(RuntimeError):
    """A process ended without a result; the message is what it raised."""


@dataclass(frozen=True)
class Worker:
    """One of `num_workers` processes; store: a file by which they can find each other."""

    rank: int
    num_workers: int
    store: Path


def run_workers(function: Callable[..., Any], num_workers: int, *arguments: Any) -> list[Any]:
    """`function(worker, *arguments)` in each of `num_workers` new processes; their results, by rank.

    function: at the top of a module. Results travel as torch files, so tensors in them are on the CPU.

    Raises:
        WorkerFailed: what the first of them to fail raised; the others are ended.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="laver-workers-") as name:
        directory = Path(name)
        processes: list[BaseProcess] = []
        try:
            for rank in range(num_workers):
                worker = Worker(rank, num_workers, directory / "store")
                processes.append(context.Process(target=_work, args=(function, worker, arguments), daemon=True))
                processes[-1].start()
            _wait(processes, directory)
        finally:
            for process in processes:
                process.terminate()
                process.join()
        return [torch.load(directory / f"result-{rank}.pt", weights_only=False) for rank in range(num_workers)]


def _wait(processes: list[BaseProcess], directory: Path) -> None:
    deadline = None
    while any(process.is_alive() for process in processes):
        if deadline is None and any(process.exitcode for process in processes):
            deadline = time.monotonic() + _GRACE_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(_POLL_SECONDS)
    if all(process.exitcode == 0 for process in processes):
        return
    # A rank that lost its partner says less than the one that failed for a reason of its own, and earlier.
    reports = sorted(directory.glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
    if reports:
        raise WorkerFailed(reports[0].read_text())
    ended = {rank: process.exitcode for rank, process in enumerate(processes) if process.exitcode}
    raise WorkerFailed(f"processes ended without a word (rank: exit code {ended}); is there enough memory?")


def _work(function: Callable[..., Any], worker: Worker, arguments: tuple) -> None:
    directory = worker.store.parent
    os.environ.update(RANK=str(worker.rank), LOCAL_RANK=str(worker.rank), WORLD_SIZE=str(worker.num_workers))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max((os.cpu_count() or 1) // worker.num_workers, 1))
    try:
        torch.save(function(worker, *arguments), directory / f"result-{worker.rank}.pt")
    except BaseException as error:  # Megatron's checkpoint errors are no Exceptions
        expected = isinstance(error, (ValueError, OSError))
        report = f"{type(error).__name__}: {error}" if expected else traceback.format_exc()
        (directory / f"error-{worker.rank}").write_text(report)
        os._exit(1)  # leaving a process group in order would wait for the others
