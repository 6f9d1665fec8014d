"""Where the supervisors of several nodes meet before each start, and agree on which nodes take part.

Node 0's supervisor listens on the port below MASTER_PORT. The others ask it every second, over a new connection with a
time limit each time, so that a cut network holds up nobody. Once all nodes of the last start have asked, node 0 answers
with a plan. After --node-timeout-minutes the run ends, or with --elastic goes on with the nodes that are left; a lost
node that asks again is part of the next start. If node 0 is lost, the others cannot go on, and end after that time.

While ranks run, both sides notice when the ranks of another node have ended, and end their own where these do not end
by themselves. A supervisor that ends the run for good tells the others, which end with the same status.
"""

import socket
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from threading import Event, Thread
from typing import Any

from laver_megatron.resilience.agent import StopRequest
from laver_megatron.resilience.endings import UNKNOWN
from laver_megatron.resilience.questions import ask
from laver_megatron.runtime.exit_status import FAILED, INTERRUPTED, WRONG_USE

FAREWELL_SECONDS = 20.0  # to tell the others that the run is over
_ASK_SECONDS = 1.0
_LOOK_SECONDS = 5.0
_PATIENCE_SECONDS = 30.0  # for ranks to end by themselves, with what their watchdogs have to say
_LONGEST_SAYING = 2000
_LONGEST_QUOTE = 60  # characters of what a stranger answers


class Over(Exception):
    """The run is over on all nodes.

    Attributes:
        status: with which this node's supervisor ends.
        is_known: the others need not be told.
    """

    def __init__(self, message: str, status: int, *, is_known: bool = False) -> None:
        super().__init__(message)
        self.status, self.is_known = status, is_known


@dataclass(frozen=True)
class Plan:
    """A start.

    Attributes:
        nodes: those that take part, in the order of their ranks.
        said: by host, how their last start ended.
        blamed: the host of those on which it failed first.
    """

    attempt: int
    nodes: tuple[int, ...]
    said: dict[str, str] = field(default_factory=dict)
    blamed: str = field(default_factory=socket.gethostname)


class Alone:
    """The supervisor of a run that has one node, or is started once: it meets nobody."""

    def __init__(self, node: int = 0, num_nodes: int = 1) -> None:
        self.node, self.plan = node, Plan(-1, tuple(range(num_nodes)))

    def meet(self, said: str, request: StopRequest, distance: int = UNKNOWN) -> Plan:
        """Waits for the others. said, distance: how the ranks of this node have ended (`Ending`).

        Raises:
            Over: the run does not go on.
        """
        self.plan = self._agree(said, request, distance)
        return self.plan

    def leave(self, message: str, status: int) -> None:
        """Tells the others that this node ends the run."""

    @contextmanager
    def watching(self, request: StopRequest) -> Iterator[None]:
        """Ranks that run in this block are ended if they outlive those of another node for long."""
        closing = Event()
        thread = Thread(target=self._watch, args=(request, closing), name="nodes", daemon=True)
        thread.start()
        try:
            yield
        finally:
            closing.set()
            thread.join()
            request.at_once = request.at_once and bool(request.signal)

    def _watch(self, request: StopRequest, closing: Event) -> None:
        ended = 0.0
        while not closing.wait(_LOOK_SECONDS):
            if not self._others_have_ended():
                ended = 0.0
                continue
            ended = ended or time.monotonic()
            if time.monotonic() - ended > _PATIENCE_SECONDS and not request.at_once:
                print(
                    f"{socket.gethostname()}: ending the ranks of this node, as those of others have ended",
                    file=sys.stderr,
                    flush=True,
                )
                request.at_once = True

    def _agree(self, said: str, request: StopRequest, distance: int) -> Plan:
        return Plan(self.plan.attempt + 1, self.plan.nodes)

    def _others_have_ended(self) -> bool:
        return False


class Guest(Alone):
    """The supervisor of any node but 0. address: where node 0 listens; limit_seconds: how long to wait for it."""

    def __init__(self, node: int, num_nodes: int, address: tuple[str, int], limit_seconds: float) -> None:
        super().__init__(node, num_nodes)
        self._address, self._limit_seconds = address, limit_seconds
        self._over: Over | None = None  # node 0 ends soon after it has said so
        self._launcher = uuid.uuid4().hex

    def leave(self, message: str, status: int) -> None:
        deadline = time.monotonic() + FAREWELL_SECONDS
        with suppress(Over):
            while status not in (0, INTERRUPTED) and not self._ask(message, "", status) and time.monotonic() < deadline:
                time.sleep(_ASK_SECONDS)

    def _agree(self, said: str, request: StopRequest, distance: int) -> Plan:
        question, reached = uuid.uuid4().hex, time.monotonic()
        while True:
            answer = {} if self._over else self._ask(said, question, distance=distance)
            if self._over:
                raise self._over
            if answer:
                reached = time.monotonic()
                if question in answer["ids"]:
                    return Plan(answer["attempt"], tuple(answer["nodes"]), answer["said"], answer["blamed"])
            elif time.monotonic() - reached > self._limit_seconds:
                raise Over(
                    f"node 0 ({self._address[0]}, MASTER_ADDR) is lost or cut off: not reached for "
                    f"{self._limit_seconds / 60:g} minutes (--node-timeout-minutes). The nodes meet there: start the "
                    "run again on nodes that are left",
                    FAILED,
                    is_known=True,
                )
            pause(_ASK_SECONDS, request)

    def _others_have_ended(self) -> bool:
        try:
            answer = self._ask("", "")
        except Over:  # a stranger; node 0 may have its port again when it is needed
            return False
        return bool(answer) and answer.get("attempt") != self.plan.attempt

    def _ask(self, said: str, question: str, status: int = 0, distance: int = UNKNOWN) -> dict[str, Any]:
        """Node 0's answer; empty if there is none.

        Raises:
            Over: another program answers.
        """
        host, said = socket.gethostname(), said[:_LONGEST_SAYING]
        message = {"node": self.node, "host": host, "said": said, "id": question, "status": status}
        message |= {"distance": distance, "launcher": self._launcher}
        try:
            answer = ask(self._address, message)
            if "over" in answer:
                said, status = str(answer["over"]), int(answer["status"])
                self._over = Over(f"node 0 has ended the run: {said}", status, is_known=True)
            elif answer and not isinstance(answer.get("ids"), list):
                raise ValueError(answer)
        except (ValueError, TypeError, KeyError) as error:
            raise Over(
                f"{self._address[0]} port {self._address[1]}, one below MASTER_PORT, where the nodes meet, is used by "
                f"another program, which answers {str(error)[:_LONGEST_QUOTE]!r}; choose another MASTER_PORT on all "
                "nodes",
                WRONG_USE,
                is_known=True,
            ) from error
        return answer


def pause(seconds: float, request: StopRequest) -> None:
    """Raises Over when a stop is asked for."""
    request.sleep(seconds)
    if request.signal:
        raise Over("", INTERRUPTED)
