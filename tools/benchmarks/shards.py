"""Measures tools/make_shards.py against `tar` of the same files: LLaVA's JSON and a directory of JPEGs.

python tools/benchmarks/shards.py --dir /data/scratch --num-samples 10000 --num-workers 1 2
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from laver_megatron.shards.build import MakeSettings, make_shards

_NUM_PICTURES = 50  # different ones; files repeat them
_FILES_A_FOLDER = 1000
_ANSWER = "A wooden table stands in front of a window, and on it a bowl of apples, two of them cut open. "


def benchmark(folder: Path, num_samples: int, num_workers: Sequence[int], repeats: int) -> str:
    """A Markdown table of MB/s: `tar`, `tar` until its bytes are on the disk ("synced"), and make_shards, which always
    waits for that, with these numbers of workers.

    Everything happens in `folder`, with the files in the page cache; the median of `repeats` rounds counts, each of
    which runs all rows, so that a busy machine is busy for all of them.
    """
    write_llava(folder, num_samples)
    num_bytes = sum(path.stat().st_size for path in (folder / "images").rglob("*.jpg"))
    num_bytes += (folder / "data.json").stat().st_size
    tar = ["tar", "--create", "--file", str(folder / "all.tar"), "--directory", str(folder), "data.json", "images"]

    def tar_on_disk() -> None:
        subprocess.run(tar, check=True)
        with open(folder / "all.tar", "rb+") as file:
            os.fsync(file.fileno())

    def shards(number: int) -> object:
        sources, images = (folder / "data.json",), folder / "images"
        settings = {"images": images, "samples_per_shard": 1000, "num_workers": number, "mode": "overwrite"}
        return make_shards(MakeSettings(sources, folder / "shards", **settings))  # type: ignore[arg-type]

    rows: dict[str, Callable[[], object]] = {
        "tar": partial(subprocess.run, tar, check=True),
        "tar, synced": tar_on_disk,
    }
    rows |= {f"make_shards, {number} workers": partial(shards, number) for number in num_workers}
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    for _ in range(repeats):
        for name, run in rows.items():
            (folder / "all.tar").unlink(missing_ok=True)
            os.sync()  # nobody waits for what another left behind
            measured[name].append(_seconds(run))
    medians = {name: tuple(map(statistics.median, zip(*values, strict=True))) for name, values in measured.items()}
    lines = [
        f"{num_samples:,} samples, {num_bytes / 1e6:,.0f} MB ({num_bytes / num_samples / 1e3:.0f} kB each); median of "
        f"{repeats}, {os.cpu_count()} CPUs\n",
        "| | s | MB/s | of tar | of tar, synced | CPU s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, (wall, cpu) in medians.items():
        ratios = " | ".join(f"{medians[other][0] / wall:.2f}" for other in ("tar", "tar, synced"))
        lines.append(f"| {name} | {wall:.2f} | {num_bytes / 1e6 / wall:,.0f} | {ratios} | {cpu:.2f} |")
    return "\n".join(lines)


def _seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds, those of finished child processes included."""
    start, before = time.perf_counter(), os.times()
    run()
    return time.perf_counter() - start, sum(os.times()[:4]) - sum(before[:4])


def write_llava(folder: Path, num_samples: int) -> None:
    """FOLDER/data.json and FOLDER/images: JPEGs of 640 x 480 with about the bytes of photographs."""
    generator = np.random.default_rng(0)
    pictures = []
    for _ in range(_NUM_PICTURES):
        coarse = Image.fromarray(generator.integers(0, 255, (48, 64, 3), dtype=np.uint8))
        smooth_HW3 = np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC), np.int16)
        grain_HW3 = generator.integers(-20, 20, smooth_HW3.shape)
        buffer = BytesIO()
        Image.fromarray((smooth_HW3 + grain_HW3).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
        pictures.append(buffer.getvalue())
    records = []
    for number in range(num_samples):
        name = f"{number // _FILES_A_FOLDER:05d}/{number:09d}.jpg"
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pictures[number % _NUM_PICTURES])
        turns = [{"from": "human", "value": "<image>\nDescribe the picture."}, {"from": "gpt", "value": _ANSWER * 3}]
        records.append({"id": f"{number:09d}", "image": name, "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dir", type=Path, required=True, help="scratch directory, cleaned up afterwards")
    add("--num-samples", type=int, default=10_000, metavar="N", help="of about 110 kB (default: 10000)")
    add("--num-workers", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="processes (default: 0 1 2)")
    add("--repeats", type=int, default=3, metavar="N", help="rounds; the median counts (default: 3)")
    options = parser.parse_args()
    options.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.dir) as directory:
        print(benchmark(Path(directory), options.num_samples, options.num_workers, options.repeats))


if __name__ == "__main__":
    main()
