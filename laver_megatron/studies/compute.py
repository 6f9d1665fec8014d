"""What a law says at a given compute: FLOPs per token, and the model size that makes the most of a budget.

FLOPs are those the runs counted, LaVer's overhead included. Per token they are c0 + c1 N to a good approximation (the
image encoder and attention's share in c0, the decoder's products in c1), which extends to sizes nobody has run. Plain
points without FLOPs are taken at 6 N a token.

Letters: R runs, K laws (resamples), X budgets.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import nnls

from laver_megatron.studies.law import Array, Law
from laver_megatron.studies.points import Points, listed

# Where the best size of any budget is looked for; far beyond both ends of what exists.
_LOG_SIZES = (0.0, np.log(1e18))
_HALVINGS = 100


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


def fit_cost(points: Points, flops_R: Array) -> Cost:
    """The non-negative c0 and c1 of least relative squares, of points that `check_points` has passed.

    Raises:
        ValueError: FLOPs that are not above 0, or do not grow with the size.
    """
    size_R = points.size_R
    bad = [points.names[i] for i in np.flatnonzero(~(np.isfinite(flops_R) & (flops_R > 0)))]
    if bad:
        raise ValueError(f"FLOPs of {listed(bad)} are not finite and above 0; leave these runs out")
    per_token_R = flops_R / points.tokens_R
    design_R2 = np.stack([np.ones_like(size_R), size_R], axis=1) / per_token_R[:, None]
    scale_2 = np.abs(design_R2).max(axis=0)
    (constant, per_parameter), _ = nnls(design_R2 / scale_2, np.ones_like(size_R))
    constant, per_parameter = constant / scale_2[0], per_parameter / scale_2[1]
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
    """Along L(N, C / (c0 + c1 N)) the slope by log N rises from below 0 to above, so halving an interval finds its
    zero."""
    several = law.parameters_5.ndim > 1
    parameters_K5 = law.parameters_5 if several else law.parameters_5[None]
    _, A, B, a, b = np.moveaxis(parameters_K5[..., None], -2, 0)
    flops_1X = np.atleast_1d(np.asarray(flops_X, dtype=float))[None]
    low_KX = np.full((len(parameters_K5), flops_1X.shape[1]), _LOG_SIZES[0])
    high_KX = np.full_like(low_KX, _LOG_SIZES[1])
    for _ in range(_HALVINGS):
        middle_KX = (low_KX + high_KX) / 2
        size_KX = np.exp(middle_KX)
        share_KX = cost.per_parameter * size_KX / cost.per_token(size_KX)
        slope_KX = -a * A * size_KX**-a + b * B * cost.tokens(size_KX, flops_1X) ** -b * share_KX
        low_KX, high_KX = np.where(slope_KX < 0, middle_KX, low_KX), np.where(slope_KX < 0, high_KX, middle_KX)
    size_KX = np.exp((low_KX + high_KX) / 2)
    tokens_KX = cost.tokens(size_KX, flops_1X)
    value_KX = Law(parameters_K5, law.ceiling).value(size_KX, tokens_KX)
    return Optimum(size_KX, tokens_KX, value_KX) if several else Optimum(size_KX[0], tokens_KX[0], value_KX[0])
