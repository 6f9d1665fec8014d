"""Ends a run that stands still, and says which rank it waited for and where.

Every rank has two threads beside its training, and rank 0 a third, which writes `status.json`:

    the first tells the store of the process group every few seconds where the main thread is, and reads whether there
    is a verdict; on three ranks it reads all heartbeats as well
    the second needs no network: it hears what the first has read, judges (`judge.py`), and if there is a verdict writes
    the stacks of all its threads and ends the process

One rank gives the verdict and announces it when the others have written their stacks. Where the store is gone (its host
is down, the network is cut) each rank ends by itself. The threads are daemons and never keep a process from exiting.

Only rank 0 knows that no other run has the run directory (`run_lock.py`). The others leave it alone until they have
heard of rank 0.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread, Timer

import torch.distributed as dist

from laver_megatron.config.fields import Config
from laver_megatron.resilience import status
from laver_megatron.resilience.endings import explain, explain_error, without_advice
from laver_megatron.resilience.heartbeat import Beat, Link
from laver_megatron.resilience.judge import Judge, numbers
from laver_megatron.resilience.limits import beat_interval, phase_limits
from laver_megatron.resilience.nccl import write_flight_record
from laver_megatron.resilience.phases import STEP, now
from laver_megatron.resilience.stacks import DIRECTORY, StackFile, main_thread_place
from laver_megatron.resilience.stragglers import Sampler, Stragglers
from laver_megatron.runtime.exit_status import HUNG

_ENDING_SECONDS = 30.0  # after a verdict a rank ends, whatever the others do
_ANSWER_SECONDS = 10.0
_LATE_BEATS = 4  # a thread that wakes so many intervals late was stopped
_TIMER_SHARE = 0.9  # of the limit for silence: then the stacks are written without this process's threads


@contextmanager
def watched(config: Config) -> Iterator[None]:
    """The process is watched, and its status written, while the block runs."""
    watch = Watch(config)
    try:
        yield
    except KeyboardInterrupt:
        watch.close(status.INTERRUPTED)
        raise
    except BaseException as error:
        explain_error(error)
        text = f"{type(error).__name__}: {without_advice(str(error))}"
        watch.close(status.FAILED, f"rank {watch.rank} on {socket.gethostname()}: {text}")
        raise
    watch.close(status.FINISHED if now().iteration >= config.training.train_iters else status.STOPPED)


class Watch:
    """The threads of one rank."""

    def __init__(self, config: Config) -> None:
        self.rank, self._config, self._run_dir = int(os.environ.get("RANK", "0")), config, Path(config.run.run_dir)
        self._world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.limits = phase_limits(config)
        self.interval = beat_interval(self.limits)
        self._silence = self.limits[STEP]
        self._judge = Judge(self.limits, self.interval)
        self._link: Link | None = None
        self._sampler = Sampler() if config.reliability.straggler_percent is not None else None
        self._stragglers = Stragglers(config.reliability.straggler_percent)
        self._stacks = StackFile(self._run_dir, self.rank)
        self._closing, self._count = Event(), 0
        self._heard: dict[int, Beat] | None = None  # by the first thread, for the second
        self._verdict: str | None = None
        self._exchanged = time.monotonic()
        self._asked = 0.0  # when the first thread began to ask, the last time that it was answered
        tasks: list[Callable[[], None]] = [self._exchange, self._watch]
        if self.rank == 0:
            self._stacks.open()
            status.open_accounts(self._run_dir)
            tasks.append(self._write_status)
        self._threads = [Thread(target=task, name=f"laver{task.__name__}", daemon=True) for task in tasks]
        for thread in self._threads:
            thread.start()

    def close(self, ending: str, message: str | None = None) -> None:
        """Ends the watch and writes how the run ended. Raises nothing: it would hide what the run ended by."""
        self._closing.set()
        for thread in self._threads:
            thread.join(1.0)
        self._stacks.close()
        if self.rank == 0:
            self._put_status(ending, message)
            status.close_accounts()
        elif ending == status.FAILED and self._stacks.is_open:
            status.fail(self._run_dir, message)

    # --- the first thread: the store -----------------------------------------------------------------------

    def _exchange(self) -> None:
        while not self._closing.wait(self.interval):
            try:
                if self._link is None:
                    if not dist.is_initialized() or self._world_size == 1:
                        self._heard = {self.rank: self._beat()}
                        self._exchanged = self._asked = time.monotonic()
                        continue
                    self._link = Link()
                self._link.publish(self._beat())
                self._open_stacks()
                if self._is_monitor():
                    self._heard = self._link.beats()
                asked = time.monotonic()
                self._verdict = self._link.verdict()
                self._asked, self._exchanged = asked, time.monotonic()
            except (RuntimeError, ValueError):  # the store is gone: the second thread sees how long
                continue
        with suppress(RuntimeError):
            if self._link is not None:
                self._link.publish(self._beat(ended=True))

    def _open_stacks(self) -> None:
        """Now that rank 0 has begun, and so holds the run directory. Where that fails they go to stderr."""
        if not self._stacks.is_open and self._link is not None and self._link.has_begun(0):
            with suppress(OSError):
                self._stacks.open()

    def _beat(self, ended: bool = False) -> Beat:
        self._count += 1
        moment, place = now(), main_thread_place()
        busy, looks = self._sampler.counts if self._sampler else (0, 0)
        return Beat(
            socket.gethostname(), os.getpid(), self._count, moment.phase, moment.iteration, moment.number,
            place.text, place.waits, busy, looks, _pipeline_stage(), ended,
        )  # fmt: skip

    def _is_monitor(self) -> bool:
        """Three of them, far from each other: one may be the rank that stopped, and thousands would be too many."""
        return self.rank in (0, self._world_size // 2, self._world_size - 1)

    # --- the second thread: the verdict --------------------------------------------------------------------

    def _watch(self) -> None:
        tick = self.interval if self._sampler is None else min(self.interval, self._sampler.interval)
        last = woke = time.monotonic()
        while not self._closing.wait(tick):
            if self._sampler is not None:
                self._sampler.look()
            time_now = time.monotonic()
            if time_now - last < self.interval:
                continue
            if time_now - last > _LATE_BEATS * self.interval:
                self._judge.forgive(time_now)
                self._exchanged = woke = time_now
            last = time_now
            self._arm(woke)
            self._look_for_fault(time_now)

    def _arm(self, woke: float) -> None:
        """Puts off the timer for this rank's stacks. What it has written while this thread did not run stays until the
        store, asked since the thread `woke`, knows no verdict: a rank that is ended for its silence may run again for a
        moment."""
        with suppress(OSError):  # of a file system that answers no more; it must not end this thread
            if self._asked > woke and self._verdict is None:
                self._stacks.clear()
        if self._silence is not None:
            self._stacks.arm(max(_TIMER_SHARE * self._silence, 2 * self.interval))

    def _look_for_fault(self, time_now: float) -> None:
        if self._verdict is not None:
            self._end(self._verdict, announces=False)
        cut_off = time_now - self._exchanged
        if self._silence is not None and cut_off > self._silence:
            self._link = None
            self._end(
                f"rank {self.rank} has not reached the store of the process group for {cut_off:.0f} s, which host "
                f"{os.environ.get('MASTER_ADDR', 'localhost')} (MASTER_ADDR) keeps: that host or the network is down, "
                "or the process that keeps it has stopped",
                announces=os.environ.get("LOCAL_RANK", "0") == "0",
            )
        heard, self._heard = self._heard, None
        if heard is None:
            if cut_off > _LATE_BEATS * self.interval:
                self._judge.forgive(time_now)  # what was not heard says nothing of the others
            return
        self._judge.hear(heard, time_now)
        if self.rank == 0 and (line := self._stragglers.line(heard)):
            with suppress(OSError):  # a terminal that has gone must not end this thread
                print(line, file=sys.stderr, flush=True)
        verdict = self._judge.verdict(time_now)
        if verdict is not None and not self._closing.is_set():
            text = str(verdict)
            try:
                standing, is_mine = (text, True) if self._link is None else self._link.accuse(text)
            except RuntimeError:  # the store is gone, too
                self._link, standing, is_mine = None, text, True
            self._end(standing, announces=is_mine)

    def _end(self, verdict: str, *, announces: bool) -> None:
        """Writes what is known and ends the process; never returns."""
        last_resort = Timer(_ENDING_SECONDS, os._exit, (HUNG,))
        last_resort.daemon = True
        last_resort.start()
        self._closing.set()
        try:
            explain(verdict, HUNG)
            if self.rank == 0:  # or the last of its words would be that it runs
                self._threads[-1].join(self.interval)
            self._stacks.write(verdict)
            with suppress(Exception):  # an extra: without it the rest is still said
                write_flight_record(self._run_dir / DIRECTORY, self.rank)
            if self._link is not None:
                self._link.answer(self._stacks.path.name)
            if announces:
                self._announce(verdict)
            while self._link is not None and not self._link.is_released():
                time.sleep(0.05)
        finally:
            os._exit(HUNG)

    def _announce(self, verdict: str) -> None:
        """Waits for the others' stacks, then says it all, once."""
        missing = [rank for rank in range(self._world_size) if rank != self.rank]
        patient_until = time.monotonic() + _ANSWER_SECONDS + 2 * self.interval
        expected = set(self._judge.living(time.monotonic()))
        while self._link is not None and expected.intersection(missing) and time.monotonic() < patient_until:
            missing = [rank for rank in missing if self._link.answer_of(rank) is None]
            time.sleep(0.05)
        faults = self._run_dir / DIRECTORY
        message = f"the run hangs: {verdict}. Stacks are in {faults}"
        if self._link is None and self._world_size > 1:
            message += f" (this rank's: {self._stacks.path.name})"
        elif missing:
            by_timer = [rank for rank in missing if any(file.stat().st_size for file in self._files_of(rank))]
            without = [rank for rank in missing if rank not in by_timer]
            message += f"; rank {numbers(without)} wrote none: stopped or gone" if without else ""
        status.change_status(
            self._run_dir, state=status.HUNG, message=verdict, hung_since=time.time(), updated=time.time()
        )
        os.write(2, f"laver: {message}. Ending with exit status {HUNG}\n".encode())
        if self._link is not None:
            self._link.release()

    def _files_of(self, rank: int) -> list[Path]:
        """The stack files that a rank has opened in this attempt: some seconds earlier or later than this one."""
        files = (self._run_dir / DIRECTORY).glob(f"rank_{rank:04d}_*.txt")
        return [file for file in files if file.stat().st_mtime > self._stacks.opened - _ENDING_SECONDS]

    # --- the third thread, on rank 0: the status -----------------------------------------------------------

    def _write_status(self) -> None:
        self._put_status()
        while not self._closing.wait(self.interval):
            self._put_status()

    def _put_status(self, ending: str | None = None, message: str | None = None) -> None:
        """Unless another rank has written that the run failed. A fault here ends no run: a full disk, say."""
        if status.is_as_before(self._config.training.train_iters):
            return
        with suppress(Exception):
            content = status.status_of(self._config, self.interval, ending, message)
            known = status.read_status(self._run_dir) or {}
            if known.get("started") == content["started"] and known["state"] in (status.FAILED, status.HUNG):
                return
            status.write_status(self._run_dir, content)


def _pipeline_stage() -> int:
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return 0
    return parallel_state.get_pipeline_model_parallel_rank()
