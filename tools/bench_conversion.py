"""Measures both conversions on a synthetic 3B-parameter model: memory, and time against cp + sync.

    python tools/bench_conversion.py --dir /data/scratch          # 20 GB free, about five minutes

Memory is anonymous plus shared memory of the whole process tree, above that of the same command with --dry-run.
"""

import argparse
import tempfile
from pathlib import Path

from tools.benchmarks.conversion import benchmark


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="where to work; what is written there is removed again")
    parser.add_argument("--layers", type=int, nargs="+", default=[36, 18], help="depths to measure (default: 36 18)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, of which the median counts (default: 3)")
    options = parser.parse_args()
    options.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.dir) as directory:
        print(benchmark(Path(directory), options.layers, options.repeats))


if __name__ == "__main__":
    main()
