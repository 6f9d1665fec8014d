"""What the programs of this package have in common: the help page, the exit status, and where the examples are.

Exit status: 0 done; 1 failed while running (a disk, a worker process, a check that did not hold); 2 wrong use (a flag,
a file or a number that the user gave); 130 ended by Ctrl-C or by another signal that asks a program to end.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import NoReturn

from laver_megatron.config.fields import ConfigError

FAILED, WRONG_USE, INTERRUPTED = 1, 2, 130
Main = Callable[[Sequence[str] | None], None]

_PACKAGE = Path(__file__).resolve().parent
# A wheel brings the examples inside the package; in a clone they lie beside it.
EXAMPLES = _PACKAGE / "examples" if (_PACKAGE / "examples").is_dir() else _PACKAGE.parent / "examples"


class _Help(argparse.RawDescriptionHelpFormatter):
    """Shows the default of every flag that has one, unless its help says it in words."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        says_it = "default" in text or "%(default)" in text or action.required
        if says_it or action.default in (None, argparse.SUPPRESS, False) or action.default == []:
            return action.help
        shown = " ".join(map(str, action.default)) if isinstance(action.default, (list, tuple)) else "%(default)s"
        return f"{text} (default: {shown})"


def program_parser(command: str, description: str, examples: Sequence[str], **options: bool | str) -> argparse.ArgumentParser:
    """The parser of `laver COMMAND`. examples: what is written behind that name, one command line each; options: of
    argparse."""
    epilog = "examples:\n" + "".join(f"  laver {command} {example}\n" for example in examples)
    return argparse.ArgumentParser(
        prog=f"laver {command}", description=description.strip(), epilog=epilog, formatter_class=_Help, **options  # type: ignore[arg-type]
    )


def program(main: Main) -> Main:
    """Ends the process by the rule above when `main` raises: one line on stderr in place of a traceback.

    ValueError is the user's mistake and OSError the machine's. What else is raised is ours, and keeps its traceback.
    """

    @wraps(main)
    def run(argv: Sequence[str] | None = None) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _interrupt_only(os.getpid()))
        try:
            main(argv)
        except ConfigError as error:
            _end(str(error), WRONG_USE)
        except ValueError as error:
            _end(f"error: {error}", WRONG_USE)
        except OSError as error:
            _end(f"error: {error}", FAILED)
        except KeyboardInterrupt as interruption:
            _end(str(interruption) or "interrupted", INTERRUPTED)

    return run


def _interrupt_only(process: int) -> Callable[[int, FrameType | None], None]:
    """A handler by which a signal that asks to end does what Ctrl-C does; processes forked from this one end at once."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:
            os._exit(128 + number)
        raise KeyboardInterrupt

    return interrupt


def _end(message: str, status: int) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(status)
