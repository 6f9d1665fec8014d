"""What the programs of this package have in common: the help page, the exit status, and where the examples are.

The exit statuses are those of `runtime/exit_status.py`.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from functools import wraps
from pathlib import Path
from threading import current_thread, main_thread
from types import FrameType
from typing import Protocol

from laver_megatron.config.fields import ConfigError
from laver_megatron.runtime.exit_status import FAILED, INTERRUPTED, WRONG_USE, end

_PACKAGE = Path(__file__).resolve().parent
# A wheel brings the examples inside the package; in a clone they lie beside it.
EXAMPLES = _PACKAGE / "examples" if (_PACKAGE / "examples").is_dir() else _PACKAGE.parent / "examples"


class Main(Protocol):
    """A program: takes the words behind its name, or those of the process."""

    def __call__(self, argv: Sequence[str] | None = None) -> None: ...


class _Help(argparse.RawDescriptionHelpFormatter):
    """Shows the default of every flag that has one, unless its help says it in words."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        says_it = "default" in text or "%(default)" in text or action.required
        has_none = action.default is None or action.default is False  # 0 is one
        if says_it or has_none or action.default in (argparse.SUPPRESS, []):
            return action.help
        shown = " ".join(map(str, action.default)) if isinstance(action.default, (list, tuple)) else "%(default)s"
        return f"{text} (default: {shown})"


def program_parser(
    command: str, description: str, examples: Sequence[str], *, usage: str | None = None, allow_abbrev: bool = True
) -> argparse.ArgumentParser:
    """The parser of `laver COMMAND`. examples: what is written behind that name, one command line each."""
    return argparse.ArgumentParser(
        prog=f"laver {command}",
        usage=usage,
        description=description.strip(),
        epilog="examples:\n" + "".join(f"  laver {command} {example}\n" for example in examples),
        formatter_class=_Help,
        allow_abbrev=allow_abbrev,
    )


def positive_integer(text: str) -> int:
    """The type of a flag."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a positive integer")
    return int(text)


def find_device(name: str | None) -> str:
    """What `--device` names; without it the GPU if there is one.

    Raises:
        ValueError: there is none of this name.
    """
    import torch  # seconds, which --help should not take

    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # of builds without CUDA
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from None
    return device


def program(main: Main) -> Main:
    """Ends the process by the rule above when `main` raises: one line on stderr in place of a traceback.

    ValueError is the user's mistake, and so is a path that is not there, is in the way or may not be used; any other
    OSError is the machine's. What else is raised is ours, and keeps its traceback.
    """

    @wraps(main)
    def run(argv: Sequence[str] | None = None) -> None:
        _interrupt_on_signals()
        try:
            main(argv)
        except ConfigError as error:
            end(str(error), WRONG_USE)
        except ValueError as error:
            end(f"error: {error}", WRONG_USE)
        except BrokenPipeError:  # whoever read what we print, such as `head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(FAILED) from None
        except OSError as error:
            is_wrong_path = isinstance(error, (FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError))
            reason = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
            end(f"error: {reason}", WRONG_USE if is_wrong_path else FAILED)
        except KeyboardInterrupt as interruption:
            end(str(interruption) or "interrupted", INTERRUPTED)

    return run


def _interrupt_on_signals() -> None:
    """SIGTERM, SIGUSR1 and SIGUSR2 do what Ctrl-C does. Processes forked from this one end at once, or answer them in a
    way of their own."""
    owner = os.getpid()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            os._exit(128 + number)
        raise KeyboardInterrupt

    if current_thread() is main_thread():  # no other may set handlers
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, interrupt)
