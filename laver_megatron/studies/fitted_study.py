"""A study fitted: every arm's law, the error of extrapolating it, one arm against another, and what a reader must know.

A difference between laws is always treated minus baseline, in the column's units. Its interval comes from resampling
both arms independently of each other. Runs that share seed and data order err alike, so the true interval is rather
narrower.

Letters: R runs, K resamples, X points.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from laver_megatron.studies.law import DELTA, SIX_N_D, Cost, Fit, fit_cost, fit_law, optimum, percentiles
from laver_megatron.studies.observations import PARAMETERS, Array, check_fittable, first_few
from laver_megatron.studies.pairs import EQUAL_DATA, EQUAL_FLOPS, PairedComparison, compare_pairs, treated_arm
from laver_megatron.studies.study import ArmRuns

BEST_AT_FLOPS = "equal FLOPs, best size"  # each arm at the size and tokens that are best for it
_NUM_BUDGETS = 5
_LARGE_RESIDUAL = 0.05  # mean |log residual|; that of Chinchilla's points is about 0.005


@dataclass(frozen=True)
class FittedArm:
    """One arm of a study: its law and what a token costs it."""

    name: str
    fit: Fit
    cost: Cost

    @property
    def flops_R(self) -> Array:
        """What the runs cost by `cost`, which smooths what they counted."""
        return self.cost.flops(self.fit.observations.size_R, self.fit.observations.tokens_R)


@dataclass(frozen=True)
class Extrapolation:
    """Predictions for the runs of the largest size by a law fitted to the others. errors_R: predicted over measured,
    less one. problem: why there is no such law, and then no numbers."""

    size: float
    num_left_out: int
    num_fitted: int
    names: tuple[str, ...] = ()
    predicted_R: tuple[float, ...] = ()
    measured_R: tuple[float, ...] = ()
    problem: str | None = None

    @property
    def errors_R(self) -> tuple[float, ...]:
        return tuple(p / m - 1 for p, m in zip(self.predicted_R, self.measured_R, strict=True))

    @property
    def mean_error(self) -> float:
        """Mean absolute relative error."""
        return float(np.abs(self.errors_R).mean())


def leave_largest_out(fit: Fit) -> Extrapolation:
    """Fits without the runs of the largest size (within 1% of it) and predicts them."""
    runs = fit.observations
    largest = runs.size_R.max()
    is_largest_R = runs.size_R > 0.99 * largest
    left_out, smaller = runs.take(is_largest_R), runs.take(~is_largest_R)
    result = Extrapolation(float(largest), len(left_out), len(smaller))
    try:
        law = fit_law(smaller, num_resamples=0, delta=fit.delta).law
    except ValueError as error:  # a small ladder has nothing to spare, which is no error of the whole
        return replace(result, problem=str(error))
    predicted_R = law.value(left_out.size_R, left_out.tokens_R)
    return replace(
        result,
        names=left_out.names,
        predicted_R=tuple(predicted_R.tolist()),
        measured_R=tuple(left_out.column_R.tolist()),
    )


@dataclass(frozen=True)
class Difference:
    """The two laws at one point. kind: what is equal there. outside: where a law is asked beyond its own runs, as
    `laver: D`; empty where neither is."""

    kind: str
    outside: str
    baseline_size: float
    treated_size: float
    baseline_tokens: float
    treated_tokens: float
    baseline_flops: float
    treated_flops: float
    baseline: float
    treated: float
    low: float
    high: float

    @property
    def difference(self) -> float:
        return self.treated - self.baseline


def compare_laws(
    baseline: FittedArm, treated: FittedArm, budgets_X: ArrayLike, level: float = 0.95
) -> list[Difference]:
    """Both arms at the sizes and tokens of the baseline's runs, with equal data and with equal FLOPs, and at these
    budgets (FLOPs), each arm at its own best size. Both are fitted to the same column with as many resamples."""
    arms = (baseline, treated)
    runs, others = baseline.fit.observations, treated.fit.observations
    assert (runs.column, runs.ceiling) == (others.column, others.ceiling), (runs.column, others.column)
    laws = [arm.fit.resampled for arm in arms if arm.fit.resampled is not None]
    assert len(laws) == 2 and laws[0].parameters_5.shape == laws[1].parameters_5.shape, "resampled alike"
    size_X, tokens_X = np.unique(np.stack([runs.size_R, runs.tokens_R]), axis=1)
    fewer_X = treated.cost.tokens(size_X, baseline.cost.flops(size_X, tokens_X))
    rows: list[Difference] = []
    for kind, theirs_X in ((EQUAL_DATA, tokens_X), (EQUAL_FLOPS, fewer_X)):
        places = [(size_X, tokens_X), (size_X, theirs_X)]
        flops = [arm.cost.flops(*place) for arm, place in zip(arms, places, strict=True)]
        values = [law.value(*place) for law, place in zip(laws, places, strict=True)]
        rows += _differences(kind, arms, places, flops, percentiles(values[1] - values[0], level))
    budgets_X = np.atleast_1d(np.asarray(budgets_X, dtype=float))
    best = [optimum(arm.fit.law, arm.cost, budgets_X) for arm in arms]
    # Each resampled law at its own best size: the choice of size is as uncertain as the law.
    values = [optimum(law, arm.cost, budgets_X).value_X for law, arm in zip(laws, arms, strict=True)]
    places = [(of_arm.size_X, of_arm.tokens_X) for of_arm in best]
    interval = percentiles(values[1] - values[0], level)
    return rows + [*_differences(BEST_AT_FLOPS, arms, places, [budgets_X, budgets_X], interval)]


def _differences(
    kind: str,
    arms: Sequence[FittedArm],
    places: Sequence[tuple[Array, Array]],
    flops: Sequence[Array],
    interval: tuple[Array, Array],
) -> Iterator[Difference]:
    """places: each arm's sizes and tokens."""
    values = [arm.fit.law.value(*place) for arm, place in zip(arms, places, strict=True)]
    sizes, tokens = zip(*places, strict=True)
    columns = np.stack([*sizes, *tokens, *flops, *values, *interval], axis=1)
    outside = [arm.fit.observations.outside(*place) for arm, place in zip(arms, places, strict=True)]
    for row, letters in zip(columns.tolist(), zip(*outside, strict=True), strict=True):
        beyond = [f"{arm.name}: {where}" for arm, where in zip(arms, letters, strict=True) if where]
        yield Difference(kind, "; ".join(beyond), *row)


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
class FittedStudy:
    """The fitted arms, the baseline first, and what follows from them.

    Attributes:
        extrapolations: of each arm.
        measured: two arms compared by their pairs of runs.
        differences: two arms compared by their laws.
    """

    arms: tuple[FittedArm, ...]
    budgets_X: Array
    extrapolations: tuple[Extrapolation, ...]
    measured: PairedComparison | None
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]
    settings: FitSettings


def fit_study(arms: Mapping[str, ArmRuns], settings: FitSettings, notes: Sequence[str] = ()) -> FittedStudy:
    """Fits every arm; compares the arms if there are two.

    Raises:
        ValueError: an arm that determines no law, by name; arms of which none is the baseline.
    """
    if len(arms) == 2:
        treated_arm(arms, settings.baseline)  # before the arms are fitted, which takes a while
    fitted, gathered = [], list(notes)
    for name, runs in arms.items():
        arm = _fit_arm(name, runs, settings, arms)
        fitted.append(arm)
        gathered += [f"{name}: {note}" for note in (*runs.notes, *arm.fit.warnings)]
    fitted.sort(key=lambda arm: arm.name != settings.baseline)
    if len(fitted) > 2:
        gathered.append(f"{len(fitted)} arms: only two can be compared")
    if settings.num_resamples == 0:
        laws = ", and the laws of the arms are not compared" if len(fitted) == 2 else ""
        gathered.append(f"no resamples: parameters without intervals{laws}")
    flops = np.concatenate([arm.flops_R for arm in fitted])
    budgets_X = np.unique([*np.geomspace(flops.min(), flops.max(), _NUM_BUDGETS), *settings.budgets])
    measured = None
    differences: list[Difference] = []
    if len(fitted) == 2:
        measured = compare_pairs(arms, settings.baseline, settings.level)
        gathered += measured.notes
        if settings.num_resamples > 0:
            differences = compare_laws(fitted[0], fitted[1], budgets_X, settings.level)
    gathered += _residual_notes(fitted, measured)
    if outside := [row for row in differences if row.outside]:
        gathered.append(
            f"{len(outside)} of {len(differences)} differences between the laws are outside the runs (marked): N or D "
            "is beyond those of an arm's runs, and its law is extrapolated"
        )
    extrapolations = tuple(leave_largest_out(arm.fit) for arm in fitted)
    return FittedStudy(
        tuple(fitted), budgets_X, extrapolations, measured, tuple(differences), tuple(gathered), settings
    )


def _fit_arm(name: str, runs: ArmRuns, settings: FitSettings, arms: Mapping[str, ArmRuns]) -> FittedArm:
    try:
        check_fittable(runs.observations)  # before the cost, which would give its own reasons
        cost = SIX_N_D if runs.flops_R is None else fit_cost(runs.observations, runs.flops_R)
        fit = fit_law(runs.observations, num_resamples=settings.num_resamples, seed=settings.seed, delta=settings.delta)
    except ValueError as error:
        advice = ""
        # A stray value of the column that makes the arms is an arm of few runs.
        if len(arms) > 1 and len(runs.observations) < len(PARAMETERS):
            counts = (
                f"{other} ({len(of_other.observations)}: {first_few(of_other.observations.names, 1)})"
                for other, of_other in arms.items()
            )
            advice = f"\n  the arms and their runs are {', '.join(counts)}; --where chooses among them"
        if len(arms) == 2:
            advice += "\n  --no-law compares the two arms by their pairs of runs alone"
        raise ValueError(f"{name}: {error}{advice}") from error
    return FittedArm(name, fit, cost)


def _residual_notes(arms: Sequence[FittedArm], measured: PairedComparison | None) -> Iterator[str]:
    """What makes laws useless: runs that lie far off them, or farther than the arms lie apart."""
    worst_error = 0.0
    for arm in arms:
        distances_R = np.abs(arm.fit.residuals_R)
        error, worst = float(distances_R.mean()), int(distances_R.argmax())
        worst_error = max(worst_error, error)
        if error > _LARGE_RESIDUAL:
            yield (
                f"{arm.name}: the law misses its runs by {error:.1%} on average (mean |log residual|, above "
                f"{_LARGE_RESIDUAL:.0%}) and {arm.fit.observations.names[worst]} by a factor of "
                f"{np.exp(distances_R[worst]):.3g}: the runs do not follow it, so its parameters, its best sizes and "
                "all differences from it are not to be relied on"
            )
    if measured is not None and measured.pairs:
        apart = float(np.abs([pair.log_ratio for pair in measured.pairs if pair.log_ratio is not None]).mean())
        if apart < worst_error:
            yield (
                f"the laws miss their runs by more (up to {worst_error:.2%} on average) than the pairs of "
                f"runs differ ({apart:.2%}): read the measured differences, not those of the laws"
            )
