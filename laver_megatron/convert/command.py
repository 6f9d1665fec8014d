"""What the command lines of both conversions share: flags, torchrun, errors and exit status."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from laver_megatron.config.fields import ConfigError
from laver_megatron.program import positive_integer, program_parser
from laver_megatron.runtime.exit_status import FAILED, INTERRUPTED, WRONG_USE


def conversion_parser(
    command: str, description: str, examples: Sequence[str]
) -> tuple[argparse.ArgumentParser, argparse._ArgumentGroup]:
    """The parser, and its group of the two directories, which the conversion adds itself."""
    parser = program_parser(command, description, examples)
    places = parser.add_argument_group("from where to where")
    places.add_argument("--overwrite", action="store_true", help="replace the output directory if it holds weights")
    how = parser.add_argument_group("how")
    how.add_argument("--dry-run", action="store_true", help="print the mapping, sizes and memory; write nothing")
    how.add_argument("--strict", action="store_true", help="a NaN or infinite weight is an error, not a warning")
    how.add_argument(
        "--num-threads", type=positive_integer, metavar="N", help="threads (default: the cores, at most 4)"
    )
    return parser, places


def run_conversion(convert: Callable[[], None]) -> None:
    """Runs a conversion, on all ranks together under torchrun; ends by the rule of `program`, but at once."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)  # the conversion's own threads divide the work
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
    try:
        convert()
    except ConfigError as error:
        _stop(f"error: {'; '.join(error.problems)}", WRONG_USE)
    except ValueError as error:
        _stop(f"error: {error}", WRONG_USE)
    except OSError as error:
        _stop(f"error: {error}", FAILED)
    except KeyboardInterrupt:
        _stop("stopped", INTERRUPTED)
    if dist.is_initialized():
        dist.destroy_process_group()


def _stop(message: str, status: int) -> None:
    print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    # At once: leaving the group in order would wait for ranks that are waiting for this one, and an interpreter that is
    # taken down just after its threads were told to stop aborts now and then (std::terminate, behind all Python).
    os._exit(status)
