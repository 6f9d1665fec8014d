"""Worker processes: a function over many tasks with progress, and a pool that serves one object for long.

Workers are forked, so that indexes and tokenizers are shared and not copied. If one is killed there is an error, never
a hang.
"""

import ctypes
import gc
import os
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from threading import Thread
from typing import Any, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")
Function = Callable[[Task, Callable[[int], object]], Result]

_POLL_SECONDS = 0.2
_WATCH_SECONDS = 2.0
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGEST_MMAP_THRESHOLD, _KEPT_BYTES = 32 << 20, 256 << 20
_worker: Any = None  # of a worker process: what it is there for


def map_in_processes(
    function: Function[Task, Result],
    tasks: Sequence[Task],
    num_workers: int,
    on_progress: Callable[[int], object],
) -> list[Result]:
    """[function(task, progress) for task in tasks], in up to `num_workers` processes.

    progress: to be called with how far the function has come since it called it last; what all workers report
    is handed to `on_progress` here. Workers are forked: the function may be a closure, tasks and results are pickled.

    Raises:
        ValueError: a worker was killed. Whatever the function raises.
    """
    if num_workers <= 1 or len(tasks) <= 1:
        return [function(task, on_progress) for task in tasks]
    context = get_context("fork")
    counter = context.Value("q", 0)
    initial = function, counter, os.getpid()
    reported = 0
    try:
        with ProcessPoolExecutor(min(num_workers, len(tasks)), context, _start_worker, initial) as pool:
            futures = [pool.submit(_work, task) for task in tasks]
            waiting = set(futures)
            while waiting:
                done, waiting = wait(waiting, _POLL_SECONDS, FIRST_COMPLETED)
                total = counter.value
                on_progress(total - reported)
                reported = total
                for future in done:
                    if future.exception() is not None:
                        pool.shutdown(wait=False, cancel_futures=True)
                        raise future.exception()  # type: ignore[misc]
            return [future.result() for future in futures]
    except BrokenProcessPool as error:
        raise ValueError(
            f"one of {num_workers} worker processes was killed (out of memory?); try again with fewer"
        ) from error


def end_with_parent(parent: int) -> None:
    """Has this process end when its parent is gone, by whatever signal; called in a worker."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        os._exit(1)

    Thread(target=watch, daemon=True).start()


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
    or until this process is gone. A signal to end that does not come from this process (Ctrl-C, a cluster's SIGTERM
    to everything) is this process's to answer: it may want to read once more and save.
    """

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
    """Has glibc keep what is freed instead of handing it back to the system: a picture's arrays are of megabytes, and
    getting their pages anew for each costs a fifth of the time of decoding and resizing it."""
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
