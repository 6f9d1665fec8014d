"""With which status a process ends, and ending with one.

0 done; FAILED while running (a disk, a worker process, a check that did not hold); WRONG_USE (a flag, a file or a
number that the user gave); INTERRUPTED by Ctrl-C or by another signal that asks a program to end; HUNG: the watchdog
ended a run that stood still, and the same command goes on from its last checkpoint.
"""

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

FAILED, WRONG_USE, HUNG, INTERRUPTED = 1, 2, 75, 130


def end(message: str, status: int) -> NoReturn:
    """Ends the process with one line on stderr."""
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(status)


def explain(reason: str) -> None:
    """Leaves where torchrun's agent, if there is one, reads it why this process is about to end."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):  # the reason is printed as well
            Path(file).write_text(json.dumps({"message": reason, "timestamp": int(time.time())}))
