"""The runs a scaling law is fitted to: their sizes, tokens and one column, and whether these can determine a law.

Letters: R runs.
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
_ROUNDING = 1e-9  # of a logarithm: what differs by less does not differ


@dataclass(frozen=True)
class Points:
    """What a law is fitted to. names: of the runs, for messages. `column_R` holds the fitted column's values; with a
    `ceiling` they rise toward it. Judge it with `check_points` before fitting."""

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

    def take(self, chosen: NDArray) -> "Points":
        """The runs that a boolean mask or an array of indexes chooses."""
        indexes = np.arange(len(self))[chosen]
        names = tuple(self.names[i] for i in indexes)
        arrays = (self.size_R[indexes], self.tokens_R[indexes], self.column_R[indexes])
        return Points(names, *arrays, self.column, self.ceiling)

    def outside(self, size_X: ArrayLike, tokens_X: ArrayLike) -> list[str]:
        """Where a law of these runs is asked beyond them: of each point `N`, `D`, `N D`, or nothing where its size and
        tokens lie between the runs' least and most, to 1%."""
        names_X = [[""] * np.size(size_X) for _ in range(2)]
        kinds = ((size_X, self.size_R), (tokens_X, self.tokens_R))
        for names, (values_X, values_R), letter in zip(names_X, kinds, "ND", strict=True):
            log_X = np.log(np.atleast_1d(np.asarray(values_X, dtype=float)))
            low, high = np.log(values_R.min()) - SAME, np.log(values_R.max()) + SAME
            for x in np.flatnonzero((log_X < low) | (log_X > high)):
                names[x] = letter
        return [" ".join(filter(None, names)) for names in zip(*names_X, strict=True)]


def groups(values_R: Array) -> NDArray[np.int64]:
    """Of each value the number of its group, in rising order. A group holds what is less than 1% above its least."""
    order = np.argsort(values_R, kind="stable")
    ordered = np.log(values_R[order])
    numbers, start = np.zeros(len(order), np.int64), 0
    for number in range(len(order)):
        end = int(np.searchsorted(ordered, ordered[start] + SAME, side="right"))
        numbers[order[start:end]] = number
        if end == len(order):
            break
        start = end
    return numbers


def num_distinct(values_R: Array) -> int:
    """How many `groups` there are."""
    return int(groups(values_R).max()) + 1


def check_points(points: Points) -> None:
    """Raises ValueError, with all reasons and their numbers, if no law can be fitted to these runs."""
    problems = [*_bad_values(points)] or [*_too_little(points)] or [*_rising(points)]
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise ValueError(f"no law can be fitted to {points.column!r} of {len(points)} runs:{lines}")


def check_values(points: Points) -> None:
    """Raises ValueError, with the runs' names, if there are values that cannot even be compared."""
    problems = [*_no_numbers(points)]
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise ValueError(f"{points.column!r} of {len(points)} runs cannot be compared:{lines}")


def _bad_values(points: Points) -> Iterator[str]:
    yield from _no_numbers(points)
    low = np.flatnonzero(points.loss_R <= 0)
    if low.size:
        names, values_R = listed([points.names[i] for i in low]), points.column_R[low]
        if points.ceiling is not None:
            limit = f"the ceiling {points.ceiling:g}"
            yield f"{points.column} of {names} is not below {limit} (the highest is {values_R.max():g})"
        else:
            remedy = "a column that rises toward a limit is fitted with a ceiling"
            lowest = f"the lowest is {values_R.min():g}"
            yield f"{points.column} of {names} is not above 0 ({lowest}), and logarithms need that; {remedy}"


def _no_numbers(points: Points) -> Iterator[str]:
    kinds = (("parameters", points.size_R), ("tokens", points.tokens_R), (points.column, points.column_R))
    for kind, values_R in kinds:
        bad = [points.names[i] for i in np.flatnonzero(~np.isfinite(values_R))]
        if bad:
            yield f"{kind} of {listed(bad)} is NaN or infinite; leave these runs out"
    for kind, values_R in kinds[:2]:
        bad = [points.names[i] for i in np.flatnonzero(values_R <= 0)]
        if bad:
            yield f"{kind} of {listed(bad)} is not above 0"


def _too_little(points: Points) -> Iterator[str]:
    if len(points) < len(PARAMETERS):
        yield f"{len(points)} runs are fewer than the law's {len(PARAMETERS)} parameters ({', '.join(PARAMETERS)})"
    for kind, values_R in (("parameters", points.size_R), ("tokens", points.tokens_R)):
        number = num_distinct(values_R) if len(points) else 0
        if number < NEEDED_DISTINCT:
            shown = f" (from {values_R.min():.4g} to {values_R.max():.4g})" if len(points) else ""
            yield (
                f"the runs have {number} different numbers of {kind}{shown}; an amplitude and an exponent need at "
                f"least {NEEDED_DISTINCT}, more than 1% apart"
            )
            return
    correlation = np.corrcoef(np.log(points.size_R), np.log(points.tokens_R))[0, 1]
    if abs(correlation) > _MOST_CORRELATED:
        yield (
            f"tokens follow parameters (correlation of their logarithms {correlation:.5f}), so their effects cannot be "
            "told apart; add runs of the same size with other amounts of data"
        )


def _rising(points: Points) -> Iterator[str]:
    """The law only falls. Slopes of a plane through the logarithms, by least squares, show what rises."""
    if np.ptp(np.log(points.loss_R)) < _ROUNDING:
        value = points.column_R[0]
        yield f"{points.column} is {value:.6g} in all runs: it depends on neither parameters nor tokens"
        return
    design_R3 = np.stack([np.ones(len(points)), np.log(points.size_R), np.log(points.tokens_R)], axis=1)
    slopes_3, *_ = np.linalg.lstsq(design_R3, np.log(points.loss_R), rcond=None)
    residuals_R = np.log(points.loss_R) - design_R3 @ slopes_3
    variance = residuals_R @ residuals_R / (len(points) - 3)
    errors_3 = np.sqrt(variance * np.diag(np.linalg.inv(design_R3.T @ design_R3)))
    rises_3 = slopes_3 * np.ptp(design_R3, axis=0)  # from the least to the most of each
    for kind, slope, error, rise in zip(("parameters", "tokens"), slopes_3[1:], errors_3[1:], rises_3[1:], strict=True):
        if slope > 2 * error and rise > _ROUNDING:
            if points.ceiling is None:
                what, remedy = points.column, "give the limit it rises toward as the ceiling (1 for a similarity)"
            else:
                what, remedy = f"{points.ceiling:g} - {points.column}", "fit it without a ceiling"
            power = f"as their power {slope:.3g} +- {error:.2g}"
            yield f"{what} rises with {kind} ({power}), and this law only falls; {remedy}"


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
