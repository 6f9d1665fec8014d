"""With which status a process ends, and ending with one.

0 done; FAILED while running (a disk, a worker process, a check that did not hold); WRONG_USE (a flag, a file or a
number that the user gave); INTERRUPTED by Ctrl-C or by another signal that asks a program to end; HUNG: the watchdog
ended a run that stood still, and the same command goes on from its last checkpoint.
"""

import sys
from typing import NoReturn

FAILED, WRONG_USE, HUNG, INTERRUPTED = 1, 2, 75, 130
OF_ANOTHER_RANK = "it happened on another rank"  # a note to an error that all ranks raise together


def end(message: str, status: int) -> NoReturn:
    """Ends the process with one line on stderr."""
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(status)
