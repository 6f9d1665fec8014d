#!/usr/bin/env python
"""Measures tools/make_shards.py against `tar` of the same files: LLaVA's JSON and a folder of JPEGs.

python tools/bench_make_shards.py --dir /data/scratch --num-samples 10000 --num-workers 1 2
"""

import argparse
import tempfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dir", type=Path, required=True, help="where to work; what is written there is removed again")
    add("--num-samples", type=int, default=10_000, metavar="N", help="of about 110 kB (default: 10000)")
    add("--num-workers", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="processes (default: 0 1 2)")
    add("--repeats", type=int, default=3, metavar="N", help="rounds, of which the median counts (default: 3)")
    options = parser.parse_args()

    from tools.benchmarks.shards import benchmark

    options.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.dir) as directory:
        print(benchmark(Path(directory), options.num_samples, options.num_workers, options.repeats))


if __name__ == "__main__":
    main()
