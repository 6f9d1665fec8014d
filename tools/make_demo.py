#!/usr/bin/env python
"""Makes the demo's model, encoder and shards in a directory. No download; parts that are there are kept."""

import argparse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--dir", default="runs/demo", help="where to make model/, encoder/ and shards/")
    args = parser.parse_args()

    from laver_megatron.demo import make_demo  # torch and transformers: too slow for --help

    make_demo(args.dir)


if __name__ == "__main__":
    main()
