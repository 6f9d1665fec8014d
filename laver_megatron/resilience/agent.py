"""torchrun's agent of this node as a child of the launcher, which can tell its ranks to stop without ending the agent.

The agent itself answers a signal by ending its ranks within half a minute, and its own end looks like a fault. So the
launcher keeps signals for itself and passes them on to the ranks, which stop in order; the agent then sees them done.
Whichever of launcher, agent and ranks is killed, the kernel tells those below it to stop.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType

import psutil

from laver_megatron.resilience.endings import Ending, first_ending, reasons_in
from laver_megatron.resilience.signals import CTRL_C, LAUNCHED, STOP_SIGNALS, TORCHRUN_PATIENCE
from laver_megatron.runtime.exit_status import FAILED, INTERRUPTED
from laver_megatron.runtime.processes import signal_at_parents_end

_POLL_SECONDS = 0.2
_PATIENCE_SECONDS = 24 * 3600  # for a save, if the launcher is gone and the agent has to end the ranks
# The agent kills a rank that has not ended 30 s after the first failure: later exits are its doing.
_OWN_EXIT_SECONDS = 25
_LEFT_SECONDS = 600.0  # for ranks whose agent is gone: a step and a save
_LOGS = "laver_ranks_"  # directories of torchrun's files, below the system's for temporary ones


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
    with _log_directory() as log_dir:
        agent_status, exits = _run_agent(["--log-dir", str(log_dir), *words], num_ranks, request)
        return first_ending(agent_status, exits, reasons_in(log_dir))


@contextlib.contextmanager
def _log_directory() -> Iterator[Path]:
    """A directory for torchrun's files, locked while this launcher or its agent lives. Those of killed ones go."""
    for left in Path(tempfile.gettempdir()).glob(f"{_LOGS}*"):
        with contextlib.suppress(OSError), _locked(left):  # which fails where it is in use
            if left.stat().st_uid == os.getuid():
                shutil.rmtree(left, ignore_errors=True)
    with contextlib.ExitStack() as stack:
        new = Path(tempfile.mkdtemp(prefix=f".{_LOGS}"))
        with contextlib.suppress(OSError):  # without locks nobody takes it for one that is left
            stack.enter_context(_locked(new))
        path = new.rename(new.with_name(new.name[1:]))
        stack.callback(shutil.rmtree, path, ignore_errors=True)
        yield path


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _run_agent(words: list[str], num_ranks: int, request: StopRequest) -> tuple[int, list[tuple[int, int]]]:
    """(the agent's exit status, what `_be_agent` leaves)."""
    ours, theirs = get_context("fork").Pipe(duplex=False)
    agent = get_context("fork").Process(target=_be_agent, args=(words, theirs))
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
        return agent.exitcode, ours.recv()
    except EOFError:
        return agent.exitcode, []


def _be_agent(words: list[str], results: Connection) -> None:
    """The agent's process. Leaves (rank, exit code) of the ranks of this node that failed by themselves."""
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

    # Which warn of every signal they pass on, and of reasons that are ours.
    for name in ("agent.server.api", "multiprocessing.api", "multiprocessing.errors.error_handler"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    if os.getppid() != launcher:
        sys.exit(INTERRUPTED)
    try:
        torchrun.main(words)
        results.send([])
    except ChildFailedError as error:
        latest = min(failure.timestamp for failure in error.failures.values()) + _OWN_EXIT_SECONDS
        results.send([(rank, it.exitcode) for rank, it in error.failures.items() if it.timestamp <= latest])
        sys.exit(FAILED)
    except SignalException:
        sys.exit(INTERRUPTED)


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
