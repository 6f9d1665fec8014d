"""`laver status RUN_DIR`: what a run is doing, from its directory alone, on any host that sees it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from laver_megatron.program import program, program_parser
from laver_megatron.resilience.status_report import report_text, run_report

_WATCH_SECONDS = 5.0


@program
def main(argv: Sequence[str] | None = None) -> None:
    """Prints the status of a run, once or again and again."""
    parser = program_parser(
        "status",
        "Says what a run is doing, or how it ended: its iteration, loss and speed, where its time went, its last "
        "checkpoint and restarts.",
        ["runs/mine", "runs/mine --watch", "runs/mine --json"],
    )
    parser.add_argument("run_dir", type=Path, help="the --run-dir of the run")
    parser.add_argument("--json", action="store_true", help="print one JSON object on a line")
    parser.add_argument("--watch", action="store_true", help=f"print it every {_WATCH_SECONDS:.0f} s until Ctrl-C")
    arguments = parser.parse_args(argv)
    while True:
        report = run_report(arguments.run_dir)
        sys.stdout.write(json.dumps(report) + "\n" if arguments.json else report_text(arguments.run_dir, report))
        sys.stdout.flush()
        if not arguments.watch:
            return
        time.sleep(_WATCH_SECONDS)
