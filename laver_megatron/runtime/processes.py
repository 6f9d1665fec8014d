"""Worker processes: a function over many tasks with progress, and a pool that serves one object for long.

Workers are mostly forked, so that indexes and tokenizers are shared and not copied. If one is killed, there is an error
and never a hang.
"""

import ctypes
import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import active_children, get_context
from threading import Thread
from typing import Any, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")
Function = Callable[[Task, Callable[[int], object]], Result]

_POLL_SECONDS = 0.2
_WATCH_SECONDS = 2.0
_TASKS_AHEAD = 2  # for each worker, so that none waits for the tasks to be listed
_PR_SET_PDEATHSIG = 1  # of prctl.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGEST_MMAP_THRESHOLD, _KEPT_BYTES = 32 << 20, 256 << 20
_worker: Any = None  # of a worker process: what it is there for


def map_in_processes(
    function: Function[Task, Result],
    tasks: Sequence[Task],
    num_workers: int,
    on_progress: Callable[[int], object],
) -> list[Result]:
    """[function(task, progress) for task in tasks], in up to `num_workers` processes; see `each_in_processes`."""
    num_workers = min(num_workers, len(tasks))
    results = dict(each_in_processes(function, tasks, 0 if num_workers <= 1 else num_workers, on_progress))
    return [results[number] for number in range(len(tasks))]


def each_in_processes(
    function: Function[Task, Result],
    tasks: Iterable[Task],
    num_workers: int,
    on_progress: Callable[[int], object],
    *,
    method: str = "fork",
    remedy: str = "try again with fewer",
) -> Iterator[tuple[int, Result]]:
    """Calls `function(task, progress)` for every task, in worker processes.

    Args:
        function: calls `progress` with how far it has come since its last call. With "fork" it may be a closure, with
            "spawn" it is pickled; tasks and results always are.
        tasks: taken as workers become free.
        num_workers: processes; 0: the caller does the work.
        on_progress: is called here with what all workers report.
        remedy: what the user is told to do if a worker was killed.

    Returns:
        (number of the task, result), in the order in which they are done.

    Raises:
        ValueError: a worker was killed. Whatever the function raises.
    """
    numbered = enumerate(tasks)
    if num_workers == 0:
        yield from ((number, function(task, on_progress)) for number, task in numbered)
        return
    context = get_context(method)
    counter = context.Value("q", 0)
    number_of: dict[Future, int] = {}
    reported = 0
    try:
        with ProcessPoolExecutor(num_workers, context, _start_worker, (function, counter, os.getpid())) as pool:
            try:
                while True:
                    for number, task in islice(numbered, _TASKS_AHEAD * num_workers - len(number_of)):
                        number_of[pool.submit(_work, task)] = number
                    if not number_of:
                        return
                    done, _ = wait(number_of, _POLL_SECONDS, FIRST_COMPLETED)
                    total = counter.value
                    on_progress(total - reported)
                    reported = total
                    for future in done:
                        yield number_of.pop(future), future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    except BrokenProcessPool as error:
        raise ValueError(f"one of {num_workers} worker processes was killed (out of memory?); {remedy}") from error


def end_with_parent(parent: int) -> None:
    """Ends this process when its parent is gone, by whatever signal; called in a worker."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def signal_at_parents_end(number: int) -> None:
    """Has the kernel send this process a signal when the thread that started it ends. Linux alone can do it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def _start_worker(function: Function, counter: Any, parent: int) -> None:
    global _worker
    _worker = function, counter
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers


def _work(task: Any) -> Any:
    function, counter = _worker

    def progress(amount: int) -> None:
        with counter.get_lock():
            counter.value += amount

    return function(task, progress)


class WorkerPool:
    """Worker processes for one object's method: `submit(*arguments)` calls `work(*arguments)` in one of them.

    The workers are forked at once, so `work` may be bound to anything without being pickled. They live until `close`,
    or until this process is gone. A termination signal from elsewhere (Ctrl-C, a cluster's SIGTERM to all processes) is
    for this process to handle: it may want to read once more and save."""

    def __init__(self, work: Callable[..., Any], num_workers: int) -> None:
        before = set(active_children())
        self._pool = ProcessPoolExecutor(num_workers, get_context("fork"), _start_reader, (work, os.getpid()))
        self._pool.submit(os.getpid).result()  # forks all of them now, before this process has more threads
        self._workers = set(active_children()) - before

    def submit(self, *arguments: Any) -> Future:
        """Calls `work` in a worker."""
        try:
            return self._pool.submit(_read, *arguments)
        except BrokenProcessPool as error:
            raise self._killed() from error

    def result(self, future: Future) -> Any:
        """What the call gave, waiting for it.

        Raises:
            ValueError: a worker was killed. Whatever `work` raises.
        """
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise self._killed() from error

    def close(self) -> None:
        """Ends the workers; what is under way is dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _killed(self) -> ValueError:
        self._pool.shutdown(wait=True, cancel_futures=True)
        exits = {worker.exitcode or 0 for worker in self._workers}
        signals = sorted(signal.Signals(-code).name for code in exits if code < 0) or ["it is not known why"]
        return ValueError(
            f"a reader process died ({', '.join(signals)}); SIGKILL and SIGBUS mostly mean that memory ran out: use "
            "fewer with --num-workers, or give the job more"
        )


def _start_reader(work: Callable[..., Any], parent: int) -> None:
    global _worker
    import torch

    _worker = work
    torch.set_num_threads(1)
    _keep_memory()
    gc.freeze()  # what was inherited is never collected: that would copy its pages
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # not on macOS, where SIGTERM simply ends the worker
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    Thread(target=_end_with, args=(parent,), daemon=True).start()


def _keep_memory() -> None:
    """Makes glibc keep freed memory instead of returning it to the system: a picture's arrays take megabytes, and
    getting fresh pages for each costs a fifth of the time of decoding and resizing it."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def _end_with(parent: int) -> None:
    """Ends this process when its parent says so, or is gone."""
    while os.getppid() == parent:
        if not hasattr(signal, "sigtimedwait"):
            time.sleep(_WATCH_SECONDS)
            continue
        received = signal.sigtimedwait({signal.SIGTERM}, _WATCH_SECONDS)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)


def _read(*arguments: Any) -> Any:
    return _worker(*arguments)
