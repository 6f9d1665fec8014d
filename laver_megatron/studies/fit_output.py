"""A fitted study as files (JSON, and the same for spreadsheets in CSV) and as text for the terminal.

law.json          everything: settings, parameters with intervals, extrapolation, frontier, differences, notes
law.csv           arm, parameter, value, low, high
frontier.csv      arm, FLOPs, and the best size, tokens and value there, with intervals
measured.csv      the pairs of runs that an arm has in common with the baseline, treated minus baseline
means.csv         the means of these by amount and of all, with intervals
differences.csv   treated minus baseline by the laws, at equal data and at equal FLOPs

A column `outside` names what lies beyond the runs there, N or D, so that a law is extrapolated.
"""

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from laver_megatron.runtime.files import write_text
from laver_megatron.studies.fitted_study import BEST_AT_FLOPS, Difference, Extrapolation, FittedArm, FittedStudy
from laver_megatron.studies.law import optimum, percentiles
from laver_megatron.studies.pairs import EQUAL_DATA, MeanDifference, PairedComparison

TABLES = ("law.json", "law.csv", "frontier.csv", "measured.csv", "means.csv", "differences.csv")
PICTURES = ("fit.png", "iso_flop.png", "frontier.png", "residuals.png")
_WIDTH = 22  # of what is equal, in the text

Row = dict[str, Any]


def write_tables(study: FittedStudy, directory: Path, facts: Mapping[str, Any]) -> list[Path]:
    """Writes the tables; `facts` of the study go into law.json as they are. Returns the files."""
    tables = {
        "law.json": json.dumps({**facts, **_as_json(study)}, indent=1, allow_nan=False) + "\n",
        "law.csv": _csv(_parameter_rows(study)),
        "frontier.csv": _csv(_frontier_rows(study)),
    }
    if study.measured:
        tables |= _measured_tables([study.measured])
    if study.differences:
        tables["differences.csv"] = _csv(map(_with_difference, study.differences))
    return _write(tables, directory)


def write_measured(measured: Sequence[PairedComparison], directory: Path) -> list[Path]:
    """Writes the tables of arms that are compared with one baseline without a law. Returns the files."""
    return _write(_measured_tables(measured), directory)


def _write(tables: Mapping[str, str], directory: Path) -> list[Path]:
    assert set(tables) <= set(TABLES)
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in tables.items():
        write_text(directory / name, text)
    return [directory / name for name in tables]


def _measured_tables(measured: Sequence[PairedComparison]) -> dict[str, str]:
    pairs = [{"arm": one.treated, **_with_difference(pair)} for one in measured for pair in one.pairs]
    means = [{"arm": one.treated, **dataclasses.asdict(mean)} for one in measured for mean in one.means]
    return {"measured.csv": _csv(pairs), "means.csv": _csv(means)} if pairs else {}


def _as_json(study: FittedStudy) -> Row:
    arms = zip(study.arms, study.extrapolations, strict=True)
    measured = study.measured
    return {
        **dataclasses.asdict(study.settings),
        "notes": list(study.notes),
        "arms": {arm.name: _arm_as_json(arm, extrapolation, study) for arm, extrapolation in arms},
        "measured": {
            "pairs": [*map(_with_difference, measured.pairs)] if measured else [],
            "means": [*map(dataclasses.asdict, measured.means)] if measured else [],
        },
        "differences": [*map(_with_difference, study.differences)],
    }


def _arm_as_json(arm: FittedArm, extrapolation: Extrapolation, study: FittedStudy) -> Row:
    fit, rows = arm.fit, [row for row in _parameter_rows(study) if row["arm"] == arm.name]
    return {
        "num_runs": len(fit.observations),
        "parameters": {row["parameter"]: {key: row[key] for key in ("value", "low", "high")} for row in rows},
        "objective": fit.objective,
        "num_starts": fit.num_starts,
        "num_starts_at_minimum": fit.num_agreeing,
        "mean_absolute_log_residual": float(np.abs(fit.residuals_R).mean()),
        "warnings": list(fit.warnings),
        "flops_per_token": dataclasses.asdict(arm.cost),
        "leave_largest_out": {
            **dataclasses.asdict(extrapolation),
            "errors": list(extrapolation.errors_R),
            "mean_absolute_error": extrapolation.mean_error if extrapolation.errors_R else None,
        },
        "frontier": [row for row in _frontier_rows(study) if row["arm"] == arm.name],
    }


def _parameter_rows(study: FittedStudy) -> Iterator[Row]:
    for arm in study.arms:
        intervals = arm.fit.intervals(study.settings.level) if arm.fit.resampled else {}
        for name, value in arm.fit.law.named().items():
            low, high = intervals.get(name, (None, None))
            yield {"arm": arm.name, "parameter": name, "value": value, "low": low, "high": high}


def _frontier_rows(study: FittedStudy) -> Iterator[Row]:
    for arm in study.arms:
        best = optimum(arm.fit.law, arm.cost, study.budgets_X)
        resampled = optimum(arm.fit.resampled, arm.cost, study.budgets_X) if arm.fit.resampled else None
        outside_X = arm.fit.observations.outside(best.size_X, best.tokens_X)
        for x, flops in enumerate(study.budgets_X.tolist()):
            row: Row = {"arm": arm.name, "flops": flops}
            for name in ("size", "tokens", "value"):
                low = high = None
                if resampled is not None:
                    low, high = map(float, percentiles(getattr(resampled, f"{name}_X")[:, x], study.settings.level))
                row |= {name: float(getattr(best, f"{name}_X")[x]), f"{name}_low": low, f"{name}_high": high}
            yield row | {"outside": outside_X[x]}


def _with_difference(row: Any) -> Row:
    """A pair, or a difference of laws, with its property `difference` as the last column."""
    return {**dataclasses.asdict(row), "difference": row.difference}


def _csv(rows: Iterable[Row]) -> str:
    rows = list(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def study_text(study: FittedStudy) -> str:
    """Laws, measured differences, those of the laws at the most tokens of each size, and notes."""
    lines = []
    for arm, extrapolation in zip(study.arms, study.extrapolations, strict=True):
        lines += [*_arm_lines(arm, study.settings.level), f"  {_extrapolation_text(extrapolation)}"]
    interval = f"{100 * study.settings.level:g}% interval"
    if study.measured:
        lines += _measured_lines(study.measured, interval)
    if study.differences:
        baseline, treated = (arm.name for arm in study.arms)
        lines.append(f"{treated} minus {baseline} by the laws, with {interval}, at the most tokens of each size:")
        most = {row.baseline_size: row.baseline_tokens for row in study.differences}  # they rise with each size
        for row in study.differences:
            if row.kind == BEST_AT_FLOPS or row.baseline_tokens == most[row.baseline_size]:
                lines.append(f"  {_difference_text(row)}")
    return "\n".join([*lines, *(f"note: {note}" for note in study.notes)])


def measured_text(measured: Sequence[PairedComparison], level: float, notes: Sequence[str]) -> str:
    """Arms against one baseline by their pairs of runs, without any law."""
    lines = [line for one in measured for line in _measured_lines(one, f"{100 * level:g}% interval")]
    # With two arms it goes without saying which of them a note is about.
    own = [note if len(measured) == 1 else f"{one.treated}: {note}" for one in measured for note in one.notes]
    return "\n".join([*lines, *(f"note: {note}" for note in (*notes, *own))])


def _measured_lines(measured: PairedComparison, interval: str) -> Iterator[str]:
    if measured.means:
        arms = f"{measured.treated} minus {measured.baseline}"
        yield f"{arms}, measured: means over pairs of runs, with {interval} (Student's t):"
        yield from (f"  {_mean_text(mean)}" for mean in measured.means)


def _arm_lines(arm: FittedArm, level: float) -> Iterator[str]:
    fit, cost = arm.fit, arm.cost
    distance = "" if fit.observations.ceiling is None else f"{fit.observations.ceiling:g} - "
    yield f"{arm.name}: {distance}{fit.observations.column} = E + A / N^a + B / D^b, {len(fit.observations)} runs"
    intervals = fit.intervals(level) if fit.resampled else {}
    for name, value in fit.law.named().items():
        shown = ""
        if name in intervals:
            low, high = intervals[name]
            shown = f"   {100 * level:g}% interval [{low:.5g}, {high:.5g}]"
        yield f"  {name} = {value:<10.5g}{shown}"
    residual = np.abs(fit.residuals_R).mean()
    yield f"  {fit.num_agreeing} of {fit.num_starts} starts end at this minimum; mean |log residual| {residual:.3g}"
    error = f"within {cost.largest_error:.1%} of every run"
    yield f"  FLOPs per token: {cost.constant:.4g} + {cost.per_parameter:.4g} N, {error}"


def _extrapolation_text(extrapolation: Extrapolation) -> str:
    left_out = f"{extrapolation.num_left_out} runs of the largest size ({extrapolation.size:.3g})"
    if extrapolation.problem is not None:
        reason = extrapolation.problem.splitlines()[-1].strip(" -")
        return f"without the {left_out} there is no law to predict them: {reason}"
    error = f"{extrapolation.mean_error:.2%} on average"
    return f"the {left_out}, predicted from the other {extrapolation.num_fitted}, are off by {error}"


def _mean_text(mean: MeanDifference) -> str:
    unit = "tokens" if mean.kind == EQUAL_DATA else "FLOPs"
    place = "all" if mean.amount is None else f"{mean.amount:8.2e} {unit}"
    pairs = f"{mean.num_pairs} pair{'s' if mean.num_pairs > 1 else ''}"
    interval = "" if mean.low is None else f" [{mean.low:+.4g}, {mean.high:+.4g}]"
    return f"{mean.kind:<{_WIDTH}} {place:<15}  {pairs:<9}  {mean.difference:+.4g}{interval}"


def _difference_text(row: Difference) -> str:
    place = f"{row.baseline_flops:8.2e} FLOPs  N {row.baseline_size:8.2e}  D {row.baseline_tokens:8.2e}"
    if row.kind == BEST_AT_FLOPS:
        place += f"  against N {row.treated_size:8.2e}  D {row.treated_tokens:8.2e}"
    elif row.treated_tokens != row.baseline_tokens:
        place += f"  against D {row.treated_tokens:8.2e}"
    outside = f"  outside the runs ({row.outside})" if row.outside else ""
    return f"{row.kind:<{_WIDTH}} {place}  {row.difference:+.4g} [{row.low:+.4g}, {row.high:+.4g}]{outside}"
