"""Measures memory and time of both conversions on a synthetic 3B-parameter model, against cp + sync of the same bytes.

    python tools/benchmarks/conversion.py --dir /data/scratch          # 20 GB free, about five minutes

Memory is anonymous plus shared memory of the whole process tree, above that of the same command with --dry-run.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from laver_megatron.convert.safetensors_writer import (
    SafetensorsWriter,
    TensorPlace,
    create_files,
    plan_safetensors,
)
from laver_megatron.hf.rows import row_blocks
from laver_megatron.hf.shape import read_model_shape
from laver_megatron.hf.weights import ModelParts, weight_table

# Qwen2.5-3B, whose bf16 weights are 6.2 GB.
_SHAPE_3B = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "max_position_embeddings": 32768,
    "model_type": "qwen2",
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}
_SAMPLE_SECONDS = 0.02
_TOOLS = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Measured:
    """peak_bytes: most anonymous and shared memory of the process and its children at any moment."""

    seconds: float
    peak_bytes: int


def write_synthetic_model(directory: Path, num_layers: int) -> int:
    """A 3B-shaped bf16 checkpoint of that many layers with random weights; returns its bytes."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({**_SHAPE_3B, "num_hidden_layers": num_layers}))
    weights = weight_table(ModelParts(read_model_shape(directory))).values()
    tensors = [TensorPlace(n, size, torch.bfloat16) for weight in weights for n, size in weight.hugging_face_sizes()]
    plan = plan_safetensors(tensors, "model", 5_000_000_000)
    create_files([plan], directory)
    writer = SafetensorsWriter([plan], directory)
    for place in plan.places:
        for start, stop in row_blocks(place.size, place.dtype, 16 << 20):
            values = torch.empty((stop - start, *place.size[1:]), dtype=torch.bfloat16).normal_(0, 0.02)
            writer.write_rows(place, start, values)
    writer.close()
    return plan.num_bytes


def measure(command: list[str]) -> Measured:
    """Runs a command to its end, watching its memory; RuntimeError with its output if it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(_SAMPLE_SECONDS):
            peak[0] = max(peak[0], _memory_of_tree(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    seconds = time.perf_counter() - started
    ended.set()
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{output[-2000:]}")
    return Measured(seconds, peak[0])


def _memory_of_tree(pid: int) -> int:
    """RssAnon + RssShmem of a process and all below it, in bytes. Pages of mapped files do not count."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(("RssAnon:", "RssShmem:")):
                total += int(line.split()[1]) * 1024
        # Far cheaper than looking through all processes, which would slow down what is measured.
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            total += sum(_memory_of_tree(int(child)) for child in children.read_text().split())
    except OSError:  # it has ended meanwhile
        pass
    return total


def conversions(hf: Path, megatron: Path, back: Path) -> dict[str, tuple[list[str], Path, Path]]:
    """Name -> (command, what it reads, what it writes)."""
    to_megatron = [sys.executable, str(_TOOLS / "hf_to_megatron.py"), "--hf", str(hf), "--megatron", str(megatron)]
    to_hf = [sys.executable, str(_TOOLS / "megatron_to_hf.py"), "--megatron", str(megatron), "--hf", str(back)]
    return {"to Megatron": (to_megatron, hf, megatron), "to Hugging Face": (to_hf, megatron, back)}


def benchmark(directory: Path, depths: list[int], repeats: int) -> str:
    """Runs everything in a new `directory` and returns the table. Copies alternate with conversions; both are
    flushed to disk, the source is warm."""
    lines = [
        "| layers | GB | direction | memory above the interpreter's, MB | seconds | cp + sync, seconds | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for depth in depths:
        here = directory / f"{depth}-layers"
        num_bytes = write_synthetic_model(here / "hf", depth)
        for name, (command, source, target) in conversions(here / "hf", here / "megatron", here / "back").items():
            baseline = measure([*command, "--dry-run"]).peak_bytes
            runs, copies = [], []
            for _ in range(repeats):
                subprocess.run(["cat", *map(str, _files(source))], stdout=subprocess.DEVNULL, check=True)
                copies.append(_copy(source, here / "copy"))
                shutil.rmtree(target, ignore_errors=True)
                os.sync()
                runs.append(measure(command))
                print(
                    f"{depth} layers, {name}: {runs[-1].seconds:.1f} s, cp + sync {copies[-1]:.1f} s",
                    file=sys.stderr,
                    flush=True,
                )
            seconds, copied = statistics.median(run.seconds for run in runs), statistics.median(copies)
            memory = (max(run.peak_bytes for run in runs) - baseline) / 1e6
            lines.append(
                f"| {depth} | {num_bytes / 1e9:.2f} | {name} | {memory:.0f} | {seconds:.1f} | {copied:.1f} "
                f"| {seconds / copied:.2f} |"
            )
        shutil.rmtree(here)
    return "\n".join(lines)


def _files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def _copy(source: Path, target: Path) -> float:
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    subprocess.run(["sync", *map(str, _files(target))], check=True)
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="scratch directory, cleaned up afterwards")
    parser.add_argument("--layers", type=int, nargs="+", default=[36, 18], help="depths to measure (default: 36 18)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; the median counts (default: 3)")
    options = parser.parse_args()
    options.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.dir) as directory:
        print(benchmark(Path(directory), options.layers, options.repeats))


if __name__ == "__main__":
    main()
