"""Measures what opening data of many samples costs a reader, in seconds and memory, of drawn indexes of empty tars.

    python tools/benchmarks/index_scale.py --dir runs/demo --samples 1000000 10000000      # 0.35 GB and 3.5 GB of disk
    python tools/benchmarks/index_scale.py --dir runs/demo --samples 100000000 --folder /tmp/scale     # 35 GB, an hour

Samples are the native mix of packing.py (a million, then the same sizes again), in shards of 10,000, which are empty
files of the right length. Each row is a process that opens the data and stays; the second one shows what each further
reader of a node costs. Private memory is the process's own (RssAnon), which includes what Python and torch take; the
highest value while opening is beside it. USS also counts pages of mapped files that no other process has mapped.
Resuming is finding the first pack in the middle of the epoch from a mark.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
from numpy.typing import DTypeLike, NDArray

from laver_megatron.data.batch.data_spec import DataSpec
from laver_megatron.data.batch.pack_reader import PackReader, open_reader
from laver_megatron.data.index.counts import SampleCounts, _settings_hash, write_counts
from laver_megatron.data.index.index_file import write_index
from laver_megatron.data.index.shard_index import Shard, ShardIndex
from laver_megatron.encoders import open_preprocessor
from laver_megatron.hf.tokenizer import load_tokenizer
from tools.benchmarks.packing import draw_source

_SAMPLES_A_SHARD = 10_000
_DRAWN_TOGETHER = 1_000_000
_KEY_LETTERS = 9
_SEQ_LENGTH, _VISUAL_SEQ_LENGTH = 4096, 2712  # the proposed budget of the mix
_MIB = 1 << 20


def draw(folder: Path, num_samples: int, directory: Path) -> None:
    """Writes `index.parquet`, its counts and its empty shards, unless they are there. The columns are drawn into files,
    not into memory."""
    if (folder / "index.parquet").exists():
        return
    scratch = folder / "scratch"
    scratch.mkdir(parents=True)

    def column(name: str, length: int, dtype: DTypeLike) -> NDArray:
        return np.memmap(scratch / name, dtype, "w+", shape=(length,))

    names = "tokens", "visual", "images", "labels", "dropped"
    counts = {f"{name}_I": column(name, num_samples, np.int32) for name in names}
    rows = {
        "shard_I": column("shard", num_samples, np.int32),
        "text_offset_I": column("text_offset", num_samples, np.int64),
        "text_size_I": column("text_size", num_samples, np.int64),
        "checksum_I": column("checksum", num_samples, np.uint64),
    }
    fault_I = column("fault", num_samples, np.int8)
    start_I, key_start_I = (column(name, num_samples + 1, np.int64) for name in ("starts", "key_starts"))
    letters = column("letters", num_samples * _KEY_LETTERS, np.uint8)
    source = draw_source("native", min(num_samples, _DRAWN_TOGETHER), seed=0)  # the others have the same sizes
    for begin in range(0, num_samples, _DRAWN_TOGETHER):
        part = slice(begin, min(begin + _DRAWN_TOGETHER, num_samples))
        number_I = np.arange(part.start, part.stop)
        random = np.random.default_rng(begin)
        tokens_I, visual_I = source.tokens_I[: len(number_I)], source.visual_I[: len(number_I)]
        counts["tokens_I"][part], counts["visual_I"][part] = tokens_I, visual_I
        counts["images_I"][part], counts["labels_I"][part] = visual_I > 0, tokens_I // 3
        rows["shard_I"][part] = number_I // _SAMPLES_A_SHARD
        rows["text_offset_I"][part] = number_I % _SAMPLES_A_SHARD * 100_000 + 512
        rows["text_size_I"][part] = tokens_I * 4
        rows["checksum_I"][part] = random.integers(0, 1 << 64, len(number_I), np.uint64)
        start_I[part.start + 1 : part.stop + 1] = start_I[part.start] + np.cumsum(visual_I > 0)
        digits = number_I[:, None] // 10 ** np.arange(_KEY_LETTERS - 1, -1, -1) % 10 + ord("0")
        letters[part.start * _KEY_LETTERS : part.stop * _KEY_LETTERS] = digits.reshape(-1)
        key_start_I[part.start + 1 : part.stop + 1] = (number_I + 1) * _KEY_LETTERS
    num_pictures = int(start_I[-1])
    pictures = {
        "image_offset_P": column("image_offset", num_pictures, np.int64),
        "image_size_P": column("image_size", num_pictures, np.int32),
        "image_extension_P": column("image_extension", num_pictures, np.int16),
        "image_width_P": column("image_width", num_pictures, np.int32),
        "image_height_P": column("image_height", num_pictures, np.int32),
    }
    for begin in range(0, num_pictures, _DRAWN_TOGETHER):
        part = slice(begin, min(begin + _DRAWN_TOGETHER, num_pictures))
        number_P = np.arange(part.start, part.stop)
        pictures["image_offset_P"][part] = number_P % _SAMPLES_A_SHARD * 100_000 + 4096
        pictures["image_size_P"][part] = 90_000 + number_P % 4_999
        pictures["image_width_P"][part], pictures["image_height_P"][part] = 640 + number_P % 7, 480 + number_P % 5
    shards = []
    for first in range(0, num_samples, _SAMPLES_A_SHARD):
        path = folder / f"part-{first // _SAMPLES_A_SHARD:06d}.tar"
        num_rows = min(_SAMPLES_A_SHARD, num_samples - first)
        with path.open("wb") as file:
            file.truncate(num_rows * 100_000)
        shards.append(Shard(str(path), num_rows * 100_000, num_rows))
    keys = pa.LargeStringArray.from_buffers(num_samples, pa.py_buffer(key_start_I), pa.py_buffer(letters))
    index = ShardIndex(tuple(shards), ("jpg",), keys=keys, image_start_I=start_I, fault_I=fault_I, **rows, **pictures)
    write_index(index, folder / "index.parquet")
    name = f"counts-{_settings_hash(index, *_tools(directory), None)}.parquet"
    write_counts(SampleCounts(**counts, fault_I=fault_I), folder / name)
    shutil.rmtree(scratch)


def _tools(directory: Path) -> tuple:
    return load_tokenizer(directory / "model"), open_preprocessor(directory / "encoder")


def measure(folder: Path, directory: Path) -> tuple[dict[str, float], PackReader]:
    """Opens data and asks for two packs, in this process; returns the reader, too, so that the data stay open."""
    tokenizer, preprocessor = _tools(directory)
    spec = DataSpec([folder], _SEQ_LENGTH, _VISUAL_SEQ_LENGTH, seed=1)
    result = {"before_mib": private_mib()}
    with PeakMemory() as peak:
        started, cpu_started = time.perf_counter(), time.process_time()
        reader = open_reader(spec, tokenizer, preprocessor)
        result["open_s"], result["open_cpu_s"] = time.perf_counter() - started, time.process_time() - cpu_started
    plan = reader.plan
    result["peak_mib"] = peak.mib
    result["fingerprint_cpu_s"] = _cpu_seconds(lambda: plan.fingerprint())
    fresh_plan = type(plan)(plan.sources, plan.seq_length, plan.visual_seq_length, plan.seed, plan.window)
    result["first_pack_cpu_s"] = _cpu_seconds(lambda: fresh_plan.pack(0))
    middle = plan.num_windows // 2
    first_pack = len(plan.window_packs(0)) * middle
    mark = plan._mark(middle, first_pack)
    resumed = type(plan)(plan.sources, plan.seq_length, plan.visual_seq_length, plan.seed, plan.window)
    resumed.fingerprint()  # compared on resuming, and counted above

    def resume() -> None:
        resumed.resume_from(mark)
        resumed.pack(first_pack + 1)

    result["resume_cpu_s"] = _cpu_seconds(resume)
    result["private_mib"] = private_mib()
    result["uss_mib"] = psutil.Process().memory_full_info().uss / _MIB
    return result, reader


def private_mib() -> float:
    """Memory of this process that no file stands behind."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024


class PeakMemory:
    """The highest `private_mib` within a block, looked at 50 times a second."""

    def __enter__(self) -> "PeakMemory":
        self.mib, self._done = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.mib = max(self.mib, private_mib())


def _cpu_seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dir", type=Path, required=True, help="of the demo, for its tokenizer and encoder")
    add("--samples", type=int, nargs="+", default=[1_000_000], help="sizes of the data (default: 1,000,000)")
    add("--folder", type=Path, help="for the drawn data, which stay there (default: a temporary one)")
    add("--measure", type=Path, help=argparse.SUPPRESS)  # what a process of a row does
    options = parser.parse_args()
    if options.measure:
        result, reader = measure(options.measure, options.dir)
        print(json.dumps(result), flush=True)
        sys.stdin.read()
        reader.close()
        return
    with tempfile.TemporaryDirectory() as temporary:
        for num_samples in options.samples:
            folder = (options.folder or Path(temporary)) / str(num_samples)
            draw(folder, num_samples, options.dir)
            _print_row(num_samples, folder, options.dir)
            if options.folder is None:
                shutil.rmtree(folder)


def _print_row(num_samples: int, folder: Path, directory: Path) -> None:
    readers = []
    for _ in range(2):
        command = [sys.executable, __file__, "--dir", str(directory), "--measure", str(folder)]
        reader = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert reader.stdout is not None
        readers.append(reader)
        result = json.loads(reader.stdout.readline())
        print(f"{num_samples:,}", {name: round(value, 2) for name, value in result.items()}, flush=True)
    for reader in readers:
        reader.communicate()


if __name__ == "__main__":
    main()
