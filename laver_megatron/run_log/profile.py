"""`--profile`: where the time of a few iterations goes, by part of the step, as a table and as a Chrome trace.

The parts are ranges of `record_function`: functions that are decorated (`BatchSource.at`, `micro_batch_losses`,
`update_student`, `TeacherAverage.update`), and, by hooks while the window is open, modules of the stage. What the
backward pass does counts to the part whose forward pass it belongs to, which autograd's sequence numbers tell;
recomputation counts there, too. Everything is of one process: the times of its host on a CPU, of its kernels on CUDA.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from laver_megatron.run_log.tolerance import tolerating
from laver_megatron.runtime.files import write_text
from laver_megatron.runtime.terminal import say

if TYPE_CHECKING:
    from laver_megatron.model.laver import LaverStage
    from laver_megatron.trainer import Trainer

STEP = "step"
PARTS = ("data wait", "encoder", "student", "teacher", "heads", "losses", "optimizer", "EMA")
COLLECTIVES, PIPELINE, OTHER, IDLE = "communication", "pipeline, bubbles", "other", "device idle"
_BACKWARD = "autograd::engine::evaluate_function"
_POINT_TO_POINT = ("send", "recv", "sendrecv")


class ProfileWindow:
    """Profiles the iterations after `profile_step_start`, up to and with `profile_step_end` unless it is closed
    earlier, on the first rank of each pipeline stage; on others, and without `--profile`, it does nothing."""

    def __init__(self, trainer: Trainer) -> None:
        run = trainer.config.run
        is_first = parallel_state.get_tensor_model_parallel_rank() == parallel_state.get_data_parallel_rank() == 0
        done = trainer.progress.iteration
        asked = range(run.profile_step_start, run.profile_step_end) if run.profile and is_first else range(0)
        self.iterations = range(max(asked.start, done), asked.stop)
        if asked and not self.iterations:
            say(
                f"the profiled iterations ({asked.start + 1} to {asked.stop}) have passed, as the run is at iteration "
                f"{done}: nothing is profiled; raise --profile-step-start and --profile-step-end"
            )
        self.stages, self.device = trainer.stages, trainer.backend.device
        self.directory = Path(run.run_dir) / "profile"
        self.name = f"stage-{parallel_state.get_pipeline_model_parallel_rank()}"
        self.num_profiled = 0
        self._profiler: profile | None = None
        self._handles: list[Any] = []

    @contextmanager
    def step(self, iteration: int) -> Iterator[None]:
        """Around one step. iteration: completed before it."""
        if iteration not in self.iterations:
            yield
            return
        if self._profiler is None:
            self._open()
        with record_function(STEP):
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        self.num_profiled += 1
        if iteration + 1 == self.iterations.stop:
            self.close()

    def _open(self) -> None:
        # The profiler's library writes a line at its start and end at a level that only the next one silences.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        self._handles = [handle for stage in self.stages for handle in mark_parts(stage)]
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=1_000_000)
        self._profiler = profile(activities=activities, acc_events=True)
        self._profiler.start()

    def close(self) -> None:
        """Ends the window for good and writes its files; safe where it never began or has ended."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        first, self.iterations = self.iterations.start + 1, range(0)
        profiler.stop()
        for handle in self._handles:
            handle.remove()
        with tolerating("the profile", self.directory, "what is not written of it is lost"):
            self._write(profiler, first)

    def _write(self, profiler: profile, first: int) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.directory / f"{self.name}.trace.json.gz"))
        if self.device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(self.directory / f"{self.name}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        table = format_table(
            times_of_parts(profiler.events(), on_cuda=self.device.type == "cuda"),
            self.num_profiled,
            f"{self.name}, iterations {first} to {first + self.num_profiled - 1}",
        )
        write_text(self.directory / f"{self.name}.md", table)
        noun = "iteration" if self.num_profiled == 1 else "iterations"
        say(f"profiled {self.num_profiled} {noun}: {self.directory / self.name}.md and .trace.json.gz")


def mark_parts(stage: LaverStage) -> list[Any]:
    """Hooks that put the modules of a stage into ranges; handles to remove them by."""
    modules: dict[str, Sequence[nn.Module | None]] = {
        "encoder": (stage.encoder, getattr(stage, "connector", None)),
        "student": (stage.decoder,),
        "heads": (getattr(stage, "output_layer", None), getattr(stage, "vision_head", None)),
    }
    if stage.teacher is not None:
        modules["teacher"] = (stage.teacher.decoder, getattr(stage.teacher, "vision_head", None))
    return [
        handle for part, found in modules.items() for module in filter(None, found) for handle in _mark(module, part)
    ]


def _mark(module: nn.Module, part: str) -> list[Any]:
    open_ranges: list[record_function] = []

    def enter(*_: Any) -> None:
        open_ranges.append(record_function(part))
        open_ranges[-1].__enter__()

    def leave(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


def times_of_parts(events: Iterable[Any], *, on_cuda: bool) -> dict[str, float]:
    """Microseconds by part, all profiled steps together; `STEP` is their sum.

    On a CPU the parts are the host's own time, and waiting for a collective or a neighbour stage counts there and not
    to the part that waits. On CUDA they are the kernels' durations: those that run at once count each, and what is left
    of the step is idle.
    """
    events = [event for event in events if event.device_type == DeviceType.CPU]
    part_of = _Parts(events)
    times = dict.fromkeys((*PARTS, COLLECTIVES, PIPELINE, OTHER), 0.0)
    total = sum(event.time_range.elapsed_us() for event in events if event.name == STEP)
    if on_cuda:
        for event in events:
            for kernel in event.kernels:
                if kernel.name != STEP and kernel.name not in PARTS:  # the ranges' own shadows on the device
                    times[_communication(kernel.name, "nccl") or part_of(event)] += kernel.duration
        return {**times, IDLE: max(total - sum(times.values()), 0.0), STEP: total}
    waits = {
        kind: _union(
            (event.time_range.start, event.time_range.end)
            for event in events
            if _communication(event.name, "gloo:") == kind
        )
        for kind in (COLLECTIVES, PIPELINE)
    }
    for event in events:
        if event.is_async or not _within_a_step(event):
            continue
        own = _own_intervals(event)
        seconds = sum(end - start for start, end in own)
        kind = _communication(event.name, "c10d::")
        if kind is None and _is_range(event):
            # The host does nothing in a range's own time but run Python or wait.
            for waiting, intervals in waits.items():
                waited = _overlap(own, intervals)
                times[waiting] += waited
                seconds -= waited
        times[kind or part_of(event)] += seconds
    return {**times, STEP: total}


class _Parts:
    """The part an event belongs to: that of the innermost range around it, or around its forward pass."""

    def __init__(self, events: Iterable[Any]) -> None:
        self._known: dict[int, str] = {}
        # The last operation that began at a sequence number made the node that has it.
        self._forward = {
            event.sequence_nr: event for event in events if event.sequence_nr >= 0 and not _is_backward(event)
        }

    def __call__(self, event: Any) -> str:
        path = []
        found = OTHER
        while event is not None:
            if event.id in self._known:
                found = self._known[event.id]
                break
            path.append(event.id)
            if event.name in PARTS:
                found = event.name
                break
            forward = self._forward.get(event.sequence_nr) if _is_backward(event) else None
            event = event.cpu_parent if forward is None else forward
        self._known.update(dict.fromkeys(path, found))
        return found


def _is_backward(event: Any) -> bool:
    return event.name.startswith(_BACKWARD) or event.scope == 1


def _is_range(event: Any) -> bool:
    return event.name == STEP or event.name in PARTS


def _within_a_step(event: Any) -> bool:
    while event is not None:
        if event.name == STEP:
            return True
        event = event.cpu_parent
    return False


def _communication(name: str, prefix: str) -> str | None:
    """COLLECTIVES or PIPELINE, by the name of an event of a communication library; None of others."""
    if not name.startswith(prefix):
        return None
    operation = name.lower()
    return PIPELINE if any(word in operation for word in _POINT_TO_POINT) else COLLECTIVES


Interval = tuple[float, float]


def _own_intervals(event: Any) -> list[Interval]:
    """The time of an event without that of the events in it."""
    intervals, start = [], event.time_range.start
    for child in sorted(event.cpu_children, key=lambda child: child.time_range.start):
        if child.is_async:
            continue
        if child.time_range.start > start:
            intervals.append((start, child.time_range.start))
        start = max(start, child.time_range.end)
    if event.time_range.end > start:
        intervals.append((start, event.time_range.end))
    return intervals


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    joined: list[Interval] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _overlap(intervals: Iterable[Interval], disjoint: Sequence[Interval]) -> float:
    """Length that intervals share with sorted disjoint ones."""
    shared = 0.0
    for start, end in intervals:
        place = bisect_left(disjoint, start, key=lambda interval: interval[1])
        while place < len(disjoint) and disjoint[place][0] < end:
            shared += max(min(end, disjoint[place][1]) - max(start, disjoint[place][0]), 0.0)
            place += 1
    return shared


def format_table(times: dict[str, float], num_steps: int, title: str) -> str:
    """Markdown: milliseconds a step and shares of it."""
    total = times[STEP]
    lines = [f"# Profile: {title}", "", "| part | ms a step | share |", "|---|---|---|"]
    lines += [f"| {part} | {us / 1e3 / num_steps:.3f} | {us / total:.1%} |" for part, us in times.items()]
    return "\n".join(lines) + "\n"
