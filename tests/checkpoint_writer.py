"""Megatron's checkpoint writer without the seconds that it takes to begin."""

import functools
import gc
import multiprocessing
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async


@functools.cache
def results_queue() -> Any:
    """Of a process that is a fork of this one, where Megatron starts one that imports torch again."""
    return multiprocessing.get_context("fork").Manager().Queue()


@functools.cache
def prepare_checkpoint_writer() -> None:
    """Also lets the garbage collection before every save look at nothing that was imported."""
    filesystem_async._get_write_results_queue = results_queue
    gc.collect()
    gc.freeze()
