"""Questions between the supervisors of several nodes: one line of JSON there and one back over a connection of its own.

Every connection has a time limit. What is received is read as JSON alone.
"""

import json
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from socketserver import StreamRequestHandler, ThreadingTCPServer
from threading import Thread
from typing import Any

_CONNECTION_SECONDS = 5.0
_LONGEST_LINE, _LONGEST_ANSWER = 1 << 14, 1 << 24  # bytes; an answer has what every node says


def answer_questions(port: int, hear: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """From now on answers by `hear`, which a thread of each connection calls.

    Raises:
        OSError: the port is taken.
    """

    class Handler(StreamRequestHandler):
        timeout = _CONNECTION_SECONDS

        def handle(self) -> None:
            with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):  # not from a supervisor
                answer = hear(json.loads(self.rfile.readline(_LONGEST_LINE)))
                self.wfile.write(json.dumps(answer).encode() + b"\n")

    class Server(ThreadingTCPServer):
        allow_reuse_address = daemon_threads = True

    server = Server(("", port), Handler)
    os.register_at_fork(after_in_child=server.socket.close)  # an agent that outlives the supervisor does not keep it
    Thread(target=server.serve_forever, name="questions", daemon=True).start()


def ask(address: tuple[str, int], question: dict[str, Any]) -> dict[str, Any]:
    """The answer; empty if there is none, or none that is whole.

    Raises:
        ValueError: the answer, which is not of `answer_questions`.
    """
    try:
        with socket.create_connection(address, _CONNECTION_SECONDS) as connection:
            connection.sendall(json.dumps(question).encode() + b"\n")
            line = connection.makefile("rb").readline(_LONGEST_ANSWER)
    except (OSError, UnicodeError):  # of a host's name
        return {}
    if not line.endswith(b"\n"):
        return {}
    with suppress(ValueError, RecursionError):
        answer = json.loads(line)
        if isinstance(answer, dict):
            return answer
    raise ValueError(line.decode(errors="replace").strip())
