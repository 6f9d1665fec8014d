"""The scaling law L(N, D) = E + A / N^a + B / D^b: its fit to a set of runs, how far to trust it, and what it says of a
compute budget.

The fit is the third approach of Hoffmann et al. (2022): the Huber loss of the log residuals with a small delta, where
log L is a log-sum-exp of three terms, minimised by L-BFGS from many starts. Two things make all starts reach the same
minimum. The logarithms of N and D are centred, which removes the strong correlation of A with a (B with b); and for
each pair of exponents of a grid, E, A and B start at the non-negative least-squares solution, since the law is linear
in them. The objective is a sum over runs in units of delta^2, so the stopping rule does not depend on delta: stopping
too early is what the published Chinchilla fit suffered from.

A column that rises toward a limit (a similarity toward 1) is fitted as the distance from it, `ceiling - value`, which
falls like a loss. Values of the law are always in the column's own units.

FLOPs are those the runs counted, LaVer's overhead included. Per token they are c0 + c1 N to a good approximation (image
encoder and attention in c0, the decoder's products in c1), which extends to sizes that were not run. Plain points
without FLOPs cost 6 N a token.

Letters: R runs, K laws (resamples), X points anywhere; the last dimension 5 is `PARAMETERS`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize, nnls

from laver_megatron.studies.observations import (
    NEEDED_DISTINCT,
    PARAMETERS,
    Array,
    Observations,
    check_fittable,
    first_few,
    num_distinct,
)

DELTA = 1e-3
# Above the smallest exponent a term is still more than a constant; beyond the largest it is a step.
EXPONENT_BOUNDS = (0.01, 5.0)
_START_EXPONENTS = np.geomspace(0.05, 2.0, 6)
# E, and A / N^a and B / D^b in the middle of the runs, as shares of the mean loss.
_TERM_BOUNDS = (1e-6, 1e3)
# Where the best size of any budget is looked for; far beyond both ends of what exists.
_LOG_SIZES = (0.0, np.log(1e18))
_HALVINGS = 100


@dataclass(frozen=True)
class Law:
    """One law, parameters_5 of shape [5], or several, [K, 5]."""

    parameters_5: Array
    ceiling: float | None = None

    def terms(self) -> Array:
        """E, A, B, a, b: numbers of one law, [K, 1] of several."""
        return self.parameters_5 if self.parameters_5.ndim == 1 else self.parameters_5.T[..., None]

    def value(self, size_X: ArrayLike, tokens_X: ArrayLike) -> Array:
        """The column at these sizes and tokens: [X] of one law, [K, X] of several. With K laws, sizes and tokens may
        also be [K, X]: a point of its own for each law."""
        E, A, B, a, b = self.terms()
        loss = E + A * np.asarray(size_X, dtype=float) ** -a + B * np.asarray(tokens_X, dtype=float) ** -b
        return loss if self.ceiling is None else self.ceiling - loss

    def named(self) -> dict[str, float]:
        """The parameters of one law by name."""
        return dict(zip(PARAMETERS, self.parameters_5.tolist(), strict=True))


@dataclass(frozen=True)
class Fit:
    """A law and the runs it was fitted to.

    Attributes:
        objective: the sum of Huber losses at the minimum.
        num_starts, num_agreeing: starts tried, and those that ended within a millionth of the minimum.
        warnings: what a reader must know before believing the parameters.
        resampled: the laws of the bootstrap; None without one.
    """

    observations: Observations
    law: Law
    delta: float
    objective: float
    num_starts: int
    num_agreeing: int
    warnings: tuple[str, ...]
    resampled: Law | None = None

    @property
    def residuals_R(self) -> Array:
        """Log residuals, measured over fitted, of the loss (of the distance from the ceiling)."""
        fitted = Law(self.law.parameters_5).value(self.observations.size_R, self.observations.tokens_R)
        return np.log(self.observations.loss_R) - np.log(fitted)

    def intervals(self, level: float = 0.95) -> dict[str, tuple[float, float]]:
        """Percentile bootstrap interval of every parameter."""
        assert self.resampled is not None, "fitted without bootstrap"
        low_5, high_5 = percentiles(self.resampled.parameters_5, level)
        return {name: (float(low_5[i]), float(high_5[i])) for i, name in enumerate(PARAMETERS)}


def percentiles(values_K: Array, level: float = 0.95) -> tuple[Array, Array]:
    """The interval that leaves out equal shares of the resamples, the first dimension, on both sides."""
    low, high = np.quantile(values_K, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


class _Problem:
    """The runs as the optimiser sees them: centred logarithms of size and tokens, log loss."""

    def __init__(self, runs: Observations, delta: float) -> None:
        x_R, y_R = np.log(runs.size_R), np.log(runs.tokens_R)
        self.x_mean, self.y_mean = x_R.mean(), y_R.mean()
        self.x_R, self.y_R = x_R - self.x_mean, y_R - self.y_mean
        self.log_loss_R, self.delta = np.log(runs.loss_R), delta
        low, high = np.log(_TERM_BOUNDS) + np.log(np.exp(self.log_loss_R).mean())
        self.bounds = [(low, high)] * 3 + [EXPONENT_BOUNDS] * 2

    def objective(self, theta_5: Array, weights_R: Array) -> tuple[float, Array]:
        """Huber losses in units of delta^2, weighted and summed, and their gradient.

        theta_5: logarithms of E and of both other terms in the middle of the runs, then the exponents."""
        log_E, log_A, log_B, a, b = theta_5
        terms_3R = np.empty((3, len(self.x_R)))
        terms_3R[0], terms_3R[1], terms_3R[2] = log_E, log_A - a * self.x_R, log_B - b * self.y_R
        # By hand, because scipy's logsumexp and softmax take several times as long on so few runs.
        largest_R = terms_3R.max(axis=0)
        shares_3R = np.exp(terms_3R - largest_R)
        sums_R = shares_3R.sum(axis=0)
        shares_3R /= sums_R
        scaled_R = (largest_R + np.log(sums_R) - self.log_loss_R) / self.delta
        distance_R = np.abs(scaled_R)
        huber_R = np.where(distance_R <= 1, 0.5 * scaled_R**2, distance_R - 0.5)
        slopes_3R = shares_3R * (weights_R * np.clip(scaled_R, -1, 1) / self.delta)
        exponents = [-(slopes_3R[1] @ self.x_R), -(slopes_3R[2] @ self.y_R)]
        return float(weights_R @ huber_R), np.array([*slopes_3R.sum(axis=1), *exponents])

    def minimise(self, start_5: Array, weights_R: Array) -> tuple[float, Array]:
        result = minimize(
            self.objective, start_5, args=(weights_R,), jac=True, method="L-BFGS-B", bounds=self.bounds,
            options={"maxiter": 1000, "maxcor": 20, "ftol": 1e-12, "gtol": 1e-6},
        )  # fmt: skip
        return float(result.fun), result.x

    def starts(self) -> Iterator[Array]:
        """For every pair of exponents the E, A and B of least squares on relative residuals."""
        loss_R = np.exp(self.log_loss_R)
        for a in _START_EXPONENTS:
            for b in _START_EXPONENTS:
                terms_R3 = np.stack([np.ones_like(loss_R), np.exp(-a * self.x_R), np.exp(-b * self.y_R)], axis=1)
                amplitudes_3, _ = nnls(terms_R3 / loss_R[:, None], np.ones_like(loss_R))
                # A term of 0 would have a logarithm of minus infinity, and no gradient to come back by.
                yield np.array([*np.log(np.maximum(amplitudes_3, 1e-3 * loss_R.mean())), a, b])

    def parameters(self, theta_X5: Array) -> Array:
        """E, A, B, a, b of thetas [..., 5]."""
        log_E, log_A, log_B, a, b = np.moveaxis(theta_X5, -1, 0)
        amplitudes = np.exp([log_E, log_A + a * self.x_mean, log_B + b * self.y_mean])
        return np.stack([*amplitudes, a, b], axis=-1)

    def at_bounds(self, theta_5: Array) -> list[str]:
        """The names of the parameters that lie at a bound."""
        lows_5, highs_5 = np.array(self.bounds).T
        near_5 = np.minimum(theta_5 - lows_5, highs_5 - theta_5) < 1e-6 * (highs_5 - lows_5)
        return [name for name, near in zip(PARAMETERS, near_5, strict=True) if near]


_AT_BOUND = {
    "E": "the runs show no irreducible part",
    "A": "the column does not depend on size in these runs",
    "B": "the column does not depend on tokens in these runs",
    "a": "the exponent of size is not determined by these runs",
    "b": "the exponent of tokens is not determined by these runs",
}


def fit_law(runs: Observations, *, num_resamples: int = 1000, seed: int = 0, delta: float = DELTA) -> Fit:
    """The law of these runs and, with num_resamples > 0, those of as many resamples of them.

    delta: where the Huber loss of a log residual turns from quadratic to linear. Raises as `check_fittable` does.
    """
    check_fittable(runs)
    problem = _Problem(runs, delta)
    once_R = np.ones(len(runs))
    ends = [problem.minimise(start_5, once_R) for start_5 in problem.starts()]
    least, theta_5 = min(ends, key=lambda end: end[0])
    agreeing = sum(value <= least * (1 + 1e-6) + 1e-9 for value, _ in ends)
    warnings = [f"{name} is at a bound of the fit: {_AT_BOUND[name]}" for name in problem.at_bounds(theta_5)]
    resampled = None
    if num_resamples > 0:
        weights_KR = resample(runs, num_resamples, np.random.default_rng(seed))
        # Warm: from the point fit. A resample moves the minimum by about its own standard error.
        thetas_K5 = np.stack([problem.minimise(theta_5, weights_R)[1] for weights_R in weights_KR])
        resampled = Law(problem.parameters(thetas_K5), runs.ceiling)
        if len(runs) < 2 * len(PARAMETERS):
            warnings.append(f"intervals from {len(runs)} runs are rough: resamples repeat most of them")
        at_bounds = sum(bool(problem.at_bounds(theta_5)) for theta_5 in thetas_K5)
        if at_bounds > 0.01 * num_resamples:
            warnings.append(f"{at_bounds} of {num_resamples} resamples end at a bound of the fit")
    law = Law(problem.parameters(theta_5), runs.ceiling)
    return Fit(runs, law, delta, least * delta**2, len(ends), agreeing, tuple(warnings), resampled)


def resample(runs: Observations, num_resamples: int, generator: np.random.Generator) -> Array:
    """How often each run is drawn, [K, R], with replacement. A draw that does not determine a law (fewer different runs
    than parameters, or fewer than three different sizes or amounts of tokens) is drawn again.

    Raises:
        ValueError: the runs are no more than the parameters.
    """
    num_runs = len(runs)
    if num_runs <= len(PARAMETERS):
        raise ValueError(
            f"{num_runs} runs determine {len(PARAMETERS)} parameters exactly and say nothing of their uncertainty; "
            "add runs, or fit without bootstrap (0 resamples)"
        )
    weights_KR: list[Array] = []
    while len(weights_KR) < num_resamples:  # ends: even of the worst six runs a tenth pass
        indexes = generator.integers(0, num_runs, num_runs)
        spread = (num_distinct(runs.size_R[indexes]), num_distinct(runs.tokens_R[indexes]))
        if len(set(indexes.tolist())) >= len(PARAMETERS) and min(spread) >= NEEDED_DISTINCT:
            weights_KR.append(np.bincount(indexes, minlength=num_runs).astype(float))
    return np.stack(weights_KR)


@dataclass(frozen=True)
class Cost:
    """Training FLOPs per token: `constant + per_parameter N`. largest_error: of the runs it was fitted to, relative."""

    constant: float
    per_parameter: float
    largest_error: float = 0.0

    def per_token(self, size_X: ArrayLike) -> Array:
        return self.constant + self.per_parameter * np.asarray(size_X, dtype=float)

    def flops(self, size_X: ArrayLike, tokens_X: ArrayLike) -> Array:
        return self.per_token(size_X) * np.asarray(tokens_X, dtype=float)

    def tokens(self, size_X: ArrayLike, flops_X: ArrayLike) -> Array:
        """The tokens that these FLOPs pay for."""
        return np.asarray(flops_X, dtype=float) / self.per_token(size_X)


SIX_N_D = Cost(0.0, 6.0)


def fit_cost(runs: Observations, flops_R: Array) -> Cost:
    """The non-negative c0 and c1 of least relative squares, of runs that `check_fittable` has passed.

    Raises:
        ValueError: FLOPs that are not above 0, or do not grow with the size.
    """
    if bad := runs.take(~(np.isfinite(flops_R) & (flops_R > 0))).names:
        raise ValueError(f"FLOPs of {first_few(bad)} are not finite and above 0; leave these runs out")
    size_R, per_token_R = runs.size_R, flops_R / runs.tokens_R
    design_R2 = np.stack([np.ones_like(size_R), size_R], axis=1) / per_token_R[:, None]
    scale_2 = np.abs(design_R2).max(axis=0)
    constant, per_parameter = nnls(design_R2 / scale_2, np.ones_like(size_R))[0] / scale_2
    if per_parameter <= 0:
        raise ValueError(
            f"FLOPs per token (from {per_token_R.min():.4g} to {per_token_R.max():.4g}) do not grow with the number of "
            f"parameters (from {size_R.min():.4g} to {size_R.max():.4g}); count other parts of the model as its size"
        )
    errors_R = (constant + per_parameter * size_R) / per_token_R - 1
    return Cost(float(constant), float(per_parameter), float(np.abs(errors_R).max()))


@dataclass(frozen=True)
class Optimum:
    """The best size and tokens of each budget, and the column's value there: [X] of one law, [K, X] of several."""

    size_X: Array
    tokens_X: Array
    value_X: Array


def optimum(law: Law, cost: Cost, flops_X: ArrayLike) -> Optimum:
    """Along L(N, C / (c0 + c1 N)) the slope over log N rises from below 0 to above; bisection finds its zero."""
    flops_X = np.atleast_1d(np.asarray(flops_X, dtype=float))
    _, A, B, a, b = law.terms()
    low_X = np.full(np.broadcast_shapes(np.shape(A), flops_X.shape), _LOG_SIZES[0])
    high_X = np.full_like(low_X, _LOG_SIZES[1])
    for _ in range(_HALVINGS):
        middle_X = (low_X + high_X) / 2
        size_X = np.exp(middle_X)
        share_X = cost.per_parameter * size_X / cost.per_token(size_X)
        slope_X = -a * A * size_X**-a + b * B * cost.tokens(size_X, flops_X) ** -b * share_X
        low_X, high_X = np.where(slope_X < 0, middle_X, low_X), np.where(slope_X < 0, high_X, middle_X)
    size_X = np.exp((low_X + high_X) / 2)
    tokens_X = cost.tokens(size_X, flops_X)
    return Optimum(size_X, tokens_X, law.value(size_X, tokens_X))
