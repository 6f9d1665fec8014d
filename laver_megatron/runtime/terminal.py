"""What a run prints: rank 0 speaks, the others only warn."""

import logging
import os
import sys

import torch.distributed as dist
import transformers


def log_to_terminal() -> None:
    """Shows the package's own messages, of rank 0 all and of the others only warnings, and silences the
    progress bars that transformers would draw on every rank."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("laver_megatron")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if int(os.environ.get("RANK", "0")) == 0 else logging.WARNING)
    transformers.utils.logging.disable_progress_bar()


def say(message: str) -> None:
    """One line on rank 0."""
    if dist.get_rank() == 0:
        print(message, file=sys.stderr, flush=True)
