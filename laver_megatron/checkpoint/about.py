"""about.json: who wrote a checkpoint, with which versions, and how far the run was. For people, and for programs that
have no torch; loading does not need it."""

import functools
import os
import subprocess
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import laver_megatron

ABOUT_FILE = "about.json"
_PACKAGES = ("torch", "megatron-core", "transformers")
_NUMBERS = ("iteration", "consumed_packs", "consumed_samples", "consumed_tokens", "skipped_iterations")


def about(progress: Mapping[str, Any]) -> dict[str, Any]:
    """What about.json says of a checkpoint that is written now."""
    return {
        "written": time.time(),
        "versions": {"laver_megatron": laver_megatron.__version__, **_versions()},
        "commit": commit(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        **{name: progress[name] for name in _NUMBERS},
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@functools.cache
def commit() -> str | None:
    """Of the clone that this package lies in, with + behind it where files were changed; None elsewhere."""
    root = Path(laver_megatron.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
