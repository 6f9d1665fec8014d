"""`laver checkpoint`: what the checkpoints of a run hold, who wrote them, and whether they are whole."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from laver_megatron.checkpoint.about import ABOUT_FILE
from laver_megatron.checkpoint.choice import quick_problem
from laver_megatron.checkpoint.directory import RUN_FILE, checkpoints_in, is_checkpoint, iteration_of
from laver_megatron.checkpoint.manifest import check_files, read_manifest
from laver_megatron.program import program, program_parser
from laver_megatron.runtime.exit_status import FAILED
from laver_megatron.runtime.files import read_object
from laver_megatron.runtime.terminal import printable

DESCRIPTION = """
Lists the checkpoints of a run, or one: iteration, size, tokens, layout, and the versions and commit that wrote it.
Whole or damaged is told by the sizes of all files and the checksums of the small ones; --verify reads everything.
Exit status 1 if one is damaged. Nothing in a checkpoint is run.
"""
_LAYOUT = {
    "tensor_model_parallel_size": "TP", "pipeline_model_parallel_size": "PP",
    "num_layers_per_virtual_pipeline_stage": "layers a virtual stage",
}  # fmt: skip


@program
def main(argv: Sequence[str] | None = None) -> None:
    """Prints what is there; ends with 1 if something is damaged."""
    parser = program_parser("checkpoint", DESCRIPTION, ["runs/demo", "runs/demo/checkpoints/iter_0000040 --verify"])
    parser.add_argument("path", type=Path, help="a run directory, its checkpoints/ folder, or one iter_* folder")
    parser.add_argument("--verify", action="store_true", help="compare the checksums of all files")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    options = parser.parse_args(argv)
    found = [describe_checkpoint(path, verify=options.verify) for path in find(options.path)]
    print(json.dumps(found, indent=2) if options.json else "\n".join(map(text_of, found)))
    if any(one["problem"] for one in found):
        sys.exit(FAILED)


def find(path: Path) -> list[Path]:
    """The checkpoints that a path names, the oldest first.

    Raises:
        ValueError: there are none.
    """
    if is_checkpoint(path) or path.name.startswith("iter_"):
        return [path]
    found = [*checkpoints_in(path / "checkpoints"), *checkpoints_in(path)]
    if not found:
        raise ValueError(f"{path} holds no checkpoints: neither iter_* folders nor checkpoints/iter_*")
    return found[::-1]


def describe_checkpoint(path: Path, *, verify: bool) -> dict[str, Any]:
    """What is known of a checkpoint; `problem` is empty if it is whole as far as was looked."""
    problem = quick_problem(path)
    if verify and not problem:
        problem = _whole_problem(path)
    about, run = _object(path / ABOUT_FILE), _object(path / RUN_FILE)
    return {
        "path": str(path),
        "iteration": about.get("iteration", iteration_of(path) if path.name[5:].isdecimal() else None),
        "bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        "problem": problem,
        "verified": verify and not problem,
        "weights_only": run.get("weights_only") is True,
        "about": about,
        "run": run,
    }


def _whole_problem(path: Path) -> str:
    from laver_megatron.runtime.pickles import read_metadata  # torch: without --verify nobody waits for it

    try:
        entries = read_manifest(path)
        total = sum(size for size, _ in entries.values())
        with tqdm(total=total, unit="B", unit_scale=True, desc=path.name, disable=not sys.stderr.isatty()) as bar:
            for name, entry in entries.items():
                check_files(path, [(name, entry)])
                bar.update(entry[0])
        read_metadata(path)
    except (ValueError, OSError) as error:
        return printable(str(error))
    return ""


def _object(path: Path) -> dict[str, Any]:
    """What a file says that can be shown; nothing where there is none: older checkpoints have no about.json, and a
    damaged one may have anything."""
    try:
        content = read_object(path)
        json.dumps([[[[content]]]], indent=2, allow_nan=False)  # deeper than where it is printed
    except (ValueError, RecursionError):
        return {}
    return content


def text_of(one: dict[str, Any]) -> str:
    """Some lines for people. about.json and run.json may say anything, of any kind."""
    about, run = one["about"], one["run"]
    state = f"DAMAGED: {one['problem']}" if one["problem"] else "whole" + ", verified" * one["verified"]
    lines = [f"{one['path']}: {one['bytes'] / 1e9:.3f} GB, {state}"]
    if one["weights_only"]:
        lines.append("weights alone, converted")
    layout = [f"{short} {run[name]}" for name, short in _LAYOUT.items() if run.get(name)]
    if "world_size" in about:
        layout.append(f"{about['world_size']} processes")
    progress = [
        f"iteration {one['iteration']} of {run.get('train_iters', '?')}",
        *(
            f"{_grouped(about[name])} {name.removeprefix('consumed_')}"
            for name in ("consumed_tokens", "consumed_samples")
            if name in about
        ),
    ]
    lines += [", ".join(progress), ", ".join(layout)]
    if about:
        lines.append(_written(about))
    sources = [f"--{name.replace('_', '-')} {run[name]}" for name in ("load", "encoder") if run.get(name)]
    lines.append("of a run with " + " ".join(sources) if sources else "")
    return "\n  ".join(printable(line) for line in lines if line)


def _written(about: dict[str, Any]) -> str:
    """When, and by what."""
    try:
        when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(about["written"]))
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        when = "at an unknown time"
    versions = about.get("versions")
    packages = versions.items() if isinstance(versions, dict) else ()
    by = ", ".join(f"{name} {number}" for name, number in packages) or "unknown versions"
    return f"written {when} by {by}, commit {about.get('commit') or 'unknown'}"


def _grouped(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
