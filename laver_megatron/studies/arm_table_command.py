"""`laver arm-table`: the arms of a sweep against its baseline, as Markdown and a picture."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from laver_megatron.program import program, program_parser

DESCRIPTION = """
Compares the arms of a sweep with its baseline: the differences of runs with the same seed in validation loss, in
answer_accuracy of each family of tasks and in the collapse monitors, with 95% intervals. Writes table.md and arms.png.
"""
TABLE, PICTURE = "table.md", "arms.png"


@program
def main(argv: Sequence[str] | None = None) -> None:
    """Reads the sweep, prints the table and writes both files."""
    parser = program_parser(
        "arm-table",
        DESCRIPTION,
        ["runs/ablation/sweep --output runs/ablation", "runs/gpu/sweep --baseline both --output runs/gpu/table"],
    )
    add = parser.add_argument
    add("sweep", type=Path, metavar="DIR", help="what `laver sweep --output` made, its runs finished")
    add("--baseline", default="baseline", metavar="ARM", help="the arm that the others are compared with")
    add("--output", type=Path, required=True, metavar="DIR", help="where the table and the picture go")
    options = parser.parse_args(argv)

    from laver_megatron.runtime.files import write_text
    from laver_megatron.studies.arm_plots import draw_arms
    from laver_megatron.studies.arm_table import find_baseline, markdown, read_results

    arms, left = read_results(options.sweep)
    baseline = find_baseline(arms, options.baseline)
    options.output.mkdir(parents=True, exist_ok=True)
    text = markdown(arms, baseline, left)
    write_text(options.output / TABLE, text)
    draw_arms(arms, baseline, options.sweep, options.output / PICTURE)
    print(text, end="")
    print(f"{options.output / TABLE}, {options.output / PICTURE}", file=sys.stderr)
