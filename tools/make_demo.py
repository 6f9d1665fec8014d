#!/usr/bin/env python
"""Makes the demo's model, encoder and shards in a directory. No download; parts that are there are kept."""

import argparse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--dir", default="runs/demo", help="where to make model/, encoder/ and shards/")
    parser.add_argument(
        "--encoders", nargs="+", default=[], metavar="KIND",
        help="make encoder_KIND/ as well: siglip, clip, dinov2, dinov2_with_registers, aimv2, aimv2_fixed, qwen2_5_vl "
        "or patches",
    )  # fmt: skip
    args = parser.parse_args()

    from laver_megatron.demo import make_demo  # torch and transformers: too slow for --help

    try:
        make_demo(args.dir, encoders=args.encoders)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
