"""The processes of a run under test, found in /proc by a token in their environment, whoever started them."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

TOKEN = "LAVER_FAULT_TEST"


@dataclass(frozen=True)
class Process:
    """A process of a run.

    rank: of the run; None for launchers, agents and supervisors.
    is_child: whether a rank started it (a loader's worker, a checkpoint's writer).
    """

    pid: int
    parent: int
    rank: int | None
    is_child: bool

    def send(self, number: signal.Signals) -> bool:
        """Whether it was still there."""
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True


def processes(token: str) -> list[Process]:
    """The living processes whose environment has TOKEN=token."""
    ranks: dict[int, tuple[int, str | None]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            state, parent = (entry / "stat").read_text().rsplit(") ", 1)[1].split()[:2]
        except OSError:  # it ended meanwhile, or belongs to somebody else
            continue
        if f"{TOKEN}={token}".encode() not in environment or state == "Z":
            continue
        values = dict(item.decode(errors="replace").split("=", 1) for item in environment if b"=" in item)
        ranks[int(entry.name)] = int(parent), values.get("RANK")
    return [
        Process(pid, parent, None if rank is None else int(rank), parent in ranks and ranks[parent][1] is not None)
        for pid, (parent, rank) in ranks.items()
    ]


def kill_all(token: str) -> list[int]:
    """Ends what is left of a run; returns the processes that it found."""
    found = processes(token)
    for process in found:
        process.send(signal.SIGKILL)
    return [process.pid for process in found]
