"""Runs a function in fresh processes, one result each, by way of files.

A fresh process starts without the parallel groups, device state and memory of the one before, so several
models can be run one after the other, at layouts of their own.
"""

import multiprocessing
import os
import signal
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import ProcessExitedException, start_processes


class WorkerFailed(RuntimeError):
    """A process ended without a result; the message is what it raised."""


@dataclass(frozen=True)
class Worker:
    """One of the processes.

    Attributes:
        rank, num_workers: which of how many.
        store: a file by which they can find each other.
    """

    rank: int
    num_workers: int
    store: Path


def run_workers(
    function: Callable[..., Any], num_workers: int, *arguments: Any, result_types: Sequence[type] = ()
) -> list[Any]:
    """`function(worker, *arguments)` in each of `num_workers` new processes; their results, by rank.

    Args:
        function: at the top of a module. Results travel as torch files, so tensors in them are on the CPU.
        result_types: classes of this package that the results are made of. Nothing else that could run code is read.

    Raises:
        WorkerFailed: what the first of them to fail raised; the others are ended.
    """
    # torch and transformers take seconds to import: a server does so once, and every process is a fork of it.
    multiprocessing.set_forkserver_preload(["laver_megatron.convert.verification.forward", "transformers"])
    with tempfile.TemporaryDirectory(prefix="laver-workers-") as name:
        directory = Path(name)
        processes = start_processes(
            _work,
            (num_workers, directory, function, arguments),
            num_workers,
            join=False,
            daemon=True,
            start_method="forkserver",
        )
        try:
            while not processes.join():
                pass
        except ProcessExitedException as error:
            # A rank that lost its partner says less than the one that failed for a reason of its own, and earlier.
            reports = sorted(directory.glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
            if error.exit_code == -signal.SIGKILL:  # the others' words are that their partner has gone
                reports = []
            ended = f"processes ended without a word (rank: exit code {{{error.error_index}: {error.exit_code}}})"
            raise WorkerFailed(reports[0].read_text() if reports else f"{ended}; is there enough memory?") from None
        finally:
            for process in processes.processes:
                process.terminate()
                process.join()
        with torch.serialization.safe_globals(list(result_types)):
            return [torch.load(directory / f"result-{rank}.pt", weights_only=True) for rank in range(num_workers)]


def _work(rank: int, num_workers: int, directory: Path, function: Callable[..., Any], arguments: tuple) -> None:
    worker = Worker(rank, num_workers, directory / "store")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_workers))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max((os.cpu_count() or 1) // num_workers, 1))
    try:
        torch.save(function(worker, *arguments), directory / f"result-{rank}.pt")
    except BaseException as error:  # Megatron's checkpoint errors are no Exceptions
        expected = isinstance(error, (ValueError, OSError))
        report = f"{type(error).__name__}: {error}" if expected else traceback.format_exc()
        (directory / f"error-{rank}").write_text(report)
        os._exit(1)  # leaving a process group in order would wait for the others
