"""Megatron's checkpoint writer without the seconds that it takes to begin."""

import gc
import multiprocessing

from megatron.core.dist_checkpointing.strategies import filesystem_async


def prepare_checkpoint_writer() -> None:
    """The process that collects what the writers wrote is a fork, where Megatron starts one that imports torch again;
    and the garbage collection before every save looks at nothing that was imported."""
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = multiprocessing.get_context("fork").Manager().Queue()
        gc.collect()
        gc.freeze()
