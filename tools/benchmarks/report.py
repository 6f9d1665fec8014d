"""What every report of the benchmarks begins with, and numbers with their spread.

python -m tools.benchmarks.report     prints date, hardware, versions and commit
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

_PACKAGES = ("torch", "megatron-core", "transformers", "transformer-engine", "flash-attn", "triton")


def environment(device: torch.device) -> str:
    """Markdown: date, hardware, versions, commit."""
    versions = [f"Python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return "\n".join(
        [
            f"- date: {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
            f"- hardware: {hardware(device)}",
            f"- versions: {', '.join(versions)}",
            f"- commit: {commit()}",
        ]
    )


def hardware(device: torch.device) -> str:
    """The model of the CPU and, on CUDA, of the GPU."""
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        return f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB; host {_cpu()}"
    return _cpu()


def _cpu() -> str:
    """Name, family and model (virtual machines hide the name), and number of cores."""
    found: dict[str, str] = {}
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    name = found.get("model name") or platform.processor() or platform.machine()
    numbers = f" (family {found['cpu family']}, model {found['model']})" if "cpu family" in found else ""
    threads = count(torch.get_num_threads(), "thread")
    return f"{name}{numbers}, {threads} at the start, {found.get('siblings', '?')} cores"


def commit() -> str:
    """The commit of the working tree, with a note if it was changed."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "not in a git working tree"
    return name.stdout.strip() + (" with changes" if changed.stdout.strip() else "")


def chosen_device(ours: torch.device, kind: str) -> torch.device:
    """The device that was asked for; ends the process with a message if training would run on another."""
    if ours.type != kind:
        sys.exit(f"--device {kind}: training on this machine runs on {ours.type}; ask for --device {ours.type}")
    return ours


def write(title: str, device: torch.device, sections: Sequence[str], output: Path | None) -> None:
    """A report to a file, whose folder is made, or to standard output."""
    text = "\n\n".join([f"# {title}", environment(device), *sections]) + "\n"
    if output is None:
        print(text)
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text)
    progress(f"wrote {output}")


def progress(line: str) -> None:
    """What a benchmark does now, on standard error."""
    print(line, file=sys.stderr, flush=True)


def count(number: int, noun: str) -> str:
    """1 thread, 2 threads."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def ratio(numerators: Sequence[float], denominators: Sequence[float], *, over: float = 1.0) -> str:
    """Median of the ratios of each round, their range, and the ratio of each one's fastest round, which a busy machine
    disturbs least. over: divides all of them."""
    ratios = [a / b / over for a, b in zip(numerators, denominators, strict=True)]
    smallest = min(numerators) / min(denominators) / over
    return f"{median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f}), of the fastest rounds {smallest:.3f}"


def spread(values: Sequence[float], spec: str = ".1f") -> str:
    """Median and range."""
    return f"{median(values):{spec}} ({min(values):{spec}}-{max(values):{spec}})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    print(environment(torch.device("cuda" if torch.cuda.is_available() else "cpu")))
