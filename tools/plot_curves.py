"""Draw the training curves of a run: python tools/plot_curves.py runs/demo [--output curves.png]"""

import argparse
import sys
from pathlib import Path

from laver_megatron.run_log.curves import draw_curves


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw the training curves of a run.")
    parser.add_argument("run", type=Path, help="a run directory, or its metrics.jsonl")
    parser.add_argument("--output", type=Path, help="the picture (default: curves.png beside metrics.jsonl)")
    options = parser.parse_args(arguments)
    metrics_path = options.run / "metrics.jsonl" if options.run.is_dir() else options.run
    output = options.output or metrics_path.with_name("curves.png")
    try:
        draw_curves(metrics_path, output)
    except (OSError, ValueError) as error:
        print(f"plot_curves: {error}", file=sys.stderr)
        return 1
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
