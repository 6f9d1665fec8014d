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
    parser.add_argument(
        "--models", nargs="+", default=[], metavar="SIZE",
        help="make model_SIZE/ as well: WIDTHxLAYERS, such as 64x3; a ladder for scaling studies",
    )  # fmt: skip
    parser.add_argument("--num-train-samples", type=int, default=384, metavar="N", help="training samples")
    args = parser.parse_args()

    from laver_megatron.demo import make_demo  # torch and transformers: too slow for --help

    try:
        make_demo(args.dir, num_train_samples=args.num_train_samples, encoders=args.encoders, models=args.models)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
