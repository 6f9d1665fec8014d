#!/usr/bin/env python
"""Makes the runs of a scaling study: sizes x amounts of data or compute x LaVer on and off x seeds.

    python tools/make_sweep.py --models examples/scaling/{0.5b,1.5b,3b,7b}.yaml --tokens 2e8 5e8 1e9 --output runs/sweep
    python tools/make_sweep.py --models examples/scaling/{0.5b,1.5b,3b,7b}.yaml --flops 1e19 3e19 1e20 --output runs/iso
    python tools/make_sweep.py --base base.yaml --models MODEL_DIR ... --subsets s1.parquet s2.parquet --output runs/sub

Any flag of examples/pretrain_laver.sh that is not an option here goes to all runs. What comes out: configs/NAME.yaml,
manifest.csv (N, tokens and exact FLOPs of every run, before it has run), run.sh for one machine, and submit.sh, which
submits array.sh to SLURM. The same command again does what is left. Then fit: tools/fit_scaling_law.py --registry
DIR/runs --arm-by laver --output LAW. The data are opened and their tokens counted, which is kept beside their index.
"""

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where the package is not installed


def main(arguments: list[str] | None = None) -> int:
    from laver_megatron.studies.sweep_command import add_options, make_sweep

    parser = argparse.ArgumentParser(
        usage="%(prog)s --models MODEL [MODEL ...] (--iterations|--tokens|--flops|--subsets) X [X ...] --output DIR "
        "[options below] [--any-field value ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_options(parser)
    options, flags = parser.parse_known_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        make_sweep(options, flags)
    except (ValueError, OSError) as error:
        print(f"make_sweep: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
