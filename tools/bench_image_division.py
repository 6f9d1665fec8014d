"""Measures how evenly the image encoder's work is divided over tensor-parallel ranks: how far the rank that is farthest
from the mean is from it, in FLOPs, on random batches of at least 16 images, none of more than a quarter of all tokens.

    python tools/bench_image_division.py
    python tools/bench_image_division.py --tensor-model-parallel-size 2 --most-tokens 16384
"""

import argparse

from tools.benchmarks.image_division import benchmark


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--tensor-model-parallel-size", type=int, nargs="+", default=[2, 4, 8], help="numbers of ranks (default: 2 4 8)"
    )
    add("--most-tokens", type=int, nargs="+", default=[2048, 8192], help="of an image (default: 2048 8192)")
    add("--batches", type=int, default=1000, help="for each line (default: 1000)")
    add("--seed", type=int, default=0)
    options = parser.parse_args()
    print(benchmark(options.tensor_model_parallel_size, options.batches, options.most_tokens, options.seed))


if __name__ == "__main__":
    main()
