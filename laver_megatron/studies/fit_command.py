"""tools/fit_scaling_law.py: its options; reading a study, fitting it, writing tables and pictures."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from laver_megatron.runtime.files import write_text
from laver_megatron.studies.csv_points import SEED_COLUMN, study_of_points
from laver_megatron.studies.law_report import PICTURES, FitSettings, fit_study
from laver_megatron.studies.law_tables import TABLES, write_measured, write_tables
from laver_megatron.studies.law_text import measured_text, report_text
from laver_megatron.studies.measured import measure
from laver_megatron.studies.registry import FAULTS, SIZE_PARTS, TOKEN_KINDS
from laver_megatron.studies.study import CONTINUED_TRAINING, Study, study_of_registry
from laver_megatron.studies.study_settings import OF_THE_LOSS

# Fewer resamples have no percentiles worth the name.
_FEWEST_RESAMPLES = 20
# Below, rounding decides; above, residuals of a factor of e are still squared, and nothing changes any more.
_DELTAS = (1e-12, 1.0)
_MOST_FLOPS = 1e35  # beyond, best sizes leave the range in which they are looked for
_RUNS = "runs.csv"
DEFAULT_COLUMNS = {"registry": "validation.last.lm_loss", "points": "loss"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--registry", nargs="+", metavar="DIR", help="run directories, or folders of them at any depth")
    source.add_argument(
        "--points",
        type=Path,
        metavar="CSV",
        help=f"plain points instead: N, D (or FLOPs: D = C / 6N), loss; a column {SEED_COLUMN} tells repeats apart",
    )
    add("--output", type=Path, required=True, metavar="DIR", help="where tables and pictures go")
    add(
        "--column",
        help="what is fitted (default: validation.last.lm_loss; of --points: loss); a path in run_summary.json",
    )
    add("--ceiling", type=float, metavar="LIMIT", help="the column rises toward this limit: fit its distance from it")
    add("--arm-by", metavar="COLUMN", help="fit the runs of each value of this column by themselves, such as laver")
    add(
        "--where",
        action="append",
        default=[],
        type=_column_and_value,
        metavar="COLUMN=VALUE",
        help="only the runs that have this value there, such as laver=true; more than once: all of them",
    )
    add(
        "--baseline",
        default="baseline",
        metavar="ARM",
        help="the arm that the other is compared with (default: baseline)",
    )
    add(
        "--leave-out",
        nargs="+",
        choices=FAULTS,
        default=[],
        help="leave out runs with these faults instead of stopping",
    )
    add(
        "--allow-differences",
        nargs="+",
        default=[],
        metavar="SETTING",
        help="compare two arms although these settings of their data or validation differ",
    )
    add(
        "--no-law",
        action="store_true",
        help="only compare two arms by their pairs of runs, which takes as few as two runs",
    )
    add(
        "--drop-highest",
        type=int,
        default=0,
        metavar="K",
        help="leave out the K runs of each arm with the highest values",
    )
    add(
        "--size-parts",
        nargs="+",
        default=SIZE_PARTS,
        metavar="PART",
        help=f"what N counts (default: {' '.join(SIZE_PARTS)})",
    )
    add("--tokens", choices=TOKEN_KINDS, default="total", help="what D counts (default: total)")
    add("--size-column", default="N", metavar="NAME", help="of --points (default: N)")
    add("--tokens-column", default="D", metavar="NAME", help="of --points (default: D)")
    add("--flops-column", default="FLOPs", metavar="NAME", help="of --points (default: FLOPs)")
    add(
        "--resamples",
        type=int,
        default=1000,
        metavar="K",
        help="of the bootstrap, from 20 on; 0: no intervals (default: 1000)",
    )
    add("--level", type=float, default=0.95, help="of the intervals (default: 0.95)")
    add("--delta", type=float, default=1e-3, help="of the Huber loss of log residuals (default: 0.001)")
    add("--budgets", type=float, nargs="+", default=[], metavar="FLOPS", help="also look at these, such as 1e24")
    add("--seed", type=int, default=0, help="of the bootstrap (default: 0)")


def _column_and_value(text: str) -> tuple[str, str]:
    column, equals, value = text.partition("=")
    if not (column and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not COLUMN=VALUE, such as laver=true")
    return column, value


def fit_and_write(options: argparse.Namespace) -> None:
    """Nothing is written unless everything could be fitted, or compared.

    Raises:
        ValueError: as reading and fitting do, or options that fit nothing.
    """
    _check(options)
    column = options.column or DEFAULT_COLUMNS["registry" if options.registry else "points"]
    study = _read(options, column)
    left_out = (
        [f"{fault.path}: {fault.kind}: {fault.reason}" for fault in study.registry.left_out] if study.registry else []
    )
    notes = [*(f"left out: {text}" for text in left_out), *study.notes]
    arms = {name: arm.without_highest(options.drop_highest) for name, arm in study.arms.items()}
    if options.no_law:
        measured = measure(arms, options.baseline, options.level)
        if not measured.pairs:
            raise ValueError(measured.notes[0])
        text, files = measured_text(measured, options.level, notes), write_measured(measured, options.output)
    else:
        settings = FitSettings(
            options.resamples, options.seed, options.delta, options.level, tuple(options.budgets), options.baseline
        )
        report = fit_study(arms, settings, [CONTINUED_TRAINING, *notes] if study.registry else notes)
        text, files = report_text(report), write_tables(report, options.output, _facts(options, column, left_out))
        from laver_megatron.studies.law_plots import (
            draw_report,  # matplotlib takes a second, and errors come first
        )

        files += draw_report(report, options.output)
    if study.registry is not None:
        write_text(options.output / _RUNS, study.registry.to_csv())
        files.append(options.output / _RUNS)
    print(text)
    _remove_others(options.output, files)
    print(f"written to {options.output}: {', '.join(file.name for file in files)}", file=sys.stderr)


def _read(options: argparse.Namespace, column: str) -> Study:
    if options.registry:
        return study_of_registry(
            options.registry,
            column,
            arm_by=options.arm_by,
            where=options.where,
            size_parts=options.size_parts,
            tokens=options.tokens,
            ceiling=options.ceiling,
            leave_out=options.leave_out,
            allow_differences=options.allow_differences,
        )
    return study_of_points(
        options.points,
        column,
        arm_by=options.arm_by,
        where=options.where,
        size_column=options.size_column,
        tokens_column=options.tokens_column,
        flops_column=options.flops_column,
        ceiling=options.ceiling,
    )


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


def _remove_others(directory: Path, written: Sequence[Path]) -> None:
    """What this study has not, such as differences of arms: files of an earlier study would pass for its own."""
    for path in (directory / name for name in (*TABLES, *PICTURES, _RUNS)):
        if path not in written and path.exists():
            path.unlink()
            print(f"removed {path}, of an earlier study", file=sys.stderr)


def _check(options: argparse.Namespace) -> None:
    problems = []
    if options.resamples < 0:
        problems.append(f"--resamples {options.resamples} is below 0")
    elif 0 < options.resamples < _FEWEST_RESAMPLES:
        problems.append(
            f"--resamples {options.resamples} are too few for an interval; use at least {_FEWEST_RESAMPLES}, or 0"
        )
    if options.seed < 0:
        problems.append(f"--seed {options.seed} is below 0")
    if not 0 < options.level < 1:
        problems.append(f"--level {options.level:g} is not between 0 and 1")
    if not _DELTAS[0] <= options.delta <= _DELTAS[1]:
        problems.append(f"--delta {options.delta:g} is not between {_DELTAS[0]:g} and {_DELTAS[1]:g}")
    if options.ceiling is not None and not math.isfinite(options.ceiling):
        problems.append(f"--ceiling {options.ceiling:g} is not finite")
    if options.drop_highest < 0:
        problems.append(f"--drop-highest {options.drop_highest} is below 0")
    problems += [
        f"--budgets {budget:g} is not above 0 and at most {_MOST_FLOPS:g}"
        for budget in options.budgets
        if not 0 < budget <= _MOST_FLOPS
    ]
    if options.allow_differences and not (options.registry and options.arm_by):
        problems.append("--allow-differences is for two arms of a --registry, which --arm-by makes")
    if unknown := sorted(set(options.allow_differences) - OF_THE_LOSS):
        problems.append(
            f"--allow-differences names {', '.join(unknown)}; the settings of data and validation are "
            f"{', '.join(sorted(OF_THE_LOSS))}"
        )
    if twice := sorted({part for part in options.size_parts if options.size_parts.count(part) > 1}):
        problems.append(f"--size-parts names {', '.join(twice)} twice, which would count twice in N")
    if problems:
        raise ValueError("; ".join(problems))
