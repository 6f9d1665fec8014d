#!/usr/bin/env python
"""Chooses a seeded subset of shards' samples, as an index over the same tars: the shards themselves are not copied.

    python tools/subset_shards.py --index shards/ --num-samples 800000 --seed 1 --output subset-800k.parquet
    python tools/subset_shards.py --index shards/ --num-samples 2000000 --seed 1 --output subset-2m.parquet

With the same seed the smaller subset lies within the larger one. Train with the file as --data-path. The manifest hash
says which samples were chosen: it is printed, and stands in the file.
"""

import argparse
import logging
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--index", nargs="+", required=True, metavar="PATH", help="folders of shards, indexes, tars or globs of tars")
    add("--num-samples", type=int, required=True, metavar="N", help="usable samples to choose")
    add("--seed", type=int, default=1, metavar="N", help="another seed chooses other samples (default: 1)")
    add("--output", type=Path, required=True, metavar="FILE", help="the subset's index; its name ends with .parquet")
    add("--num-workers", type=int, default=1, metavar="N", help="processes, for tars that have no index (default: 1)")
    add("--overwrite", action="store_true", help="replace a file that is there")
    options = parser.parse_args(arguments)

    from laver_megatron.data.index.opening import open_indexes
    from laver_megatron.data.index.shard_index import concatenate
    from laver_megatron.shards.subset import write_subset

    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    try:
        if options.output.suffix != ".parquet":
            raise ValueError(f"--output {options.output} must end with .parquet")
        if options.output.exists() and not options.overwrite:
            raise ValueError(f"--output {options.output} is there already; replace it with --overwrite")
        indexes = open_indexes(options.index, options.num_workers, reads_shards=False)
        manifest = write_subset(concatenate(indexes), options.num_samples, options.seed, options.output)
    except (ValueError, OSError) as error:
        print(f"subset_shards: {error}", file=sys.stderr)
        return 1
    print(f"{manifest.num_samples:,} of {manifest.of_samples:,} samples, seed {manifest.seed}: {options.output}")
    print(f"manifest hash: {manifest.hash}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
