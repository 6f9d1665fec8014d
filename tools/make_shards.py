#!/usr/bin/env python
"""Makes WebDataset shards, with an index, of LLaVA JSON, FineVision or LLaVA-OneVision Parquet, or tars.

    python tools/make_shards.py --source blip_laion_cc_sbu_558k.json --images images/ --output shards/llava-558k
    python tools/make_shards.py --source FineVision/ai2d FineVision/chartqa --min-relevance 4 --output shards/finevision
    python tools/make_shards.py --source LLaVA-OneVision-Data/ --output shards/onevision --num-workers 16

JPEG, PNG and WebP are copied byte for byte, other pictures become PNG. Unusable samples are counted by reason, and end
the work only when they are more than --max-bad-fraction. Interrupted work goes on with --resume.
"""

import argparse
import logging
import os
import sys
from pathlib import Path

from laver_megatron.shards import FORMATS, RATINGS, MakeSettings, make_shards


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--source",
        dest="sources",
        type=Path,
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, or folders of them",
    )
    add("--format", dest="format_name", choices=FORMATS, help="default: found out from the files")
    add("--images", type=Path, metavar="FOLDER", help="where LLaVA's pictures are; names may not lead out of it")
    add("--output", type=Path, required=True, metavar="DIR", help="the folder of the shards")
    add("--samples-per-shard", type=int, default=10_000, metavar="N", help="records a shard at most (default: 10000)")
    add("--max-shard-bytes", type=int, default=10**9, metavar="B", help="bytes a shard at most (default: 1000000000)")
    add("--num-workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: one a core)")
    for name in RATINGS:
        add(f"--min-{name.replace('_', '-')}", type=float, metavar="X", help="drops turns of Parquet files with less")
    add("--max-bad-fraction", type=float, default=0.01, metavar="X", help="unusable samples allowed (default: 0.01)")
    add("--decode-images", action="store_true", help="decode every picture to its end, which finds garbled ones; slow")
    add("--images-in-answers", action="store_true", help="<image> in an answer stands for a picture, not for the word")
    add("--tokenizer", type=Path, metavar="DIR", help="counts text tokens in the summary, instead of words")
    mode = parser.add_mutually_exclusive_group().add_argument
    mode("--overwrite", dest="mode", action="store_const", const="overwrite", default="new", help="start anew")
    mode("--resume", dest="mode", action="store_const", const="resume", default="new", help="keep finished shards")
    settings = vars(parser.parse_args(arguments))
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    minima = {name: settings.pop(f"min_{name}") for name in RATINGS}
    ratings = {name: least for name, least in minima.items() if least is not None}
    try:
        report = make_shards(MakeSettings(**settings, min_ratings=ratings))
    except (ValueError, OSError) as error:
        print(f"make_shards: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("make_shards: interrupted; go on with --resume", file=sys.stderr)
        return 130
    print(report.summary(has_tokenizer=settings["tokenizer"] is not None))
    return 0


if __name__ == "__main__":
    sys.exit(main())
