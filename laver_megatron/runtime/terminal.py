"""What a program prints: rank 0 speaks, the others only warn, and libraries are silent."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


def log_to_terminal() -> None:
    """Shows the package's own messages, of rank 0 all and of the others only warnings, and silences the
    progress bars that transformers would draw on every rank."""
    from transformers.utils.logging import disable_progress_bar  # here, because importing it takes a second

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("laver_megatron")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if int(os.environ.get("RANK", "0")) == 0 else logging.WARNING)
    disable_progress_bar()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' warnings and progress bars."""
    from transformers.utils import logging

    verbosity, shows_progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_progress:
            logging.enable_progress_bar()


def printable(text: str) -> str:
    """Text from a file, with escapes in place of what a terminal would obey."""
    return "".join(it if it.isprintable() else it.encode("unicode_escape").decode("ascii") for it in text)


def say(message: str) -> None:
    """One line on rank 0. A terminal, or a file in its place, that takes no more ends no run."""
    import torch.distributed as dist  # here, because programs that print do without it

    if dist.get_rank() == 0:
        with suppress(OSError):
            print(message, file=sys.stderr, flush=True)
