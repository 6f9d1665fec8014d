"""Runs made from a known law, for the tests of its fit."""

import numpy as np

from laver_megatron.studies.law import Law
from laver_megatron.studies.observations import Observations

# Of the size of published fits; at 7e9 parameters and 1e11 tokens each term counts: 1.8 + 0.17 + 0.18.
TRUE_5 = np.array([1.8, 480.0, 2085.0, 0.35, 0.37])


def make_points(
    parameters_5=TRUE_5, *, noise=0.0, seed=0, num_sizes=7, num_amounts=6, ceiling=None, column="loss"
) -> Observations:
    """A ladder of sizes times a ladder of tokens; noise is the standard deviation of the log of the loss."""
    sizes, amounts = np.geomspace(5e8, 7e10, num_sizes), np.geomspace(2e9, 1e12, num_amounts)
    size_R, tokens_R = (values.ravel() for values in np.meshgrid(sizes, amounts))
    loss_R = Law(np.asarray(parameters_5)).value(size_R, tokens_R)
    loss_R = loss_R * np.exp(noise * np.random.default_rng(seed).standard_normal(loss_R.size))
    column_R = loss_R if ceiling is None else ceiling - loss_R
    names = tuple(f"run-{i}" for i in range(len(size_R)))
    return Observations(names, size_R, tokens_R, column_R, column, ceiling)
