"""Measures the loader in samples/s against the bare loop "open tar, decode JPEG, resize" on the same files.

    python -m tools.benchmarks.loader --dir runs/demo --image-size 384 --patch-size 16     # the size of many encoders
    python -m tools.benchmarks.loader --made-up       where there is neither a demo nor scikit-image

Makes shards of photographs (640 x 480, JPEG) in a temporary directory. Both sides produce the pixels of the encoder's
image processor, in the same number of processes, with the files in the page cache.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from laver_megatron.data.batch.data_spec import DataSpec
from laver_megatron.data.batch.pack_reader import open_reader
from laver_megatron.data.index.build import index_tars
from laver_megatron.data.index.index_file import write_index
from laver_megatron.demo.encoders import save_encoder
from laver_megatron.demo.models import save_language_model
from laver_megatron.demo.photographs import photographs
from laver_megatron.encoders import ImagePreprocessor, open_preprocessor
from laver_megatron.hf.tokenizer import load_tokenizer
from tools.benchmarks import report

_SIZE = (640, 480)
_PACKS_A_READ = 4
_WORDS = ["a", "picture", "of", "some", "things", "that", "can", "be", "seen", "on", "it", "and", "others", "not"]


def made_up_pictures() -> list[Image.Image]:
    """Smooth surfaces with grain, whose JPEG files are about as large as those of photographs."""
    random, pictures = np.random.default_rng(0), []
    for _ in range(8):
        coarse = Image.fromarray(random.integers(0, 256, (48, 64, 3), dtype=np.uint8)).resize((960, 720))
        grain = random.normal(0, 6, (720, 960, 1))
        pictures.append(Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)))
    return pictures


def make_shards(
    directory: Path, num_shards: int, samples_a_shard: int, seed: int = 0, pictures: list[Image.Image] | None = None
) -> list[Path]:
    """Shards of pictures of 640 x 480 pixels with a question and an answer, and their index. pictures: at least that
    large; None for photographs."""
    random = np.random.default_rng(seed)
    photos = pictures or [picture.resize((960, 720)) for _, picture in photographs()]
    shards = [directory / f"photographs-{number:05d}.tar" for number in range(num_shards)]
    for shard in shards:
        with tarfile.open(shard, "w") as tar:
            for number in range(samples_a_shard):
                photo = photos[random.integers(len(photos))]
                left, top = (int(random.integers(photo.size[side] - _SIZE[side])) for side in (0, 1))
                answer = " ".join(random.choice(_WORDS, int(random.integers(20, 120))))
                turns = [{"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", "content": answer}]
                buffer = io.BytesIO()
                photo.crop((left, top, left + _SIZE[0], top + _SIZE[1])).save(buffer, "JPEG", quality=90)
                _add(tar, f"{number:06d}.json", json.dumps(turns).encode())
                _add(tar, f"{number:06d}.jpg", buffer.getvalue())
    write_index(index_tars(shards), directory / "index.parquet")
    return shards


@dataclass(frozen=True)
class Speed:
    """What one turn came to: samples a second, and milliseconds of processor time a sample, all processes together."""

    samples_per_second: float
    cpu_ms_per_sample: float

    @classmethod
    def of(cls, num_samples: int, seconds: float, cpu_seconds: float) -> Speed:
        return cls(num_samples / seconds, 1e3 * cpu_seconds / num_samples)


def benchmark(
    directory: Path,
    tokenizer: PreTrainedTokenizerBase,
    preprocessor: ImagePreprocessor,
    num_workers: list[int],
    repeats: int = 3,
) -> str:
    """A Markdown table: samples/s of the bare loop and of the loader, and their ratio, for each number of workers; and
    the same by processor time, which is what counts where other programs run beside.

    The bare loop runs once with transformers' own image processor, as one would write it, and once with this package's
    preprocessing, which makes the same pixels in less time: that ratio is what everything but the pictures costs. The
    shards of `directory` are read whole each time. All take turns, and medians count.
    """
    shards = sorted(directory.glob("*.tar"))
    lines = [
        "| workers | bare loop with the pixels of | bare loop, samples/s | loader, samples/s | ratio "
        "| bare loop, CPU ms | loader, CPU ms | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    bare_loops: dict[str, Callable[[Image.Image], object]] = {
        "transformers": lambda picture: preprocessor.processor(images=picture, return_tensors="pt"),
        "this package": preprocessor,
    }
    for workers in num_workers:
        speeds: dict[str, list[Speed]] = {name: [] for name in (*bare_loops, "loader")}
        for _ in range(repeats):
            for name, to_pixels in bare_loops.items():
                speeds[name].append(bare_speed(shards, to_pixels, workers))
            speeds["loader"].append(loader_speed(directory, tokenizer, preprocessor, workers))
        lines += [_row(workers, name, speeds[name], speeds["loader"]) for name in bare_loops]
    return "\n".join(lines)


def _row(workers: int, name: str, bare: list[Speed], loader: list[Speed]) -> str:
    (bare_speeds, bare_costs), (speeds, costs) = (zip(*map(astuple, turns), strict=True) for turns in (bare, loader))
    speed_ratio = np.median(np.divide(speeds, bare_speeds))  # of neighbouring turns
    cost_ratio = np.median(np.divide(bare_costs, costs))
    return (
        f"| {workers} | {name} | {np.median(bare_speeds):.1f} | {np.median(speeds):.1f} | {speed_ratio:.1%} "
        f"| {np.median(bare_costs):.2f} | {np.median(costs):.2f} | {cost_ratio:.1%} |"
    )


def bare_speed(shards: list[Path], to_pixels: Callable[[Image.Image], object], num_workers: int) -> Speed:
    """Reading tars from front to end, decoding and preprocessing, in processes that keep the result."""
    if num_workers == 0:
        start, cpu_start = time.perf_counter(), time.process_time()
        count = sum(_bare_loop(shard, to_pixels) for shard in shards)
        return Speed.of(count, time.perf_counter() - start, time.process_time() - cpu_start)
    context = get_context("fork")
    barrier, results = context.Barrier(num_workers + 1), context.Queue()

    def work(number: int) -> None:
        torch.set_num_threads(1)
        barrier.wait()
        cpu_start = time.process_time()
        count = sum(_bare_loop(shard, to_pixels) for shard in shards[number::num_workers])
        results.put((count, time.process_time() - cpu_start))

    workers = [context.Process(target=work, args=(number,)) for number in range(num_workers)]
    for worker in workers:
        worker.start()
    barrier.wait()
    start = time.perf_counter()
    counts, cpu_seconds = zip(*(results.get() for _ in workers), strict=True)
    seconds = time.perf_counter() - start
    for worker in workers:
        worker.join()
    return Speed.of(sum(counts), seconds, sum(cpu_seconds))


def loader_speed(
    directory: Path, tokenizer: PreTrainedTokenizerBase, preprocessor: ImagePreprocessor, num_workers: int
) -> Speed:
    """Reading an epoch of packs, from the first read on: reading ahead then goes on as it does in a run."""
    num_visual = preprocessor.num_tokens(*_SIZE)
    spec = DataSpec([directory], 4096, 4096 // num_visual * num_visual, seed=0, num_workers=num_workers)
    reader = open_reader(spec, tokenizer, preprocessor)
    try:
        num_packs = reader.plan.num_packs(0) // _PACKS_A_READ * _PACKS_A_READ
        keys = [len(reader.plan.pack(number)) for number in range(num_packs)]
        reader.read(0, _PACKS_A_READ, 1)
        start, cpu_start = time.perf_counter(), _cpu_seconds()
        for first in range(_PACKS_A_READ, num_packs, _PACKS_A_READ):
            reader.read(first, _PACKS_A_READ, 1)
        # As many packs were made since the first read as were read: the lead is as long as it was.
        return Speed.of(sum(keys[_PACKS_A_READ:]), time.perf_counter() - start, _cpu_seconds() - cpu_start)
    finally:
        reader.close()


def _cpu_seconds() -> float:
    """Of this process and its children."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    times = [process.cpu_times() for process in processes]
    return sum(part.user + part.system for part in times)


def _bare_loop(shard: Path, to_pixels: Callable[[Image.Image], object]) -> int:
    count = 0
    with tarfile.open(shard) as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            content = file.read()
            if member.name.endswith(".jpg"):
                to_pixels(Image.open(io.BytesIO(content)).convert("RGB"))
                count += 1
    return count


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--dir", type=Path, help="holds model/ (a tokenizer) and encoder/")
    source.add_argument("--made-up", action="store_true", help="the demo's tokenizer and encoder, pictures of noise")
    add("--image-size", type=int, help="pixels on a side that the encoder sees (default: its own)")
    add("--patch-size", type=int, help="pixels on a side of a visual token (default: its own)")
    add("--num-workers", type=int, nargs="+", default=[0, 1, 2], help="processes (default: 0 1 2)")
    add("--samples", type=int, default=1200, help="samples to read (default: 1200)")
    add("--repeats", type=int, default=5, help="runs of each; the median counts (default: 5)")
    add("--output", type=Path, help="a file for the report (default: the table to standard output)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        table = run(options, Path(directory))
    if options.output is None:
        print(table)
    else:
        kind = "Pictures of noise." if options.made_up else "Photographs."
        report.write("Loader", torch.device("cpu"), [f"{kind} {options.samples} samples.", table], options.output)


def run(options: argparse.Namespace, scratch: Path) -> str:
    """Makes what is missing under `scratch`, and measures."""
    source = options.dir
    if options.made_up:
        source = scratch
        save_language_model(scratch / "model", [" ".join(_WORDS)])
        (scratch / "encoder").mkdir()
        save_encoder(scratch / "encoder")
    preprocessor = open_preprocessor(source / "encoder")
    if options.image_size:
        size = {"height": options.image_size, "width": options.image_size}
        preprocessor.processor.size = type(preprocessor.processor.size)(**size)
        preprocessor.height = preprocessor.width = options.image_size
    preprocessor.token_size = options.patch_size or preprocessor.token_size
    shards = scratch / "shards"
    shards.mkdir()
    make_shards(shards, 12, options.samples // 12, pictures=made_up_pictures() if options.made_up else None)
    tokenizer = load_tokenizer(source / "model")
    return benchmark(shards, tokenizer, preprocessor, options.num_workers, options.repeats)


if __name__ == "__main__":
    main()
