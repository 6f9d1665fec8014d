#!/usr/bin/env python
"""Makes the demo's model, encoder and shards in a directory. No download; parts that are there are kept."""

import argparse

from laver_megatron.demo import make_demo
from laver_megatron.demo.make import NUM_TRAIN_SAMPLES, NUM_VALID_SAMPLES


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--dir", default="runs/demo", help="where to make model/, encoder/ and shards/")
    parser.add_argument(
        "--num-train-samples", type=int, default=NUM_TRAIN_SAMPLES, help="samples in train-*.tar"
    )
    parser.add_argument(
        "--num-valid-samples", type=int, default=NUM_VALID_SAMPLES, help="samples in valid-*.tar"
    )
    args = parser.parse_args()
    make_demo(args.dir, num_train_samples=args.num_train_samples, num_valid_samples=args.num_valid_samples)


if __name__ == "__main__":
    main()
