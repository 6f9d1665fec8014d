"""The launcher as supervisor: it runs the ranks of this node, and starts them again after a fault.

Not after mistakes of the user (status 2) and not after an orderly stop, whoever asked for it. It waits between starts,
twice as long after each fault without progress, and gives up after --restarts of them, or when several in a row have
come at the same iteration. run_dir/restarts.jsonl has one line for each.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from laver_megatron.checkpoint.choice import Choice, next_choice
from laver_megatron.checkpoint.directory import iteration_of
from laver_megatron.config.fields import Config
from laver_megatron.resilience import status
from laver_megatron.resilience.agent import StopRequest
from laver_megatron.resilience.endings import Ending
from laver_megatron.resilience.rendezvous import Alone, Over, Plan, pause
from laver_megatron.resilience.signals import interruption_message
from laver_megatron.run_log.records import JsonLines, json_line
from laver_megatron.run_log.run_summary import RESTARTS_FILE
from laver_megatron.runtime.exit_status import HUNG, INTERRUPTED, WRONG_USE, end
from laver_megatron.runtime.terminal import printable

_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 1.0, 60.0
_TAIL_BYTES = 1 << 16  # of metrics.jsonl: more than a line


@dataclass
class _Faults:
    """Faults so far: how many, and how many in a row at `iteration`."""

    total: int = 0
    in_a_row: int = 0
    iteration: int = -1

    def add(self, iteration: int) -> None:
        self.total += 1
        self.in_a_row = self.in_a_row + 1 if iteration == self.iteration else 1
        self.iteration = iteration

    @property
    def wait_seconds(self) -> float:
        return min(_FIRST_WAIT_SECONDS * 2 ** (self.in_a_row - 1), _LONGEST_WAIT_SECONDS)


def supervise(run_ranks: Callable[[StopRequest, Plan], Ending], config: Config, rendezvous: Alone) -> None:
    """Runs the ranks to the end of the run; ends the process with one line if that is not reached.

    Args:
        run_ranks: runs them once.
        rendezvous: with the other nodes; node 0 writes restarts.jsonl.
    """
    request, restarts = StopRequest(), JsonLines(Path(config.run.run_dir) / RESTARTS_FILE)
    try:
        _run_to_the_end(run_ranks, config, rendezvous, request, restarts)
    except Over as over:
        _write_rest(restarts)
        message = interruption_message(config.run.run_dir) if over.status == INTERRUPTED else printable(str(over))
        if not over.is_known:
            rendezvous.leave(message, over.status)
        end(message, over.status)
    _write_rest(restarts)
    rendezvous.leave("the run has ended in order", 0)


def _run_to_the_end(
    run_ranks: Callable[[StopRequest, Plan], Ending],
    config: Config,
    rendezvous: Alone,
    request: StopRequest,
    restarts: JsonLines,
) -> None:
    run_dir, limits, faults = Path(config.run.run_dir), config.reliability, _Faults()
    plan = rendezvous.meet("", request)
    while True:
        began = time.time()
        with rendezvous.watching(request):
            ending = run_ranks(request, plan)
        if ending.status == 0:
            return
        if request.signal or ending.status == INTERRUPTED:
            raise Over("", INTERRUPTED)
        iteration = _last_iteration(run_dir) + 1
        faults.add(iteration)
        problem = ""
        if ending.status != WRONG_USE and limits.restarts:
            if faults.total > limits.restarts:
                problem = f" after {limits.restarts} restarts (--restarts)"
            elif faults.in_a_row >= limits.restart_same_step_limit:
                problem = f" after {faults.in_a_row} faults in a row at iteration {iteration}"
        # Rank 0 says itself what is wrong, unless the directory is another run's.
        if (ending.status != WRONG_USE or ending.rank) and rendezvous.node == 0:
            status.set_cause(run_dir, str(ending), is_hang=ending.status == HUNG, since=began)
        if ending.status == WRONG_USE or not limits.restarts or problem:
            raise Over(f"{ending}: the run is over{problem}", ending.status)
        failed, choice = time.time(), next_choice(run_dir, strict=limits.strict_load)
        start = _iteration(choice)
        _say(
            f"{ending} at iteration {iteration}; starting again from iteration {start} in "
            f"{faults.wait_seconds:.0f} s (restart {faults.total} of {limits.restarts})"
        )
        for problem in choice.passed_over:
            _say(f"WARNING: {f'going back to {choice.checkpoint}' if choice.checkpoint else 'cannot start'}: {problem}")
        pause(faults.wait_seconds, request)
        plan = rendezvous.meet(str(ending), request, ending.distance)
        for host, said in plan.said.items():
            if host != socket.gethostname():
                _say(f"{host} says: {said}")
        if rendezvous.node == 0:
            lost = time.time() - max(began, min(_written(choice), failed))
            _record(restarts, faults.total, iteration, start, ending, plan, lost)


def _say(message: str) -> None:
    print(f"{socket.gethostname()}: {printable(message)}", file=sys.stderr, flush=True)


def _record(
    restarts: JsonLines, attempt: int, iteration: int, start: int, ending: Ending, plan: Plan, lost_seconds: float
) -> None:
    """Writes down the fault, with the cause on the node where the run failed first. A disk that is full, which may be
    that cause, does not end the run.

    lost_seconds: since the checkpoint that the run goes on from, or since the start that failed if that is later.
    """
    is_ours = plan.blamed == socket.gethostname()
    line = {
        "time": time.time(),
        "attempt": attempt,
        "iteration": iteration,
        "from_iteration": start,
        "cause": str(ending) if is_ours else plan.said[plan.blamed],
        "exit_status": ending.exit_code if is_ours else None,
        "rank": ending.rank if is_ours else None,
        "host": plan.blamed,
        "nodes": list(plan.nodes),
        "said": plan.said,
        "lost_seconds": round(lost_seconds, 3),
    }
    try:
        restarts.path.parent.mkdir(parents=True, exist_ok=True)
        restarts.append(json_line(line))
    except OSError as error:
        _say(f"WARNING: {restarts.path}: {error.strerror}: this restart is written down when that is possible")


def _write_rest(restarts: JsonLines) -> None:
    """What could not be written before."""
    with suppress(OSError):
        if restarts.num_waiting:
            restarts.flush()


def _last_iteration(run_dir: Path) -> int:
    """The last that metrics.jsonl tells of; 0 without any."""
    try:
        with (run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]  # the last may be torn
        return int(json.loads(lines[-1])["iteration"])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return _iteration(next_choice(run_dir))


def _iteration(choice: Choice) -> int:
    return 0 if choice.checkpoint is None else iteration_of(choice.checkpoint)


def _written(choice: Choice) -> float:
    """When the checkpoint was written; 0 if there is none any more."""
    try:
        return 0.0 if choice.checkpoint is None else choice.checkpoint.stat().st_mtime
    except OSError:
        return 0.0
