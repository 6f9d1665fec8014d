"""Signals that ask a rank to stop in order: SIGTERM, SIGUSR1, SIGUSR2, the first Ctrl-C, and what the kernel sends when
torchrun's agent ends. The rank notes them; `stop.py` has all ranks agree at the end of a step. The second Ctrl-C ends a
rank at once.
"""

import os
import signal
import sys
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import NoReturn

from laver_megatron.checkpoint.choice import next_choice
from laver_megatron.resilience.endings import explain
from laver_megatron.runtime.exit_status import FAILED, INTERRUPTED
from laver_megatron.runtime.processes import signal_at_parents_end

LAUNCHED = "LAVER_LAUNCHED"  # environment: pid of the launcher's agent, which is the ranks' parent
STARTED = "LAVER_STARTED"  # environment: when the launcher began, in seconds since 1970
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
CTRL_C = "stopping after this step and a checkpoint; Ctrl-C again ends at once, without the checkpoint"
TORCHRUN_PATIENCE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # torchrun's: seconds from SIGTERM to SIGKILL

_asked = 0  # the first signal that asked this process to stop
_is_heeding = _is_over = False


def heed_signals(run_dir: str) -> None:
    """From now on the signals of STOP_SIGNALS, and the end of torchrun's agent, ask for a stop in order. Another call
    changes nothing."""
    global _asked, _is_heeding
    if _is_heeding:
        return
    _is_heeding, parent = True, os.getppid()
    # Python runs handlers between two lines of Python; a rank that waits for another may be in the same line for long.
    # The numbers come through a pipe to a thread of their own.
    reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    os.set_blocking(reading, True)
    for number in STOP_SIGNALS:
        signal.signal(number, _let_pass)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    # What is forked from a rank, such as a writer of its checkpoint, is done when its work is.
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    Thread(target=_read, args=(reading, parent, run_dir), name="signals", daemon=True).start()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        signal_at_parents_end(signal.SIGTERM)
        if os.environ.get(LAUNCHED, str(parent)) != str(os.getppid()):  # it ended just before
            _asked = signal.SIGTERM


def _let_pass(number: int, frame: FrameType | None) -> None:
    pass


def _read(pipe: int, parent: int, run_dir: str) -> None:
    global _asked
    interrupts = 0
    while number := os.read(pipe, 1)[0]:
        if number not in STOP_SIGNALS or _is_over:
            continue
        if _is_left_over(parent):
            explain("another rank of this node has ended", FAILED, is_follow_up=True)
            os._exit(FAILED)
        interrupts += number == signal.SIGINT
        # torchrun answers a second Ctrl-C by ending, which reaches a rank as another signal.
        if interrupts > 1 or (interrupts and os.getppid() != parent):
            _end_interrupted(run_dir)
        if number == signal.SIGINT and _speaks():
            print(CTRL_C, file=sys.stderr, flush=True)
        _asked = _asked or number


def asked() -> int:
    """The number of the first signal that asked this process to stop; 0 without any."""
    return _asked


def ignore_signals() -> None:
    """The run is over: nothing is left to be stopped."""
    global _is_over
    _is_over = True


def _is_left_over(agent: int) -> bool:
    """Whether a rank of this node is gone, after which torchrun sends SIGTERM to the others and SIGKILL half a minute
    later: no step will end any more."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    import psutil  # here: a launcher that is asked for help has it not; a rank has imported it long before

    try:
        ranks = psutil.Process(agent).children()
        alive = sum(rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    except psutil.Error:
        return False
    # Asked last: the signal of an agent's end comes while some of its threads, and so its children, are still there.
    return alive < int(os.environ["LOCAL_WORLD_SIZE"]) and os.getppid() == agent


def _speaks() -> bool:
    return LAUNCHED not in os.environ and os.environ.get("RANK", "0") == "0"


def _end_interrupted(run_dir: str) -> NoReturn:
    """Ends this process at once: leaving the process group in order would wait for ranks that are gone."""
    if _speaks():
        print(interruption_message(run_dir), file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(INTERRUPTED)


def interruption_message(run_dir: str) -> str:
    """The checkpoint from which the same command resumes, and what is wrong with newer ones."""
    choice = next_choice(Path(run_dir))
    wrong = f" ({'; '.join(choice.passed_over)})" if choice.passed_over else ""
    if choice.checkpoint is not None:
        return f"interrupted; {choice.checkpoint} is kept: the same command resumes from it{wrong}"
    if wrong:
        return f"interrupted; {run_dir} has no checkpoint that is whole{wrong}"
    return f"interrupted; {run_dir} has no checkpoint yet: the same command starts over"


def torchrun_warning() -> str:
    """That torchrun, started by hand, kills a save that takes long; empty where it does not."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or LAUNCHED in os.environ or TORCHRUN_PATIENCE in os.environ:
        return ""
    return (
        f"after SIGTERM torchrun kills its processes within 30 s, be the checkpoint written or not: set "
        f"{TORCHRUN_PATIENCE} to more seconds than a step and a save take, or start with `laver train`, which waits"
    )
