"""Measures how full packs get on data sets drawn from stated sizes, against what the sizes allow, and the time.

python tools/bench_packing.py                               # a million samples of each, some minutes
python tools/bench_packing.py --data native --samples 20000

Where packs are far from each budget's own bound, that of both together takes seconds more, and scipy.
"""

import argparse

from tools.benchmarks.packing import DATA_SETS, benchmark


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=DATA_SETS, default=DATA_SETS, help="which ones (default: all)")
    parser.add_argument("--samples", type=int, default=1_000_000, help="of each (default: 1,000,000)")
    parser.add_argument("--seq-length", type=int, default=4096, help="tokens of a pack (default: 4096)")
    parser.add_argument("--window", type=int, default=10_000, help="samples packed together (default: 10,000)")
    parser.add_argument("--multiple-of", type=int, default=8, help="of the proposed visual budget (default: 8)")
    options = parser.parse_args()
    print(benchmark(options.data, options.samples, options.seq_length, options.window, options.multiple_of))


if __name__ == "__main__":
    main()
