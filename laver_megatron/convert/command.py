"""What the command lines of both conversions share: options, torchrun, errors and exit status."""

import argparse
import os
import signal
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist

from laver_megatron.config.fields import ConfigError


def start_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print the mapping, sizes and memory; write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace the output directory if it holds weights")
    parser.add_argument("--strict", action="store_true", help="a NaN or infinite weight is an error, not a warning")
    parser.add_argument("--num-threads", type=_positive, metavar="N", help="(default: the cores, at most 4)")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def run_conversion(convert: Callable[[], None]) -> None:
    """Runs a conversion, on all ranks together under torchrun. Exit status 2 for what the user gave, 1 for a
    failure of the machine, 130 after Ctrl-C or another signal to end; each with one line that says why."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # while they import, the tools just stop
    torch.set_num_threads(1)  # the conversion's own threads divide the work
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
    try:
        convert()
    except ConfigError as error:
        _stop(f"error: {'; '.join(error.problems)}", 2)
    except ValueError as error:
        _stop(f"error: {error}", 2)
    except OSError as error:
        _stop(f"error: {error}", 1)
    except KeyboardInterrupt:
        _stop("stopped", 130)
    if dist.is_initialized():
        dist.destroy_process_group()


def _stop(message: str, status: int) -> None:
    print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    # At once: leaving the group in order would wait for ranks that are waiting for this one, and an interpreter that is
    # taken down just after its threads were told to stop aborts now and then (std::terminate, behind all Python).
    os._exit(status)
