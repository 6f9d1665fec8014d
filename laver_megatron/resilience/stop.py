"""Stopping in order and saving by the clock: what the ranks agree on at the end of each step.

A stop is asked for by a signal to any rank (`signals.py`), by --exit-duration-minutes or by the end of SLURM's job. The
ranks then save, leave the marker PREEMPTED in the run directory and end with status 0.
"""

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from laver_megatron.config.fields import Config
from laver_megatron.resilience.signals import STARTED, asked, torchrun_warning
from laver_megatron.run_log.tolerance import tolerating
from laver_megatron.runtime.files import write_json

DONE, PREEMPTED = "DONE", "PREEMPTED"

# Reasons for a stop beyond the numbers of signals.
_DURATION, _SLURM = 1001, 1002
# Kept before SLURM's limit, beside the time of a step and of two saves as they were seen.
_SLURM_RESERVE_SECONDS = 120.0


@dataclass(frozen=True)
class Agreement:
    """Of all ranks, at the end of a step. stop: why the run stops here, in words; None: it goes on."""

    stop: str | None
    save: bool


class StepEnd:
    """The ends of steps. Collective, like its method `agree`."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._run_dir = Path(config.run.run_dir)
        # Not over NCCL, which would make every step wait for the device once more.
        self._group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        self._last_save = self._last_end = time.monotonic()
        self._step_seconds = self._save_seconds = 0.0
        self._stop: str | None = None
        if dist.get_rank() == 0:
            for marker in (DONE, PREEMPTED):
                (self._run_dir / marker).unlink(missing_ok=True)
            if warning := torchrun_warning():
                print(warning, file=sys.stderr, flush=True)

    def agree(self, iteration: int) -> Agreement:
        """What is to be done after this iteration: the clock of rank 0 counts, and the signals of all."""
        now = time.monotonic()
        self._step_seconds, self._last_end = now - self._last_end, now
        wish = torch.tensor([asked() or self._time_is_up(), int(self._save_is_due(now))], device="cpu")
        dist.all_reduce(wish, op=dist.ReduceOp.MAX, group=self._group)
        reason, save = wish.tolist()
        self._stop = self._in_words(reason, iteration)
        return Agreement(self._stop, bool(save))

    def saved(self) -> None:
        """A checkpoint was written since `agree`."""
        now = time.monotonic()
        self._save_seconds = max(self._save_seconds, now - self._last_end)
        self._last_save = self._last_end = now

    def mark(self, iteration: int) -> None:
        """Leaves DONE or PREEMPTED in the run directory, once its last checkpoint is published."""
        if dist.get_rank() == 0:
            is_done = iteration >= self._config.training.train_iters
            content = {"iteration": iteration, "reason": "finished" if is_done else self._stop, "time": time.time()}
            name = DONE if is_done else PREEMPTED
            with tolerating(name, self._run_dir, "the checkpoint says how far the run is"):
                write_json(self._run_dir / name, content)

    def _save_is_due(self, now: float) -> bool:
        minutes = self._config.reliability.save_interval_minutes
        return dist.get_rank() == 0 and minutes is not None and now - self._last_save >= 60 * minutes

    def _time_is_up(self) -> int:
        if dist.get_rank() != 0:
            return 0
        minutes, now = self._config.reliability.exit_duration_minutes, time.time()
        if minutes is not None and now >= _started() + 60 * minutes:
            return _DURATION
        limit = os.environ.get("SLURM_JOB_END_TIME", "")
        needed = _SLURM_RESERVE_SECONDS + self._step_seconds + 2 * self._save_seconds
        return _SLURM if limit.isdecimal() and now + needed >= int(limit) else 0

    def _in_words(self, reason: int, iteration: int) -> str | None:
        interval = self._config.training.exit_interval
        if reason == _DURATION:
            return f"after --exit-duration-minutes {self._config.reliability.exit_duration_minutes:g}"
        if reason == _SLURM:
            return "before SLURM's time limit"
        if reason:
            return f"as {signal.Signals(reason).name} asks"
        is_due = interval is not None and iteration % interval == 0
        return f"a multiple of --exit-interval {interval}" if is_due else None


def _started() -> float:
    return float(os.environ.get(STARTED) or psutil.Process().create_time())
