"""Programs in this process: a fresh one takes seconds to import torch, which few tests are about."""

import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]


def python_path() -> str:
    """PYTHONPATH for a program of the repository: behind it what this process was given, such as a Megatron-Core."""
    given = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(ROOT), *([given] if given else [])])


def run_here(program: str | Path, *arguments: object) -> subprocess.CompletedProcess:
    """What `python program arguments` returns and says; its handlers of signals end with it. program: a path, from the
    repository's root."""
    said, complained = io.StringIO(), io.StringIO()
    command = [str(ROOT / program), *map(str, arguments)]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    code: object = 0
    with (
        mock.patch.object(sys, "argv", command),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(complained),
    ):
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as end:
            code = end.code
            if isinstance(code, str):
                complained.write(code + "\n")
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    returncode = code if isinstance(code, int) else int(code is not None)
    return subprocess.CompletedProcess(command, returncode, said.getvalue(), complained.getvalue())
