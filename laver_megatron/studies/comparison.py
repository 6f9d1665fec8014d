"""What fitted laws say beyond their own runs: the error of extrapolating, and one arm of a study against another.

A difference is always treated minus baseline, in the column's units. Its interval comes from resampling both arms
independently of each other. Runs that share seed and data order err alike, so the true interval is rather narrower.

Letters: R runs, K resamples, X points.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from laver_megatron.studies.compute import Cost, optimum
from laver_megatron.studies.law import Array, Fit, Law, fit_law, percentiles


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
    points = fit.points
    largest = points.size_R.max()
    is_largest_R = points.size_R > 0.99 * largest
    size, num_left_out, num_fitted = float(largest), int(is_largest_R.sum()), int((~is_largest_R).sum())
    try:
        smaller = fit_law(points.take(~is_largest_R), num_resamples=0, delta=fit.delta)
    except ValueError as error:  # a small ladder has nothing to spare, which is no error of the whole
        return Extrapolation(size, num_left_out, num_fitted, problem=str(error))
    left_out = points.take(is_largest_R)
    predicted_R = smaller.law.value(left_out.size_R, left_out.tokens_R)
    return Extrapolation(
        size,
        num_left_out,
        num_fitted,
        left_out.names,
        tuple(predicted_R.tolist()),
        tuple(left_out.column_R.tolist()),
    )


@dataclass(frozen=True)
class Difference:
    """The two laws at one point. kind: what is equal there. sizes and tokens are those of baseline and treated.
    outside: in which of them a law is asked beyond its own runs, as `laver: D`; empty where in none."""

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


EQUAL_DATA = "equal data"  # the same size and tokens; treated costs more FLOPs
EQUAL_FLOPS = "equal FLOPs"  # the same size and FLOPs; treated sees fewer tokens
BEST_AT_FLOPS = "equal FLOPs, best size"  # each arm at the size and tokens that are best for it


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: its law and what a token costs it."""

    name: str
    fit: Fit
    cost: Cost


def compare(baseline: Arm, treated: Arm, budgets_X: ArrayLike, level: float = 0.95) -> list[Difference]:
    """Both arms at the sizes and tokens of the baseline's runs, with equal data and with equal FLOPs, and at these
    budgets (FLOPs), each arm at its own best size.

    Raises:
        ValueError: the arms have no resamples, not the same number of them, or another column.
    """
    _check_arms(baseline, treated)
    points = baseline.fit.points
    size_X, tokens_X = np.unique(np.stack([points.size_R, points.tokens_R]), axis=1)
    flops_X = baseline.cost.flops(size_X, tokens_X)
    fewer_X = treated.cost.tokens(size_X, flops_X)
    budgets_X = np.atleast_1d(np.asarray(budgets_X, dtype=float))
    return [
        *_differences(EQUAL_DATA, baseline, treated, (size_X, tokens_X), (size_X, tokens_X), level),
        *_differences(EQUAL_FLOPS, baseline, treated, (size_X, tokens_X), (size_X, fewer_X), level),
        *_best_differences(baseline, treated, budgets_X, level),
    ]


def _check_arms(baseline: Arm, treated: Arm) -> None:
    ours, theirs = baseline.fit, treated.fit
    if (ours.points.column, ours.points.ceiling) != (theirs.points.column, theirs.points.ceiling):
        raise ValueError(
            f"{baseline.name} was fitted to {ours.points.column} (ceiling {ours.points.ceiling}), {treated.name} to "
            f"{theirs.points.column} (ceiling {theirs.points.ceiling}); compare the same column"
        )
    numbers = [0 if fit.resampled is None else len(fit.resampled.parameters_5) for fit in (ours, theirs)]
    if numbers[0] != numbers[1] or not numbers[0]:
        raise ValueError(f"a comparison needs the same number of resamples of both arms, above 0, not {numbers}")


def _differences(
    kind: str, baseline: Arm, treated: Arm, ours: tuple[Array, Array], theirs: tuple[Array, Array], level: float
) -> Iterator[Difference]:
    values = baseline.fit.law.value(*ours), treated.fit.law.value(*theirs)
    resampled = _resampled(treated).value(*theirs) - _resampled(baseline).value(*ours)
    flops = baseline.cost.flops(*ours), treated.cost.flops(*theirs)
    columns = (ours[0], theirs[0], ours[1], theirs[1], *flops, *values, *percentiles(resampled, level))
    for row, outside in zip(np.stack(columns, axis=1), _outside(baseline, treated, ours, theirs), strict=True):
        yield Difference(kind, outside, *map(float, row))


def _best_differences(baseline: Arm, treated: Arm, budgets_X: Array, level: float) -> Iterator[Difference]:
    arms = (baseline, treated)
    ours, theirs = (optimum(arm.fit.law, arm.cost, budgets_X) for arm in arms)
    # Each resampled law at its own best size: the choice of size is as uncertain as the law.
    resampled = [optimum(_resampled(arm), arm.cost, budgets_X).value_X for arm in arms]
    low_X, high_X = percentiles(resampled[1] - resampled[0], level)
    places = (ours.size_X, theirs.size_X, ours.tokens_X, theirs.tokens_X, budgets_X, budgets_X)
    outside_X = _outside(baseline, treated, (ours.size_X, ours.tokens_X), (theirs.size_X, theirs.tokens_X))
    rows = np.stack([*places, ours.value_X, theirs.value_X, low_X, high_X], axis=1)
    for row, outside in zip(rows, outside_X, strict=True):
        yield Difference(BEST_AT_FLOPS, outside, *map(float, row))


def _outside(baseline: Arm, treated: Arm, ours: tuple[Array, Array], theirs: tuple[Array, Array]) -> Iterator[str]:
    found = (arm.fit.points.outside(*places) for arm, places in ((baseline, ours), (treated, theirs)))
    for letters in zip(*found, strict=True):
        named = zip((baseline, treated), letters, strict=True)
        yield "; ".join(f"{arm.name}: {where}" for arm, where in named if where)


def _resampled(arm: Arm) -> Law:
    assert arm.fit.resampled is not None, "checked by _check_arms"
    return arm.fit.resampled
