"""One pool of worker processes for all distributed tests of a session.

Starting Python with torch and Megatron-Core takes seconds, joining a process group some tens of
milliseconds: so the processes stay, and every job joins and leaves groups of its own.

    pool.run(function, layout, *arguments)  ->  [result of rank 0, result of rank 1, ...]

A job function is a module-level function `function(layout, *arguments)`. It runs on the first
`layout.world_size` processes inside a Gloo process group; building Megatron's groups in it is its own affair
(`laver_megatron.train.setup`, or `join` below). Arguments and results travel as pickles.
"""

import datetime
import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

NUM_WORKERS = 4
# Whole jobs take a few seconds; a collective that waits this long waits for a rank that will never come.
JOB_SECONDS = 240
# After the first failure the other ranks may still fail by themselves; later they are taken to hang.
GRACE_SECONDS = 5


@dataclass(frozen=True)
class Layout:
    """How a job divides its processes. vpp_layers: layers of a virtual stage, None without interleaving;
    first_layers, last_layers: layers of the first and of the last stage of an uneven split."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    sp: bool = False
    vpp_layers: int | None = None
    first_layers: int | None = None
    last_layers: int | None = None

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of `Config` that say the same."""
        return {
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.pp,
            "sequence_parallel": self.sp,
            "num_layers_per_virtual_pipeline_stage": self.vpp_layers,
            "decoder_first_pipeline_num_layers": self.first_layers,
            "decoder_last_pipeline_num_layers": self.last_layers,
        }

    def __str__(self) -> str:
        interleaved = "" if self.vpp_layers is None else f"-VPP of {self.vpp_layers}"
        ends = (("first", self.first_layers), ("last", self.last_layers))
        uneven = "".join(f"-{end} {layers}" for end, layers in ends if layers is not None)
        return f"TP{self.tp}{'+SP' if self.sp else ''}-PP{self.pp}{uneven}{interleaved}-DP{self.dp}"


class Pool:
    """The worker processes. A job that fails in one rank raises AssertionError with that rank's traceback; if
    other ranks are then stuck, the processes are replaced."""

    def __init__(self, num_workers: int = NUM_WORKERS) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="laver-test-pool-"))
        self._num_workers, self._num_jobs = num_workers, 0
        self._processes: list[Any] = []
        self._connections: list[Connection] = []

    def run(self, function: Callable, layout: Layout, *arguments: Any, timeout: float = JOB_SECONDS) -> list[Any]:
        """Results of all ranks of `layout`, in order."""
        if not all(process.is_alive() for process in self._processes):
            self._stop()  # one has died since the last job
        if not self._processes:
            self._start()
        assert layout.world_size <= self._num_workers, f"{layout} needs more than {self._num_workers} processes"
        self._num_jobs += 1
        store = self._directory / f"store-{self._num_jobs}"
        job = (f"{function.__module__}:{function.__qualname__}", layout, arguments, str(store))
        for connection in self._connections[: layout.world_size]:
            connection.send_bytes(pickle.dumps(job))
        answers = self._collect(layout.world_size, timeout)
        failures = {rank: answer[1] for rank, answer in answers.items() if not answer[0]}
        stuck = sorted(set(range(layout.world_size)) - answers.keys())
        has_died = any(not process.is_alive() for process in self._processes)
        if failures or stuck:
            stacks = self._stop() if stuck or has_died else ""
            # Ranks that lost their partner say less than the one that failed for a reason of its own.
            worst = sorted(failures.items(), key=lambda item: "gloo" in item[1].rsplit("\n", 2)[-2].lower())
            text = "\n".join(f"--- rank {rank} of {layout}\n{text}" for rank, text in worst[:2])
            raise AssertionError(f"{job[0]}: ranks {sorted(failures)} failed, {stuck} are stuck\n{text}{stacks}")
        return [answers[rank][1] for rank in range(layout.world_size)]

    def close(self) -> None:
        self._stop()
        for file in self._directory.iterdir():
            file.unlink()
        self._directory.rmdir()

    def _start(self) -> None:
        # One thread each, also in the libraries that read this once at import.
        os.environ["OMP_NUM_THREADS"] = "1"
        os.environ["HF_HUB_OFFLINE"] = "1"
        # The server imports the heavy packages once and forks the workers, also those that replace stuck ones.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.distributed.preload"])
        for number in range(self._num_workers):
            ours, theirs = context.Pipe()
            # Not daemonic: Megatron's checkpoint writer starts processes of its own.
            process = context.Process(target=_serve, args=(number, theirs, str(self._stacks(number))))
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def _stacks(self, number: int) -> Path:
        return self._directory / f"stack-{number}"

    def _collect(self, world_size: int, timeout: float) -> dict[int, tuple[bool, Any]]:
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout
        waiting = {connection: rank for rank, connection in enumerate(self._connections[:world_size])}
        while waiting and (left := deadline - time.monotonic()) > 0:
            for connection in wait(list(waiting), left):
                rank = waiting.pop(connection)
                try:
                    answers[rank] = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionError):
                    self._processes[rank].join(10)
                    answers[rank] = (False, f"the process died: exit code {self._processes[rank].exitcode}\n\n")
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return answers

    def _stop(self) -> str:
        """Ends all processes; returns where the stuck ones stood. They start anew with the next job."""
        for connection in self._connections:
            connection.close()  # a worker that waits for a job leaves by itself
        for process in self._processes:
            process.join(2)
        stuck = [number for number, process in enumerate(self._processes) if process.is_alive()]
        for number in stuck:
            os.kill(self._processes[number].pid, signal.SIGUSR1)
        time.sleep(0.2 if stuck else 0.0)
        for number in stuck:
            # With the helpers of Megatron's checkpoint writer, which would outlive it.
            os.killpg(self._processes[number].pid, signal.SIGKILL)
            self._processes[number].join()
        self._processes, self._connections = [], []
        return "".join(f"--- stack of worker {number}\n{self._stacks(number).read_text()}" for number in stuck)


def _serve(number: int, connection: Connection, stacks: str) -> None:
    """A worker's life: jobs from the connection until it closes."""
    os.setpgid(0, 0)
    faulthandler.register(signal.SIGUSR1, file=open(stacks, "w"), all_threads=False)  # noqa: SIM115
    import torch

    from laver_megatron.run_log.metrics import RunLog
    from laver_megatron.runtime.backend import use_backend
    from tests.checkpoint_writer import prepare_checkpoint_writer

    RunLog._draw = lambda *_: None  # a second of matplotlib at every run's end; unit/run_log/test_curves.py draws
    torch.set_num_threads(1)
    use_backend()
    prepare_checkpoint_writer()
    while True:
        try:
            path, layout, arguments, store = pickle.loads(connection.recv_bytes())
        except EOFError:
            sys.exit()
        connection.send_bytes(pickle.dumps(_run_job(number, path, layout, arguments, store)))


def _run_job(rank: int, path: str, layout: Layout, arguments: tuple, store: str) -> tuple[bool, Any]:
    import torch.distributed as dist

    from laver_megatron.runtime.backend import shut_down_parallelism

    try:
        module, name = path.split(":")
        function = getattr(import_module(module), name)
        # A trainer is full of cycles that keep the last job's groups alive, and every group has three threads.
        gc.collect()
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=layout.world_size,
            timeout=datetime.timedelta(seconds=JOB_SECONDS),
        )
        result = function(layout, *arguments)
        dist.barrier()
        return True, result
    except BaseException:  # Megatron's checkpoint errors are no Exceptions
        return False, traceback.format_exc() + "\n"
    finally:
        shut_down_parallelism()


def join(layout: Layout, seed: int = 1, num_layers: int | None = None) -> None:
    """Megatron's parallel groups for jobs that do not go through `train.setup`."""
    from laver_megatron.runtime.backend import initialise_parallelism

    virtual = None
    if layout.vpp_layers is not None:
        assert num_layers is not None
        virtual = num_layers // layout.pp // layout.vpp_layers
    initialise_parallelism(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=virtual,
        timeout_minutes=2,
        seed=seed,
    )
