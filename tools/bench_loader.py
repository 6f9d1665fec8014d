"""Measures the loader in samples/s against the bare loop "open tar, decode JPEG, resize" on the same files.

    python tools/bench_loader.py --dir runs/demo --image-size 384 --patch-size 16     # the size of many encoders

Makes shards of photographs (640 x 480, JPEG) in a temporary folder. Both sides make the pixels that the encoder's image
processor makes, in the same number of processes; the files are in the system's cache.
"""

import argparse
import tempfile
from pathlib import Path

from laver_megatron.encoders import open_preprocessor
from laver_megatron.hf.tokenizer import load_tokenizer
from tools.benchmarks.loader import benchmark, make_shards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="holds model/ (a tokenizer) and encoder/")
    parser.add_argument("--image-size", type=int, help="pixels on a side that the encoder sees (default: its own)")
    parser.add_argument("--patch-size", type=int, help="pixels on a side of a visual token (default: its own)")
    parser.add_argument("--num-workers", type=int, nargs="+", default=[0, 1, 2], help="processes (default: 0 1 2)")
    parser.add_argument("--samples", type=int, default=1200, help="samples to read (default: 1200)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each, of which the median counts (default: 3)")
    options = parser.parse_args()
    preprocessor = open_preprocessor(options.dir / "encoder")
    if options.image_size:
        size = {"height": options.image_size, "width": options.image_size}
        preprocessor.processor.size = type(preprocessor.processor.size)(**size)
        preprocessor.height = preprocessor.width = options.image_size
    preprocessor.patch_size = options.patch_size or preprocessor.patch_size
    with tempfile.TemporaryDirectory() as directory:
        make_shards(Path(directory), 12, options.samples // 12)
        tokenizer = load_tokenizer(options.dir / "model")
        print(benchmark(Path(directory), tokenizer, preprocessor, options.num_workers, options.repeats))


if __name__ == "__main__":
    main()
