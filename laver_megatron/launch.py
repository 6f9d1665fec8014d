"""What examples/pretrain_laver.sh needs besides the trainer: the default configuration, and process counts."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from laver_megatron.config.checks import check_run
from laver_megatron.config.command_line import (
    exit_on_config_error,
    from_command_line,
    is_rank_zero,
    load_config,
    read_command_line,
)

DEMO_CONFIG = Path(__file__).resolve().parents[1] / "examples" / "demo.yaml"
DEMO_DIR = Path("runs/demo")  # as in demo.yaml: below the current directory
DEMO_PARTS = ("model", "encoder", "shards")
DEMO_TIMEOUT_SECONDS = 600
_ASKS_ONLY = ("--help", "-h", "--print-config", "--dry-run")
_LAYOUT_FLAGS = ("--tensor-model-parallel-size", "--pipeline-model-parallel-size")


def main(argv: Sequence[str] | None = None) -> None:
    """The trainer's main; without --config it runs the demo, whose data and model are made if need be."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not _names(arguments, "--config") and not _names(arguments, "--help", "-h"):
        arguments = demo_arguments(arguments)
        if not _names(arguments, *_ASKS_ONLY):
            make_or_await_demo(DEMO_DIR)
    config = check_run(from_command_line(arguments))
    if config is None:
        return
    from laver_megatron import train  # only now: help and mistakes need not wait for Megatron-Core

    train.run(config)


def demo_arguments(arguments: Sequence[str], environ: Mapping[str, str] = os.environ) -> list[str]:
    """The arguments with the demo's configuration in front, and with a layout of one process where the number
    of processes does not fit the demo's."""
    with_demo = ["--config", str(DEMO_CONFIG), *arguments]
    _say(f"no --config: running the demo, {DEMO_CONFIG}, in {DEMO_DIR} of the current directory")
    if _names(arguments, "--print-config", *_LAYOUT_FLAGS):
        return with_demo
    with exit_on_config_error():
        invocation = read_command_line(with_demo)
    tp, pp = (
        invocation.config.parallel.tensor_model_parallel_size,
        invocation.config.parallel.pipeline_model_parallel_size,
    )
    world_size = invocation.world_size(environ)
    if world_size % (tp * pp):
        _say(f"{world_size} process(es) do not make the demo's TP {tp} x PP {pp}: using TP 1 x PP 1")
        with_demo += ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1"]
        with_demo += ["--no-sequence-parallel"]
    return with_demo


def make_or_await_demo(directory: Path) -> None:
    """Makes the demo's model, encoder and shards on the first process of the machine; the others wait."""
    if _demo_is_there(directory):
        return
    if os.environ.get("LOCAL_RANK", "0") == "0":
        from laver_megatron.demo import make_demo

        make_demo(directory)
        return
    deadline = time.monotonic() + DEMO_TIMEOUT_SECONDS
    while not _demo_is_there(directory):
        if time.monotonic() > deadline:
            raise SystemExit(f"{directory}: the demo's files were not made in {DEMO_TIMEOUT_SECONDS} seconds")
        time.sleep(0.2)


def num_processes(arguments: Sequence[str], environ: Mapping[str, str] = os.environ) -> int:
    """Processes to start on this machine: one for each GPU, or on a machine without any, this machine's part of
    the smallest layout, TP x PP. A configuration with mistakes ends the process with exit code 2."""
    import torch

    if torch.cuda.device_count() > 0:
        return torch.cuda.device_count()
    if not _names(arguments, "--config"):
        arguments = ["--config", str(DEMO_CONFIG), *arguments]
    with exit_on_config_error():
        config = load_config(arguments)
    smallest = config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size
    return max(1, smallest // int(environ.get("NNODES", "1")))


def _demo_is_there(directory: Path) -> bool:
    # Each part is renamed into place when it is complete.
    return all((directory / part).is_dir() for part in DEMO_PARTS)


def _names(arguments: Sequence[str], *flags: str) -> bool:
    return any(argument.split("=", 1)[0] in flags for argument in arguments)


def _say(message: str) -> None:
    if is_rank_zero():
        print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    print(num_processes(sys.argv[1:]))
