"""`laver fit`: a scaling law of the runs of a study."""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from laver_megatron.program import program, program_parser
from laver_megatron.runtime.files import write_text
from laver_megatron.studies.fit_output import PICTURES, TABLES, measured_text, study_text, write_measured, write_tables
from laver_megatron.studies.fitted_study import FitSettings, fit_study
from laver_megatron.studies.pairs import compare_with_baseline
from laver_megatron.studies.registry import FAULTS, SIZE_PARTS, TOKEN_KINDS
from laver_megatron.studies.study import (
    CONTINUED_TRAINING,
    OF_THE_LOSS,
    SEED_COLUMN,
    Study,
    study_of_csv,
    study_of_registry,
)

DESCRIPTION = """
Fits L(N, D) = E + A / N^a + B / D^b to the runs of a study: tables (JSON, CSV) and pictures (PNG).

--registry reads the run_summary.json that every run leaves. With --arm-by, and two arms, LaVer is compared with plain
training: as measured, over pairs of runs of the same size, seed and data; and by the laws at equal data and at equal
FLOPs, its overhead charged. Runs that are unfinished, NaN, double or damaged are refused by name. Qwen2.5 checkpoints
are pretrained: what is fitted to runs that start from them is a law of continued training. A column that rises toward a
limit, such as a similarity, is fitted as its distance from --ceiling.
"""
EXAMPLES = [
    "--registry runs/sweep --arm-by laver --output study",
    "--registry runs/sweep --where laver=true --column last.student_visual_similarity --ceiling 1 --output similarity",
    "--points chinchilla.csv --size-column 'Model Size' --flops-column 'Training FLOP' --output chinchilla",
    "--registry runs/7b runs/7b-baseline --arm-by laver --no-law --output compared",
    "--registry runs/ablation --arm-by arm --baseline plain --no-law --output compared",
]
# Fewer resamples have no percentiles worth the name.
_FEWEST_RESAMPLES = 20
# Below, rounding decides; above, residuals of a factor of e are still squared, and nothing changes any more.
_DELTAS = (1e-12, 1.0)
_MOST_FLOPS = 1e35  # beyond, best sizes leave the range in which they are looked for
_RUNS = "runs.csv"


@program
def main(argv: Sequence[str] | None = None) -> None:
    """Reads the options, fits, and writes tables and pictures."""
    fit_and_write(build_parser().parse_args(argv))


def build_parser() -> argparse.ArgumentParser:
    parser = program_parser("fit", DESCRIPTION, EXAMPLES)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--registry", nargs="+", metavar="DIR", help="run directories, or folders of them at any depth")
    source.add_argument(
        "--points", type=Path, metavar="CSV",
        help=f"plain points instead: N, D (or FLOPs: D = C / 6N), loss; a column {SEED_COLUMN} tells repeats apart",
    )  # fmt: skip
    add("--output", type=Path, required=True, metavar="DIR", help="where tables and pictures go")
    add("--column", help="what is fitted, a path in run_summary.json (default: validation.last.lm_loss; of --points: "
        "loss)")  # fmt: skip
    add("--ceiling", type=float, metavar="LIMIT", help="the column rises toward this limit: fit its distance from it")
    add("--arm-by", metavar="COLUMN", help="fit the runs of each value of this column separately, such as laver")
    add("--where", action="append", default=[], type=_column_and_value, metavar="COLUMN=VALUE",
        help="only runs with this value there, such as laver=true; may be repeated: all must hold")  # fmt: skip
    add("--baseline", default="baseline", metavar="ARM", help="the arm to compare with (default: baseline)")
    add("--leave-out", nargs="+", choices=FAULTS, default=[], help="leave out runs with these faults, do not stop")
    add("--allow-differences", nargs="+", default=[], metavar="SETTING",
        help="compare two arms although these settings of their data or validation differ")  # fmt: skip
    add("--no-law", action="store_true",
        help="only compare arms with the baseline by their pairs of runs; two runs are enough")  # fmt: skip
    add("--drop-highest", type=int, default=0, metavar="K", help="leave out the K highest values of each arm")
    add("--size-parts", nargs="+", default=SIZE_PARTS, metavar="PART",
        help=f"what N counts (default: {' '.join(SIZE_PARTS)})")  # fmt: skip
    add("--tokens", choices=TOKEN_KINDS, default="total", help="what D counts (default: total)")
    add("--size-column", default="N", metavar="NAME", help="of --points (default: N)")
    add("--tokens-column", default="D", metavar="NAME", help="of --points (default: D)")
    add("--flops-column", default="FLOPs", metavar="NAME", help="of --points (default: FLOPs)")
    add("--resamples", type=int, default=1000, metavar="K",
        help="of the bootstrap, at least 20; 0: no intervals (default: 1000)")  # fmt: skip
    add("--level", type=float, default=0.95, help="of the intervals (default: 0.95)")
    add("--delta", type=float, default=1e-3, help="of the Huber loss of log residuals (default: 0.001)")
    add("--budgets", type=float, nargs="+", default=[], metavar="FLOPS", help="also look at these, such as 1e24")
    add("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    return parser


def _column_and_value(text: str) -> tuple[str, str]:
    column, equals, value = text.partition("=")
    if not (column and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not COLUMN=VALUE, such as laver=true")
    return column, value


def fit_and_write(options: argparse.Namespace) -> None:
    """Writes nothing unless everything could be fitted, or compared. Raises ValueError for the reasons why not."""
    if problems := [*_problems(options)]:
        raise ValueError("; ".join(problems))
    column = options.column or ("validation.last.lm_loss" if options.registry else "loss")
    study = _read(options, column)
    left_out = [str(fault) for fault in study.registry.left_out] if study.registry else []
    notes = [*(f"left out: {text}" for text in left_out), *study.notes]
    arms = {name: arm.without_highest(options.drop_highest) for name, arm in study.arms.items()}
    if options.no_law:
        measured = compare_with_baseline(arms, options.baseline, options.level)
        if not any(one.pairs for one in measured):
            raise ValueError(measured[0].notes[0])
        text, files = measured_text(measured, options.level, notes), write_measured(measured, options.output)
    else:
        from laver_megatron.studies.fit_plots import draw_study  # matplotlib takes a second to import

        settings = FitSettings(
            options.resamples, options.seed, options.delta, options.level, tuple(options.budgets), options.baseline
        )
        fitted = fit_study(arms, settings, [CONTINUED_TRAINING, *notes] if study.registry else notes)
        text, files = study_text(fitted), write_tables(fitted, options.output, _facts(options, column, left_out))
        files += draw_study(fitted, options.output)
    if study.registry is not None:
        write_text(options.output / _RUNS, study.registry.to_csv())
        files.append(options.output / _RUNS)
    print(text)
    _remove_stale(options.output, files)
    print(f"written to {options.output}: {', '.join(file.name for file in files)}", file=sys.stderr)


def _read(options: argparse.Namespace, column: str) -> Study:
    def given(*names: str) -> dict[str, Any]:
        return {name: getattr(options, name) for name in ("arm_by", "where", "ceiling", *names)}

    if options.registry:
        taken = given("baseline", "size_parts", "tokens", "leave_out", "allow_differences")
        return study_of_registry(options.registry, column, **taken)
    return study_of_csv(options.points, column, **given("size_column", "tokens_column", "flops_column"))


def _facts(options: argparse.Namespace, column: str, left_out: list[str]) -> dict[str, Any]:
    """What law.json says of the study."""
    facts: dict[str, Any] = {"column": column, "ceiling": options.ceiling, "drop_highest": options.drop_highest}
    facts["where"] = [f"{name}={value}" for name, value in options.where]
    if options.registry:
        facts |= {"registry": list(options.registry), "size_parts": list(options.size_parts)}
        facts |= {"tokens": options.tokens, "left_out": left_out}
    else:
        facts["points"] = str(options.points)
    return facts


def _remove_stale(directory: Path, written: Sequence[Path]) -> None:
    """Files of an earlier study that this one does not write, such as differences of arms, would pass for its own."""
    for path in (directory / name for name in (*TABLES, *PICTURES, _RUNS)):
        if path not in written and path.exists():
            path.unlink()
            print(f"removed {path}, of an earlier study", file=sys.stderr)


def _problems(options: argparse.Namespace) -> Iterator[str]:
    if options.resamples < 0:
        yield f"--resamples {options.resamples} is below 0"
    elif 0 < options.resamples < _FEWEST_RESAMPLES:
        yield f"--resamples {options.resamples} are too few for an interval; use at least {_FEWEST_RESAMPLES}, or 0"
    if options.seed < 0:
        yield f"--seed {options.seed} is below 0"
    if not 0 < options.level < 1:
        yield f"--level {options.level:g} is not between 0 and 1"
    if not _DELTAS[0] <= options.delta <= _DELTAS[1]:
        yield f"--delta {options.delta:g} is not between {_DELTAS[0]:g} and {_DELTAS[1]:g}"
    if options.ceiling is not None and not math.isfinite(options.ceiling):
        yield f"--ceiling {options.ceiling:g} is not finite"
    if options.drop_highest < 0:
        yield f"--drop-highest {options.drop_highest} is below 0"
    for budget in options.budgets:
        if not 0 < budget <= _MOST_FLOPS:
            yield f"--budgets {budget:g} is not above 0 and at most {_MOST_FLOPS:g}"
    if options.allow_differences and not (options.registry and options.arm_by):
        yield "--allow-differences is for two arms of a --registry, which --arm-by makes"
    if unknown := sorted(set(options.allow_differences) - OF_THE_LOSS):
        yield (
            f"--allow-differences names {', '.join(unknown)}; the settings of data and validation are "
            f"{', '.join(sorted(OF_THE_LOSS))}"
        )
    if twice := sorted({part for part in options.size_parts if options.size_parts.count(part) > 1}):
        yield f"--size-parts names {', '.join(twice)} twice, which would count twice in N"
