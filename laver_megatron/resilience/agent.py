"""torchrun's agent of this node as a child of the launcher, which can tell its ranks to stop without ending the agent.

The agent itself answers a signal by ending its ranks within half a minute, and its own end looks like a fault. So the
launcher keeps signals for itself and passes them on to the ranks, which stop in order; the agent then sees them done.
Whichever of launcher, agent and ranks is killed, the kernel tells those below it to stop.
"""

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from types import FrameType

import psutil

from laver_megatron.resilience.signals import CTRL_C, LAUNCHED, STOP_SIGNALS, TORCHRUN_PATIENCE
from laver_megatron.runtime.exit_status import FAILED, INTERRUPTED, WRONG_USE
from laver_megatron.runtime.processes import signal_at_parents_end

_POLL_SECONDS = 0.2
_PATIENCE_SECONDS = 24 * 3600  # for a save, if the launcher is gone and the agent has to end the ranks
# Exit codes by how little they say; those that are not here, such as SIGKILL, have 0.
_SAYS_LESS = {WRONG_USE: -1, FAILED: 1, -signal.SIGTERM: 2, INTERRUPTED: 3}
_LEFT_SECONDS = 600.0  # for ranks whose agent is gone: a step and a save


@dataclass(frozen=True)
class Ending:
    """How the ranks of this node ended.

    Attributes:
        status: with which the launcher would end: 0 if they ended in order.
        rank, exit_code: of the rank that says most of why; a negative code is a signal's. None: all ended in order, or
            the agent has ended.
        reason: what the watchdog of that rank has found, if it ended it.
    """

    status: int
    rank: int | None = None
    exit_code: int | None = None
    reason: str = ""

    def __str__(self) -> str:
        if self.exit_code is None:
            return "torchrun's agent failed"
        if self.exit_code >= 0:
            because = f", as {self.reason}" if self.reason else ""
            return f"rank {self.rank} ended with exit status {self.exit_code}{because}"
        memory = " (out of memory?)" if -self.exit_code == signal.SIGKILL else ""
        return f"rank {self.rank} ended by {signal.Signals(-self.exit_code).name}{memory}"


class StopRequest:
    """What signals have asked of the launcher. signal: the first one's number; at_once: Ctrl-C came twice."""

    def __init__(self) -> None:
        self.signal, self.at_once, self._interrupts = 0, False, 0
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def sleep(self, seconds: float) -> None:
        """Returns early when a stop is asked for."""
        deadline = time.monotonic() + seconds
        while not self.signal and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, _POLL_SECONDS))

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        self.at_once = self._interrupts > 1
        if number == signal.SIGINT and not self.signal:
            os.write(2, f"{CTRL_C}\n".encode())
        self.signal = self.signal or number


def run_agent(words: Sequence[str], num_ranks: int, request: StopRequest) -> Ending:
    """Runs the ranks of this node until all have ended. words: torchrun's arguments."""
    ours, theirs = get_context("fork").Pipe(duplex=False)
    agent = get_context("fork").Process(target=_be_agent, args=(list(words), theirs))
    agent.start()
    theirs.close()
    assert agent.pid is not None
    ranks: list[psutil.Process] = []
    told: set[int] = set()
    while agent.exitcode is None:
        agent.join(_POLL_SECONDS)
        if len(ranks) < num_ranks:
            ranks = _children(agent.pid)
        if request.at_once:
            _kill_groups(ranks)
            agent.kill()
        elif request.signal and len(ranks) == num_ranks:
            told |= _tell([rank for rank in ranks if rank.pid not in told], request.signal)
        elif request.signal and not ranks and agent.is_alive():
            agent.terminate()  # it waits for other nodes
    _await(ranks, request)
    _kill_groups(ranks)  # what a killed rank has left: readers, writers, a manager
    try:
        failures: list[tuple[int, int, str]] = ours.recv()
    except EOFError:
        failures = []
    return _ending(agent.exitcode, failures)


def _be_agent(words: list[str], results: Connection) -> None:
    """The agent's process. Leaves (rank, exit code, reason) of the ranks of this node that failed first."""
    os.setpgid(0, 0)  # Ctrl-C in the terminal reaches the launcher alone
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    launcher = os.getppid()
    signal_at_parents_end(signal.SIGTERM)
    os.environ[LAUNCHED] = str(os.getpid())
    os.environ.setdefault(TORCHRUN_PATIENCE, str(_PATIENCE_SECONDS))
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in ("agent.server.api", "multiprocessing.api"):  # which warn of every signal they pass on
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    if os.getppid() != launcher:
        sys.exit(INTERRUPTED)
    try:
        torchrun.main(words)
        results.send([])
    except ChildFailedError as error:
        # Later ones were ended by the agent, if need be by SIGKILL.
        first = min(failure.timestamp for failure in error.failures.values())
        found = [
            (rank, each.exitcode, each.message if os.path.isfile(each.error_file) else "")
            for rank, each in error.failures.items()
            if each.timestamp <= first + 2
        ]
        results.send(found)
        sys.exit(FAILED)
    except SignalException:
        sys.exit(INTERRUPTED)


def _ending(agent_status: int, failures: Sequence[tuple[int, int, str]]) -> Ending:
    """A rank that was killed, or that gave up for a reason of its own, says more than those that then missed it."""
    if agent_status == 0:
        return Ending(0)
    if not failures:
        return Ending(agent_status if agent_status > 0 else FAILED)
    rank, exit_code, reason = min(failures, key=lambda failure: _SAYS_LESS.get(failure[1], 0))
    return Ending(max(exit_code, FAILED), rank, exit_code, reason)


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children()
    except psutil.Error:
        return []


def _tell(ranks: Sequence[psutil.Process], number: int) -> set[int]:
    for rank in ranks:
        try:
            rank.send_signal(number)
        except psutil.NoSuchProcess:
            continue
    return {rank.pid for rank in ranks}


def _kill_groups(leaders: Sequence[psutil.Process]) -> None:
    """Ends processes, each of which leads a group, with all of their groups."""
    for leader in leaders:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader.pid, signal.SIGKILL)


def _await(ranks: Sequence[psutil.Process], request: StopRequest) -> None:
    """Waits for ranks that the agent has left, which were told by the kernel and save; kills them after long."""
    deadline = time.monotonic() + _LEFT_SECONDS
    while any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks):
        if request.at_once or time.monotonic() > deadline:
            _kill_groups(ranks)
        time.sleep(_POLL_SECONDS)
