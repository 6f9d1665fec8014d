"""`laver scores`: the result folders of lmms-eval and VLMEvalKit as one table."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from laver_megatron.program import program, program_parser
from laver_megatron.scores.comparison import make_table
from laver_megatron.scores.report import FORMS, table_text, write_table

DESCRIPTION = """
Reads the folders that lmms-eval (--output_path) and VLMEvalKit (--work-dir) wrote, one for each model, into one table:
a row for each benchmark, its type, gains over the baseline, and the means over each type and over all (OCRBench divided
by 10). Where a kit wrote the score of every sample (lmms-eval: --log_samples), differences are tested over the same
samples. Benchmarks are compared within one kit. VLMEvalKit's xlsx files need openpyxl.
"""
EXAMPLES = [
    "scores/baseline scores/laver",
    "scores/baseline scores/ga scores/cga --output table.md",
    "outputs/laver outputs/baseline --baseline outputs/baseline --output table.json",
]


@program
def main(argv: Sequence[str] | None = None) -> None:
    """Reads the options and the folders; prints the table, and writes it."""
    parser = program_parser("scores", DESCRIPTION, EXAMPLES)
    parser.add_argument("directories", type=Path, nargs="+", metavar="DIR", help="results of one model each")
    parser.add_argument("--baseline", type=Path, metavar="DIR", help="one of them (default: the first)")
    parser.add_argument("--output", type=Path, metavar="FILE", help=f"also write it there: {', '.join(FORMS)}")
    options = parser.parse_args(argv)
    _check(options)
    table = make_table(options.directories, options.baseline or options.directories[0])
    if options.output is not None:
        write_table(table, options.output)
    print(table_text(table))


def _check(options: argparse.Namespace) -> None:
    directories, output = options.directories, options.output
    if repeated := sorted({str(it) for it in directories if directories.count(it) > 1}):
        raise ValueError(f"{', '.join(repeated)} is named twice; name every folder once")
    if options.baseline not in (None, *directories):
        raise ValueError(
            f"--baseline {options.baseline} is none of {', '.join(map(str, directories))}; name one of them"
        )
    if output is not None and output.suffix not in FORMS:
        raise ValueError(f"--output {output} must end in one of {', '.join(FORMS)}")
    if output is not None and not output.absolute().parent.is_dir():
        raise FileNotFoundError(2, "no such folder", str(output.parent))
