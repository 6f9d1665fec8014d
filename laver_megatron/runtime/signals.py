"""Signals that ask a program to end."""

import os
import signal
import threading
from types import FrameType


def interrupt_on_sigterm() -> None:
    """SIGTERM does what Ctrl-C does: a KeyboardInterrupt in this process. Processes forked from it end at once, unless
    they answer signals in a way of their own."""
    owner = os.getpid()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            os._exit(128 + number)
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        signal.signal(signal.SIGTERM, interrupt)
