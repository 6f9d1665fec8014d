"""Why the ranks of a node ended: what each rank leaves in words before it ends, and which of them failed first.

A fault on one rank ends all others, mostly before torchrun's agent sees it: their peer went away, or the watchdog ended
them. So every rank writes its reason at the moment it knows it, and the launcher looks at the reasons of all ranks
rather than at the exit that the agent happened to see first.
"""

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laver_megatron.runtime.exit_status import FAILED, HUNG, INTERRUPTED, OF_ANOTHER_RANK, WRONG_USE
from laver_megatron.runtime.files import read_small, write_text

_FILE = "TORCHELASTIC_ERROR_FILE"  # environment: where torchrun's agent looks for this rank's reason
_MOST_BYTES = 1 << 16
_LONGEST_REASON = 1000  # characters: some errors quote whole tensors
_GLOO = re.compile(r"(/gloo/transport/\S+\] .*?(?:\]:\d+)?)\. .*", re.DOTALL)
_OF_GLOO = "/gloo/transport/"  # the file that its errors name: not all of them have advice
# torch's types for a connection to another rank, or to the store, that has failed.
_PEER_ERRORS = ("DistBackendError", "DistNetworkError", "DistStoreError")
_TYPES = {"rank": int, "status": int, "message": str, "time": float, "is_follow_up": bool}  # as in Reason
_writing = threading.Lock()

# How directly an ending says why the run failed. A process that a signal killed had no time to write a reason.
MISTAKE, KILLED, OWN_REASON, ABORTED, NO_REASON, PEER_LOST, TOLD_TO_STOP, UNKNOWN = range(8)


@dataclass(frozen=True)
class Reason:
    """Why a rank ends. time: when it knew; is_follow_up: whether only because another rank has gone."""

    rank: int
    status: int
    message: str
    time: float
    is_follow_up: bool = False


@dataclass(frozen=True)
class Ending:
    """How the ranks of this node ended.

    Attributes:
        status: with which the launcher would end: 0 if they ended in order.
        rank, exit_code: of the rank that failed first; a negative code is a signal's. None: all ended in order, or the
            agent has ended.
        reason: what that rank has said of it.
        distance: how far this is from the cause, `MISTAKE` to `UNKNOWN`.
    """

    status: int
    rank: int | None = None
    exit_code: int | None = None
    reason: str = ""
    distance: int = UNKNOWN

    def __str__(self) -> str:
        if self.exit_code is None:
            return "torchrun's agent failed"
        if self.exit_code >= 0:
            because = f"{', as' if self.exit_code == HUNG else ':'} {self.reason}" if self.reason else ""
            return f"rank {self.rank} ended with exit status {self.exit_code}{because}"
        memory = " (out of memory?)" if -self.exit_code == signal.SIGKILL else ""
        return f"rank {self.rank} was killed by {_signal_name(-self.exit_code)}{memory}"


def explain(message: str, status: int, *, is_follow_up: bool = False) -> None:
    """Leaves why this process is about to end where the launcher and torchrun's agent, if there are any, read it. The
    first reason stands."""
    path = Path(os.environ.get(_FILE, os.devnull))
    with _writing, suppress(OSError):  # the reason is printed as well
        if path.parent.is_dir() and not path.exists():
            content = {
                "message": message[:_LONGEST_REASON],
                "timestamp": int(time.time()),  # torchrun's
                "time": time.time(),
                "rank": int(os.environ.get("RANK", "0")),
                "status": status,
                "is_follow_up": is_follow_up,
            }
            write_text(path, json.dumps(content))


def explain_error(error: BaseException) -> None:
    """`explain` for an error that ends this process."""
    status = FAILED
    if isinstance(error, SystemExit):
        if not error.code:
            return
        status = error.code if isinstance(error.code, int) else FAILED
    is_peers = type(error).__name__ in _PEER_ERRORS or _OF_GLOO in str(error)
    is_follow_up = is_peers or OF_ANOTHER_RANK in getattr(error, "__notes__", ())
    explain(f"{type(error).__name__}: {without_advice(str(error))}", status, is_follow_up=is_follow_up)


def without_advice(text: str) -> str:
    """An error of Gloo without its advice, which is for programmers, and its emoji; any other as it is."""
    return _GLOO.sub(r"\1", text)


def reasons_in(log_dir: Path) -> dict[int, Reason]:
    """What ranks have left below torchrun's --log-dir, by rank."""
    return {reason.rank: reason for path in log_dir.glob("*/attempt_*/*/error.json") for reason in _read(path)}


def _read(path: Path) -> Iterator[Reason]:
    # torch's own, of a program that is none of ours, or anything: a user's code runs in the ranks as well.
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        said: dict[str, Any] = json.loads(read_small(path, _MOST_BYTES))
        reason = Reason(*(said[name] for name in _TYPES))
        if all(type(said[name]) is kind for name, kind in _TYPES.items()) and reason.status > 0:
            yield reason


def first_ending(agent_status: int, exits: Sequence[tuple[int, int]], reasons: Mapping[int, Reason]) -> Ending:
    """The ending of the rank that failed first.

    Args:
        exits: (rank, exit code) of the ranks that the agent saw fail, without those that it killed itself.
        reasons: by rank.
    """
    if agent_status == 0:
        return Ending(0)
    exit_of = {rank: code for rank, code in exits if rank not in reasons}
    known = [_of_exit(rank, code) for rank, code in exit_of.items()]
    known += [_of_reason(reason) for reason in sorted(reasons.values(), key=lambda reason: reason.time)]
    if not known:
        return Ending(agent_status if agent_status > 0 else FAILED)
    return min(known, key=lambda ending: ending.distance)  # of several, the earliest


def _of_exit(rank: int, code: int) -> Ending:
    distances = {
        WRONG_USE: MISTAKE,
        -signal.SIGABRT: ABORTED,  # by torch, when a collective fails
        -signal.SIGTERM: TOLD_TO_STOP,  # by the agent
        INTERRUPTED: TOLD_TO_STOP,
    }
    return Ending(max(code, FAILED), rank, code, "", distances.get(code, KILLED if code < 0 else NO_REASON))


def _of_reason(reason: Reason) -> Ending:
    distance = MISTAKE if reason.status == WRONG_USE else PEER_LOST if reason.is_follow_up else OWN_REASON
    return Ending(reason.status, reason.rank, reason.status, reason.message, distance)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
