"""What a scaling law is fitted to: the size, tokens and one column of each run, and whether they determine a law.

Letters: R runs, X points anywhere.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

PARAMETERS = ("E", "A", "B", "a", "b")
NEEDED_DISTINCT = 3  # sizes, and amounts of tokens: an amplitude and an exponent each
SAME = 0.01  # of a logarithm: sizes and amounts of tokens that differ by less than 1% count as one
_MOST_CORRELATED = 0.999
_ROUNDING = 1e-9  # of a logarithm: smaller differences are rounding


@dataclass(frozen=True)
class Observations:
    """Runs by name, with their parameters, tokens and the fitted column. With a `ceiling`, it rises toward that."""

    names: tuple[str, ...]
    size_R: Array
    tokens_R: Array
    column_R: Array
    column: str = "loss"
    ceiling: float | None = None

    @property
    def loss_R(self) -> Array:
        """What falls: the column, or its distance from the ceiling."""
        return self.column_R if self.ceiling is None else self.ceiling - self.column_R

    def __len__(self) -> int:
        return len(self.names)

    def take(self, chosen: NDArray) -> "Observations":
        """The runs that a boolean mask or an array of indexes selects."""
        names = tuple(np.array(self.names, dtype=object)[chosen])
        return Observations(
            names, self.size_R[chosen], self.tokens_R[chosen], self.column_R[chosen], self.column, self.ceiling
        )

    def outside(self, size_X: ArrayLike, tokens_X: ArrayLike) -> list[str]:
        """For each point the quantities that lie more than 1% beyond these runs: "", "N", "D" or "N D"."""
        beyond = []
        for values_X, values_R in ((size_X, self.size_R), (tokens_X, self.tokens_R)):
            log_X, log_R = np.log(np.atleast_1d(np.asarray(values_X, dtype=float))), np.log(values_R)
            beyond.append((log_X < log_R.min() - SAME) | (log_X > log_R.max() + SAME))
        return [
            " ".join(np.array(["N", "D"])[list(point)]) for point in zip(*np.broadcast_arrays(*beyond), strict=True)
        ]


def cluster(values_R: Array) -> NDArray[np.int64]:
    """The number of each value's cluster, in rising order. A cluster spans less than 1% above its smallest value."""
    order = np.argsort(values_R, kind="stable")
    ordered = np.log(values_R[order])
    numbers, number, start = np.zeros(len(order), np.int64), 0, 0
    while start < len(order):
        end = int(np.searchsorted(ordered, ordered[start] + SAME, side="right"))
        numbers[order[start:end]] = number
        number, start = number + 1, end
    return numbers


def num_distinct(values_R: Array) -> int:
    """How many clusters the values form."""
    return int(cluster(values_R).max()) + 1


def check_fittable(runs: Observations) -> None:
    """Raises ValueError, with all reasons and their numbers, if no law can be fitted to these runs."""
    problems = [*_invalid(runs), *_not_positive(runs)] or [*_too_few(runs)] or [*_rising(runs)]
    _refuse(problems, f"no law can be fitted to {runs.column!r} of {len(runs)} runs")


def check_comparable(runs: Observations) -> None:
    """Raises ValueError, with the runs' names, if there are values that cannot even be compared."""
    _refuse([*_invalid(runs)], f"{runs.column!r} of {len(runs)} runs cannot be compared")


def _refuse(problems: Sequence[str], what: str) -> None:
    if problems:
        raise ValueError(f"{what}:" + "".join(f"\n  - {problem}" for problem in problems))


def _invalid(runs: Observations) -> Iterator[str]:
    kinds = (("parameters", runs.size_R), ("tokens", runs.tokens_R), (runs.column, runs.column_R))
    for kind, values_R in kinds:
        if bad := runs.take(~np.isfinite(values_R)).names:
            yield f"{kind} of {first_few(bad)} is NaN or infinite; leave these runs out"
    for kind, values_R in kinds[:2]:
        if bad := runs.take(values_R <= 0).names:
            yield f"{kind} of {first_few(bad)} is not above 0"


def _not_positive(runs: Observations) -> Iterator[str]:
    bad = runs.take(runs.loss_R <= 0)
    if not bad:
        return
    what = f"{runs.column} of {first_few(bad.names)}"
    if runs.ceiling is not None:
        yield f"{what} is not below the ceiling {runs.ceiling:g} (the highest is {bad.column_R.max():g})"
    else:
        yield (
            f"{what} is not above 0 (the lowest is {bad.column_R.min():g}), and logarithms need that; a column that "
            "rises toward a limit is fitted with a ceiling"
        )


def _too_few(runs: Observations) -> Iterator[str]:
    if len(runs) < len(PARAMETERS):
        yield f"{len(runs)} runs are fewer than the law's {len(PARAMETERS)} parameters ({', '.join(PARAMETERS)})"
    for kind, values_R in (("parameters", runs.size_R), ("tokens", runs.tokens_R)):
        number = num_distinct(values_R) if len(runs) else 0
        if number < NEEDED_DISTINCT:
            span = f" (from {values_R.min():.4g} to {values_R.max():.4g})" if len(runs) else ""
            yield (
                f"the runs have {number} different numbers of {kind}{span}; an amplitude and an exponent need at "
                f"least {NEEDED_DISTINCT}, more than 1% apart"
            )
            return
    correlation = np.corrcoef(np.log(runs.size_R), np.log(runs.tokens_R))[0, 1]
    if abs(correlation) > _MOST_CORRELATED:
        yield (
            f"tokens follow parameters (correlation of their logarithms {correlation:.5f}), so their effects cannot be "
            "told apart; add runs of the same size with other amounts of data"
        )


def _rising(runs: Observations) -> Iterator[str]:
    """The law only falls. The slopes of a least-squares plane through the logarithms show what rises."""
    log_loss_R = np.log(runs.loss_R)
    if np.ptp(log_loss_R) < _ROUNDING:
        yield f"{runs.column} is {runs.column_R[0]:.6g} in all runs: it depends on neither parameters nor tokens"
        return
    design_R3 = np.stack([np.ones(len(runs)), np.log(runs.size_R), np.log(runs.tokens_R)], axis=1)
    slopes_3, *_ = np.linalg.lstsq(design_R3, log_loss_R, rcond=None)
    residuals_R = log_loss_R - design_R3 @ slopes_3
    variance = residuals_R @ residuals_R / (len(runs) - 3)
    errors_3 = np.sqrt(variance * np.diag(np.linalg.inv(design_R3.T @ design_R3)))
    rises_3 = slopes_3 * np.ptp(design_R3, axis=0)  # from the smallest to the largest of each
    for kind, slope, error, rise in zip(("parameters", "tokens"), slopes_3[1:], errors_3[1:], rises_3[1:], strict=True):
        if slope > 2 * error and rise > _ROUNDING:
            if runs.ceiling is None:
                what, remedy = runs.column, "give the limit it rises toward as the ceiling (1 for a similarity)"
            else:
                what, remedy = f"{runs.ceiling:g} - {runs.column}", "fit it without a ceiling"
            power = f"as their power {slope:.3g} +- {error:.2g}"
            yield f"{what} rises with {kind} ({power}), and this law only falls; {remedy}"


def first_few(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
