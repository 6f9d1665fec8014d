#!/usr/bin/env python
"""Trains several stages in order, each from the one before: configuration files, then flags for all of them.

    python tools/train_stages.py examples/stage1_align.yaml examples/stage2_laver.yaml examples/stage3_instruct.yaml
    python tools/train_stages.py STAGE1.yaml STAGE2.yaml STAGE3.yaml --baseline
    python tools/train_stages.py STAGE1.yaml STAGE2.yaml STAGE3.yaml --runs runs/clip --encoder CLIP_DIR

On a cluster every node runs the same command, such as by srun --ntasks-per-node 1. A finished stage is skipped, an
interrupted one goes on from its last checkpoint: the same command again does what is left. Any flag of
examples/pretrain_laver.sh is passed on to all stages, --load to the first alone; those that each stage has of its own
(--run-dir, --finetune, --laver) are refused. Exits with 0 when all stages are finished, 1 if a frozen weight has
changed, 2 for bad input, 3 if a stage has stopped early (--exit-interval), else with that of the stage that failed.
"""

import argparse
import sys
from itertools import takewhile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also where the package is not installed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        usage="%(prog)s CONFIG [CONFIG ...] [options below] [--any-field value ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--baseline", action="store_true", help="the same stages without LaVer, in RUN_DIR-baseline each")
    add("--runs", metavar="DIR", help="DIR/NAME-OF-THE-FILE for each stage, in place of the files' run directories")
    add("--compare-weights", action="store_true", help="at the end, read which weights each stage has changed")
    add("--dry-run", action="store_true", help="check all stages, without weights and shards, and stop")
    words = sys.argv[1:] if arguments is None else arguments
    files = list(takewhile(lambda word: not word.startswith("-"), words))
    options, flags = parser.parse_known_args(words[len(files) :])
    if not files:
        parser.error("name the configuration files of the stages first, in order")

    from laver_megatron.config.command_line import exit_on_config_error  # torch, too slow for --help
    from laver_megatron.stages.chain import check_stages, read_stages, run_stages
    from laver_megatron.stages.report import report_stages

    with exit_on_config_error():
        stages = read_stages(files, flags, baseline=options.baseline, runs=options.runs)
        check_stages(stages, dry_run=options.dry_run)
    if options.dry_run:
        print("\n".join(f"{stage.name}: nothing wrong; {' '.join(stage.arguments)}" for stage in stages))
        return 0
    return run_stages(stages) or report_stages(stages, compare_weights=options.compare_weights)


if __name__ == "__main__":
    sys.exit(main())
