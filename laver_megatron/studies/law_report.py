"""A study fitted: every arm's law, what the runs and the laws say of the arms, and what a reader must know of both."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from laver_megatron.studies.comparison import Arm, Difference, Extrapolation, compare, leave_largest_out
from laver_megatron.studies.compute import SIX_N_D, fit_cost
from laver_megatron.studies.law import DELTA, fit_law
from laver_megatron.studies.measured import Measured, measure, treated_arm
from laver_megatron.studies.points import PARAMETERS, Array, check_points, listed
from laver_megatron.studies.study import StudyArm

PICTURES = ("fit.png", "iso_flop.png", "frontier.png", "residuals.png")
_NUM_BUDGETS = 5
_LARGE_RESIDUAL = 0.05  # mean |log residual|; that of Chinchilla's points is about 0.005


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
    """The fitted arms of a study and what follows from them. measured: two arms by their pairs of runs; differences: by
    their laws."""

    arms: tuple[Arm, ...]
    budgets_X: Array
    extrapolations: tuple[Extrapolation, ...]
    measured: Measured | None
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]
    settings: FitSettings


def fit_study(study: Mapping[str, StudyArm], settings: FitSettings, notes: Sequence[str] = ()) -> Report:
    """Fits every arm; compares the arms if there are two.

    Raises:
        ValueError: an arm that determines no law, by name; arms of which none is the baseline.
    """
    if len(study) == 2:
        treated_arm(study, settings.baseline)  # before the arms are fitted, which takes a while
    arms, gathered = [], list(notes)
    for name, data in study.items():
        arm = _fit_arm(name, data, settings, study)
        arms.append(arm)
        gathered += [f"{name}: {note}" for note in (*data.notes, *arm.fit.warnings)]
    # The baseline first, whatever the order of the runs.
    arms.sort(key=lambda arm: arm.name != settings.baseline)
    if len(arms) > 2:
        gathered.append(f"{len(arms)} arms: only two can be compared")
    if settings.num_resamples == 0:
        laws = ", and the laws of the arms are not compared" if len(arms) == 2 else ""
        gathered.append(f"no resamples: parameters without intervals{laws}")
    budgets_X = _budgets(arms, settings.budgets)
    measured = None
    differences: list[Difference] = []
    if len(arms) == 2:
        measured = measure(study, settings.baseline, settings.level)
        gathered += measured.notes
        if settings.num_resamples > 0:
            differences = compare(arms[0], arms[1], budgets_X, settings.level)
    gathered += [*_residual_notes(arms, measured), *_comparison_notes(differences)]
    extrapolations = tuple(leave_largest_out(arm.fit) for arm in arms)
    return Report(
        tuple(arms),
        budgets_X,
        extrapolations,
        measured,
        tuple(differences),
        tuple(gathered),
        settings,
    )


def _fit_arm(name: str, data: StudyArm, settings: FitSettings, study: Mapping[str, StudyArm]) -> Arm:
    try:
        check_points(data.points)  # before the cost, which would give its own reasons for points that are none
        cost = SIX_N_D if data.flops_R is None else fit_cost(data.points, data.flops_R)
        fit = fit_law(data.points, num_resamples=settings.num_resamples, seed=settings.seed, delta=settings.delta)
    except ValueError as error:
        others = ""
        if len(study) > 1 and len(data.points) < len(
            PARAMETERS
        ):  # a stray value of the column that makes the arms is an arm of few runs
            told = (f"{arm} ({len(of_arm.points)}: {listed(of_arm.points.names, 1)})" for arm, of_arm in study.items())
            others = f"\n  the arms and their runs are {', '.join(told)}; --where chooses among them"
        if len(study) == 2:
            others += "\n  --no-law compares the two arms by their pairs of runs alone"
        raise ValueError(f"{name}: {error}{others}") from error
    return Arm(name, fit, cost)


def _budgets(arms: Sequence[Arm], more: Sequence[float]) -> Array:
    flops = np.concatenate([arm.cost.flops(arm.fit.points.size_R, arm.fit.points.tokens_R) for arm in arms])
    return np.unique([*np.geomspace(flops.min(), flops.max(), _NUM_BUDGETS), *more])


def _residual_notes(arms: Sequence[Arm], measured: Measured | None) -> Iterator[str]:
    """What makes laws useless: runs that lie far off them, or farther than the arms lie apart."""
    errors = {arm.name: float(np.abs(arm.fit.residuals_R).mean()) for arm in arms}
    for arm in arms:
        error = errors[arm.name]
        if error > _LARGE_RESIDUAL:
            worst = int(np.abs(arm.fit.residuals_R).argmax())
            factor = np.exp(np.abs(arm.fit.residuals_R[worst]))
            yield (
                f"{arm.name}: the law misses its runs by {error:.1%} on average (mean |log residual|, above "
                f"{_LARGE_RESIDUAL:.0%}) and {arm.fit.points.names[worst]} by a factor of {factor:.3g}: the runs do "
                "not follow it, so its parameters, its best sizes and all differences from it are not to be relied on"
            )
    if measured is not None and measured.pairs:
        apart = float(np.abs([pair.log_ratio for pair in measured.pairs if pair.log_ratio is not None]).mean())
        if apart < max(errors.values()):
            yield (
                f"the laws miss their runs by more (up to {max(errors.values()):.2%} on average) than the pairs of "
                f"runs differ ({apart:.2%}): read the measured differences, not those of the laws"
            )


def _comparison_notes(differences: Sequence[Difference]) -> Iterator[str]:
    outside = [row for row in differences if row.outside]
    if outside:
        yield (
            f"{len(outside)} of {len(differences)} differences between the laws are outside the runs (marked): N or D "
            "is beyond those of an arm's runs, and its law is extrapolated"
        )
