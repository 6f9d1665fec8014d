"""Fits L(N, D) = E + A / N^a + B / D^b to the runs of a study: table (JSON, CSV) and pictures (PNG).

    python tools/fit_scaling_law.py --registry runs/sweep --arm-by laver --output study
    python tools/fit_scaling_law.py --registry runs/sweep --where laver=true --column last.student_visual_similarity \\
        --ceiling 1 --output similarity
    python tools/fit_scaling_law.py --points chinchilla.csv --size-column 'Model Size' --flops-column 'Training FLOP' \\
        --drop-highest 5 --output chinchilla
    python tools/fit_scaling_law.py --registry runs/7b runs/7b-baseline --arm-by laver --no-law --output compared

--registry reads the run_summary.json that every run leaves. With --arm-by, and two arms, LaVer is compared with plain
training: as measured, over pairs of runs of the same size, seed and data; and by the laws at equal data and at equal
FLOPs, its overhead charged. Runs that are unfinished, NaN, double or damaged are refused by name. Qwen2.5 checkpoints
are pretrained: what is fitted to runs that start from them is a law of continued training. A column that rises toward a
limit, such as a similarity, is fitted as its distance from --ceiling.
"""

import argparse
import sys

from laver_megatron.studies.fit_command import add_options, fit_and_write


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    options = parser.parse_args(arguments)
    try:
        fit_and_write(options)
    except (ValueError, OSError) as error:
        print(f"fit_scaling_law: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
