"""A fitted study as text for the terminal: what a person wants to see first."""

from collections.abc import Iterator, Sequence

import numpy as np

from laver_megatron.studies.comparison import BEST_AT_FLOPS, EQUAL_DATA, Arm, Difference, Extrapolation
from laver_megatron.studies.law_report import Report
from laver_megatron.studies.measured import MeanDifference, Measured

_WIDTH = 22  # of what is equal


def report_text(report: Report) -> str:
    """Laws, measured differences, those of the laws at the most tokens of each size, and notes."""
    lines = []
    for arm, extrapolation in zip(report.arms, report.extrapolations, strict=True):
        lines += [*_arm_lines(arm, report.settings.level), f"  {_extrapolation_text(extrapolation)}"]
    interval = f"{100 * report.settings.level:g}% interval"
    if report.measured:
        lines += _measured_lines(report.measured, interval)
    if report.differences:
        baseline, treated = (arm.name for arm in report.arms)
        lines.append(f"{treated} minus {baseline} by the laws, with {interval}, at the most tokens of each size:")
        most = {row.baseline_size: row.baseline_tokens for row in report.differences}  # they rise with each size
        for row in report.differences:
            if row.kind == BEST_AT_FLOPS or row.baseline_tokens == most[row.baseline_size]:
                lines.append(f"  {_difference_text(row)}")
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)])


def measured_text(measured: Measured, level: float, notes: Sequence[str]) -> str:
    """Two arms by their pairs of runs, without any law."""
    lines = _measured_lines(measured, f"{100 * level:g}% interval")
    return "\n".join([*lines, *(f"note: {note}" for note in (*notes, *measured.notes))])


def _measured_lines(measured: Measured, interval: str) -> Iterator[str]:
    if measured.means:
        arms = f"{measured.treated} minus {measured.baseline}"
        yield f"{arms}, measured: means over pairs of runs, with {interval} (Student's t):"
        yield from (f"  {_mean_text(mean)}" for mean in measured.means)


def _arm_lines(arm: Arm, level: float) -> Iterator[str]:
    fit, cost = arm.fit, arm.cost
    distance = "" if fit.points.ceiling is None else f"{fit.points.ceiling:g} - "
    yield f"{arm.name}: {distance}{fit.points.column} = E + A / N^a + B / D^b, {len(fit.points)} runs"
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
