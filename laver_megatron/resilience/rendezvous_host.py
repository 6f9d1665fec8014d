"""Node 0's part of the rendezvous: it hears the other nodes and decides when, and with whom, the run starts."""

import socket
import time
from collections.abc import Callable
from typing import Any

from laver_megatron.resilience.agent import StopRequest
from laver_megatron.resilience.questions import answer_questions
from laver_megatron.resilience.rendezvous import FAREWELL_SECONDS, Alone, Over, Plan, pause
from laver_megatron.runtime.exit_status import FAILED, INTERRUPTED, WRONG_USE

_POLL_SECONDS = 0.2
_FRESH_SECONDS = 10.0  # a node that has not asked for so long is not there
_STRANGER_SECONDS = 30.0  # after which another launcher is told that there is one for its node already
_TEXTS = ("host", "said", "id", "launcher")


class Host(Alone):
    """The supervisor of node 0.

    Args:
        port: where it listens.
        limit_seconds: how long to wait for others.
        fits: whether the run can be started on so many nodes.
    """

    def __init__(self, num_nodes: int, port: int, limit_seconds: float, fits: Callable[[int], bool]) -> None:
        super().__init__(0, num_nodes)
        self._others, self._port, self._limit_seconds, self._fits = range(1, num_nodes), port, limit_seconds, fits
        self._asked: dict[int, tuple[dict[str, Any], float]] = {}  # by node: its last message, and when it came
        self._launchers: dict[int, tuple[str, str, float]] = {}  # by node: which one, on which host, and when it spoke
        self._strangers: dict[str, float] = {}  # other launchers for such a node, and when they came
        self._used: set[str] = set()  # questions that a plan has answered
        self._told: set[int] = set()  # who knows that the run is over
        self._answer: dict[str, Any] = {}  # to all who ask; empty before the first start

    def leave(self, message: str, status: int) -> None:
        if status == INTERRUPTED:
            return
        self._answer = {"over": message, "status": status}
        needed = {*self._asking(), *(self.plan.nodes[1:] if status else ())}
        deadline = time.monotonic() + FAREWELL_SECONDS
        while not needed <= self._told and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)

    def _agree(self, said: str, request: StopRequest, distance: int) -> Plan:
        if not self._answer:
            try:
                answer_questions(self._port, self._hear)
            except OSError as error:
                where = f"port {self._port}, one below MASTER_PORT, where the nodes meet"
                raise Over(f"{where}: {error.strerror}; choose another MASTER_PORT", WRONG_USE) from error
        self._answer = {"attempt": None, "ids": []}
        deadline = time.monotonic() + self._limit_seconds
        while True:
            asking, is_late = self._asking(), time.monotonic() > deadline
            if ended := [message for message in asking.values() if message["status"]]:
                raise Over(f"{ended[0]['host']} has ended the run: {ended[0]['said']}", ended[0]["status"])
            missing = [node for node in self.plan.nodes[1:] if node not in asking]
            count = max((count for count in range(1, len(asking) + 2) if self._fits(count)), default=0)
            if count and (is_late or not missing):
                return self._start([asking[node] for node in sorted(asking)[: count - 1]], said, distance)
            if is_late:
                raise Over(
                    f"node {', '.join(map(str, missing))} is lost or cut off: it did not come to the next start within "
                    f"{self._limit_seconds / 60:g} minutes (--node-timeout-minutes)",
                    FAILED,
                )
            pause(_POLL_SECONDS, request)

    def _start(self, others: list[dict[str, Any]], said: str, distance: int) -> Plan:
        self._used |= {message["id"] for message in others}
        told = {socket.gethostname(): said, **{message["host"]: message["said"] for message in others}}
        distances = [(distance, socket.gethostname()), *((message["distance"], message["host"]) for message in others)]
        blamed = min(distances, key=lambda pair: pair[0])[1]  # of several, the first node
        plan = Plan(self.plan.attempt + 1, (0, *(message["node"] for message in others)), told, blamed)
        ids = [message["id"] for message in others]
        self._answer = {"attempt": plan.attempt, "nodes": plan.nodes, "said": told, "blamed": blamed, "ids": ids}
        return plan

    def _others_have_ended(self) -> bool:
        return any(node in self.plan.nodes for node in self._asking())

    def _asking(self) -> dict[int, dict[str, Any]]:
        """Last messages of the nodes that ask for a start, or have ended the run."""
        earliest = time.monotonic() - _FRESH_SECONDS
        return {
            node: message
            for node, (message, heard) in self._asked.copy().items()
            if message["status"] or (heard > earliest and message["id"] not in self._used)
        }

    def _hear(self, message: dict[str, Any]) -> dict[str, Any]:
        node, status, distance = message["node"], message["status"], message["distance"]
        texts = {name: message[name] for name in _TEXTS}
        are_numbers = type(status) is int and type(distance) is int
        if node not in self._others or not are_numbers or not all(isinstance(it, str) for it in texts.values()):
            raise ValueError(f"not from a supervisor: {message}")
        if refusal := self._refusal(node, texts):
            return refusal
        if texts["id"] or status:  # else it only looks
            self._asked[node] = {"node": node, "status": status, "distance": distance, **texts}, time.monotonic()
        if "over" in self._answer or status:
            self._told.add(node)
        return self._answer

    def _refusal(self, node: int, texts: dict[str, str]) -> dict[str, Any]:
        """What a launcher is told while another one speaks for its node: to wait, in case that one has just ended, and
        then that it is of another run; empty for the one that the host knows."""
        launcher, now = texts["launcher"], time.monotonic()
        known, host, heard = self._launchers.get(node, (launcher, texts["host"], now))
        if known == launcher or now - heard > _FRESH_SECONDS:
            self._launchers[node] = launcher, texts["host"], now
            return {}
        if now - self._strangers.setdefault(launcher, now) < _STRANGER_SECONDS:
            return {"attempt": None, "ids": []}
        said = f"another run meets at this port, its node {node} is on {host}; stop it, or choose another MASTER_PORT"
        return {"over": said, "status": WRONG_USE}
