"""`laver stages`: several stages of training in order."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import takewhile

from laver_megatron.program import program, program_parser

DESCRIPTION = """
Trains several stages in order, each from the one before: configuration files, then flags for all of them.

On a cluster every node runs the same command, such as by srun --ntasks-per-node 1. A finished stage is skipped, an
interrupted one resumes from its last checkpoint: the same command does what is left. Any flag of `laver train` is
passed on to all stages, --load to the first alone; those that each stage has of its own (--run-dir, --finetune,
--laver) are refused. Exits with 0 when all stages are finished, 1 if a frozen weight has changed, 2 for bad input, 3 if
a stage has stopped early (--exit-interval), else with that of the stage that failed.
"""


@program
def main(argv: Sequence[str] | None = None) -> None:
    """Checks all stages, then runs what is not finished."""
    examples = [
        "examples/stage1_align.yaml examples/stage2_laver.yaml examples/stage3_instruct.yaml",
        "STAGE1.yaml STAGE2.yaml STAGE3.yaml --runs runs/clip --encoder CLIP_DIR",
    ]
    usage = "%(prog)s CONFIG [CONFIG ...] [options below] [--any-field value ...]"
    parser = program_parser("stages", DESCRIPTION, examples, usage=usage, allow_abbrev=False)
    add = parser.add_argument
    add("--baseline", action="store_true", help="the same stages without LaVer, in RUN_DIR-baseline each")
    add("--runs", metavar="DIR", help="DIR/NAME-OF-THE-FILE for each stage, in place of the files' run directories")
    add("--compare-weights", action="store_true", help="at the end, read which weights each stage has changed")
    add("--dry-run", action="store_true", help="check all stages, without weights and shards, and stop")
    words = sys.argv[1:] if argv is None else argv
    files = list(takewhile(lambda word: not word.startswith("-"), words))
    options, flags = parser.parse_known_args(words[len(files) :])
    if not files:
        parser.error("name the configuration files of the stages first, in order")

    from laver_megatron.stages.chain import check_stages, read_stages, run_stages  # torch, too slow for --help
    from laver_megatron.stages.report import report_stages

    stages = read_stages(files, flags, baseline=options.baseline, runs=options.runs)
    check_stages(stages, dry_run=options.dry_run)
    if options.dry_run:
        print("\n".join(f"{stage.name}: nothing wrong; {' '.join(stage.arguments)}" for stage in stages))
    elif status := run_stages(stages) or report_stages(stages, compare_weights=options.compare_weights):
        sys.exit(status)
