"""A study fitted: every arm's law, what follows from the laws together, and the text for the terminal."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from laver_megatron.scaling.comparison import (
    BEST_AT_FLOPS,
    Arm,
    Difference,
    Extrapolation,
    compare,
    leave_largest_out,
)
from laver_megatron.scaling.compute import SIX_N_D, fit_cost
from laver_megatron.scaling.law import DELTA, fit_law
from laver_megatron.scaling.points import Array
from laver_megatron.scaling.study import StudyArm

_NUM_BUDGETS = 5


@dataclass(frozen=True)
class FitSettings:
    """How a study is fitted. budgets: FLOPs to compare arms at beside those that span the runs."""

    num_resamples: int = 1000
    seed: int = 0
    delta: float = DELTA
    level: float = 0.95
    budgets: tuple[float, ...] = ()
    baseline: str = "baseline"


@dataclass(frozen=True)
class Report:
    """The fitted arms of a study and what follows from them. differences: empty unless there are two arms."""

    arms: tuple[Arm, ...]
    budgets_X: Array
    extrapolations: tuple[Extrapolation, ...]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]
    settings: FitSettings


def fit_study(study: Mapping[str, StudyArm], settings: FitSettings, notes: Sequence[str] = ()) -> Report:
    """Fits every arm; compares the arms if there are two.

    Raises:
        ValueError: an arm that determines no law, by name; arms of which none is the baseline.
    """
    if len(study) == 2 and settings.baseline not in study:
        raise ValueError(f"the arms are {' and '.join(study)}; name the one to compare with as --baseline")
    arms, gathered = [], list(notes)
    for name, data in study.items():
        try:
            cost = SIX_N_D
            if data.flops_R is not None:
                cost = fit_cost(data.points.size_R, data.points.tokens_R, data.flops_R)
            fit = fit_law(data.points, num_resamples=settings.num_resamples, seed=settings.seed, delta=settings.delta)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        arms.append(Arm(name, fit, cost))
        gathered += [f"{name}: {note}" for note in (*data.notes, *fit.warnings)]
    # The baseline first, whatever the order of the runs.
    arms.sort(key=lambda arm: arm.name != settings.baseline)
    if len(arms) > 2:
        gathered.append(f"{len(arms)} arms: only two can be compared")
    if settings.num_resamples == 0:
        gathered.append("no resamples: parameters without intervals, and arms are not compared")
    budgets_X = _budgets(arms, settings.budgets)
    differences: list[Difference] = []
    if len(arms) == 2 and settings.num_resamples > 0:
        differences = compare(arms[0], arms[1], budgets_X, settings.level)
    extrapolations = tuple(leave_largest_out(arm.fit) for arm in arms)
    return Report(tuple(arms), budgets_X, extrapolations, tuple(differences), tuple(gathered), settings)


def _budgets(arms: Sequence[Arm], more: Sequence[float]) -> Array:
    flops = np.concatenate([arm.cost.flops(arm.fit.points.size_R, arm.fit.points.tokens_R) for arm in arms])
    return np.unique([*np.geomspace(flops.min(), flops.max(), _NUM_BUDGETS), *more])


def report_text(report: Report) -> str:
    """What a person wants to see first."""
    lines = []
    for arm, extrapolation in zip(report.arms, report.extrapolations, strict=True):
        lines += [*_arm_lines(arm, report.settings.level), f"  {_extrapolation_text(extrapolation)}"]
    if report.differences:
        baseline, treated = (arm.name for arm in report.arms)
        interval = f"{100 * report.settings.level:g}% interval"
        lines.append(
            f"{treated} minus {baseline}, with {interval}, at the most tokens of each size (the table has all):"
        )
        most = {row.baseline_size: row.baseline_tokens for row in report.differences}  # they rise with each size
        for row in report.differences:
            if row.kind == BEST_AT_FLOPS or row.baseline_tokens == most[row.baseline_size]:
                lines.append(f"  {_difference_text(row)}")
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)])


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


def _difference_text(row: Difference) -> str:
    place = f"{row.baseline_flops:8.2e} FLOPs  N {row.baseline_size:8.2e}  D {row.baseline_tokens:8.2e}"
    if row.kind == BEST_AT_FLOPS:
        place += f"  against N {row.treated_size:8.2e}  D {row.treated_tokens:8.2e}"
    elif row.treated_tokens != row.baseline_tokens:
        place += f"  against D {row.treated_tokens:8.2e}"
    return f"{row.kind:<22} {place}  {row.difference:+.4g} [{row.low:+.4g}, {row.high:+.4g}]"
