"""What a run does when it is told to end: one line of the whole run that says what is kept and how to go on."""

import os
import signal
import sys
from pathlib import Path
from threading import Timer
from types import FrameType
from typing import NoReturn

from laver_megatron.checkpoint.directory import latest_checkpoint
from laver_megatron.runtime.exit_status import INTERRUPTED

LAUNCHED = "LAVER_LAUNCHED"  # environment: the launcher, which outlives the ranks, says the line
_CLOSING_SECONDS = 15.0  # torchrun waits for 30


def heed_signals(run_dir: str) -> None:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt on rank 0, which closes its log. The other ranks end at once and
    silently: rank 0 may wait for one of them, and sees that it is gone."""
    owner, is_rank_zero = os.getpid(), os.environ.get("RANK", "0") == "0"

    def interrupt(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # forked from it
            os._exit(128 + number)
        # A KeyboardInterrupt can get lost, in a destructor or while the process forks.
        timer = Timer(_CLOSING_SECONDS, end_interrupted, (run_dir,))
        timer.daemon = True
        timer.start()
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt if is_rank_zero else signal.SIG_DFL)


def end_interrupted(run_dir: str) -> NoReturn:
    """Ends this process at once: leaving the process group in order would wait for ranks that are gone."""
    if LAUNCHED not in os.environ:
        print(interruption_message(run_dir), file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(INTERRUPTED)


def interruption_message(run_dir: str) -> str:
    """The last checkpoint of a run directory, and how to resume."""
    checkpoint = latest_checkpoint(Path(run_dir) / "checkpoints")
    if checkpoint is None:
        return f"interrupted; {run_dir} has no checkpoint yet: the same command starts over"
    return f"interrupted; {checkpoint} is kept: the same command resumes from it"
