"""`laver curves`: the training curves of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from laver_megatron.program import program, program_parser

DESCRIPTION = """
Draws the training curves of a run: losses, similarities, norms and rates, from its metrics.jsonl.
"""


@program
def main(argv: Sequence[str] | None = None) -> None:
    """Draws them and prints the picture's path."""
    parser = program_parser("curves", DESCRIPTION, ["runs/demo", "runs/demo/metrics.jsonl --output demo.png"])
    parser.add_argument("run", type=Path, help="a run directory, or its metrics.jsonl")
    parser.add_argument("--output", type=Path, help="the picture (default: curves.png beside metrics.jsonl)")
    options = parser.parse_args(argv)

    from laver_megatron.run_log.curves import draw_curves  # matplotlib: too slow for --help

    metrics = options.run / "metrics.jsonl" if options.run.is_dir() else options.run
    output = options.output or metrics.with_name("curves.png")
    draw_curves(metrics, output)
    print(output)
