"""Compute, extrapolation and the comparison of two arms, on laws that are known."""

import dataclasses

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from laver_megatron.studies.fitted_study import (
    BEST_AT_FLOPS,
    FittedArm,
    compare_laws,
    leave_largest_out,
)
from laver_megatron.studies.law import SIX_N_D, Cost, Law, fit_cost, fit_law, optimum
from laver_megatron.studies.pairs import EQUAL_DATA, EQUAL_FLOPS
from tests.unit.studies.synthetic import TRUE_5, make_points

BUDGETS = np.array([1e20, 1e22, 1e24])
WITH_ENCODER = Cost(constant=4e9, per_parameter=6.2)


def test_the_optimum_at_6nd_is_hoffmanns_closed_form():
    E, A, B, a, b = TRUE_5
    best = optimum(Law(TRUE_5), SIX_N_D, BUDGETS)
    share = (a * A / (b * B)) ** (1 / (a + b))
    assert best.size_X == pytest.approx(share * (BUDGETS / 6) ** (b / (a + b)), rel=1e-9)
    assert best.tokens_X == pytest.approx((BUDGETS / 6) ** (a / (a + b)) / share, rel=1e-9)


@pytest.mark.parametrize("ceiling", [None, 4.0])
def test_no_other_size_is_better_at_any_cost_per_token(ceiling):
    law = Law(np.stack([TRUE_5, TRUE_5 * (1, 2, 1, 1.1, 0.9)]), ceiling)
    best = optimum(law, WITH_ENCODER, BUDGETS)
    sign = 1 if ceiling is None else -1
    for k, parameters_5 in enumerate(law.parameters_5):
        one = Law(parameters_5, ceiling)
        assert optimum(one, WITH_ENCODER, BUDGETS).size_X == pytest.approx(best.size_X[k])
        for x, budget in enumerate(BUDGETS):
            found = minimize_scalar(
                lambda log_size, one=one, budget=budget: (
                    sign * float(one.value(np.exp(log_size), WITH_ENCODER.tokens(np.exp(log_size), budget)))
                ),
                bounds=(np.log(1e6), np.log(1e14)), method="bounded", options={"xatol": 1e-9},
            )  # fmt: skip
            assert best.value_X[k, x] == pytest.approx(sign * found.fun, rel=1e-12)
            # A minimum's place is known to the root of the precision of its value.
            assert np.log(best.size_X[k, x]) == pytest.approx(found.x, abs=1e-4)
            assert WITH_ENCODER.flops(best.size_X[k, x], best.tokens_X[k, x]) == pytest.approx(budget)


def test_the_cost_per_token_is_found():
    points = make_points()
    flops_R = WITH_ENCODER.flops(points.size_R, points.tokens_R)
    cost = fit_cost(points, flops_R)
    assert (cost.constant, cost.per_parameter) == pytest.approx((4e9, 6.2), rel=1e-9)
    assert cost.largest_error < 1e-9
    bent = fit_cost(points, flops_R * np.where(points.size_R > 3e10, 1.1, 1.0))
    assert 0.01 < bent.largest_error < 0.1


@pytest.mark.parametrize(
    "flops, message",
    [
        (lambda points: 1e12 * points.tokens_R, r"FLOPs per token \(from 1e\+12 to 1e\+12\) do not grow with"),
        (lambda points: 0 * points.tokens_R, r"FLOPs of run-0, run-1, run-2 and 39 more are not finite and above 0"),
        (lambda points: np.where(points.tokens_R > 9e11, np.nan, 1), r"FLOPs of run-35, run-36, run-37 and 4 more are"),
    ],
)
def test_a_cost_that_cannot_be(flops, message):
    points = make_points()
    with pytest.raises(ValueError, match=message):
        fit_cost(points, flops(points))


def test_the_largest_size_is_predicted_from_the_others():
    points = make_points()
    exact = leave_largest_out(fit_law(points, num_resamples=0))
    assert (exact.size, exact.num_left_out, exact.num_fitted) == (pytest.approx(7e10), 6, 36)
    assert exact.mean_error < 1e-6 and exact.problem is None
    # Were the largest runs 5% worse than the law, a prediction from the smaller ones would be that much too low.
    is_largest_R = points.size_R > 6e10
    worse = dataclasses.replace(points, column_R=points.column_R * np.where(is_largest_R, 1.05, 1.0))
    missed = leave_largest_out(fit_law(worse, num_resamples=0))
    assert missed.errors_R == pytest.approx([1 / 1.05 - 1] * 6, rel=1e-4)
    assert missed.names == worse.take(is_largest_R).names


def test_a_ladder_without_a_size_to_spare_says_so():
    result = leave_largest_out(fit_law(make_points(num_sizes=3), num_resamples=0))
    assert "2 different numbers of parameters" in result.problem and result.predicted_R == ()


# --- arms ----------------------------------------------------------------------------------------------

# Treated: B is a tenth smaller, and a token costs 1.4 times as much.
TREATED_5 = TRUE_5 * (1, 1, 0.9, 1, 1)
TREATED_COST = Cost(constant=4e9 * 1.4, per_parameter=6.2 * 1.4)


def make_arm(name, parameters_5, cost, *, noise, seed, num_resamples=60, **options):
    points = make_points(parameters_5, noise=noise, seed=seed, num_sizes=4, num_amounts=4, **options)
    return FittedArm(name, fit_law(points, num_resamples=num_resamples, seed=seed), cost)


@pytest.fixture(scope="module")
def arms():
    """Almost without noise, so that the differences are those of the laws."""
    return (
        make_arm("baseline", TRUE_5, WITH_ENCODER, noise=1e-4, seed=0),
        make_arm("treated", TREATED_5, TREATED_COST, noise=1e-4, seed=1),
    )


def test_differences_of_two_arms(arms):
    rows = compare_laws(*arms, budgets_X=BUDGETS)
    baseline, treated = Law(TRUE_5), Law(TREATED_5)
    assert [sum(row.kind == kind for row in rows) for kind in (EQUAL_DATA, EQUAL_FLOPS, BEST_AT_FLOPS)] == [16, 16, 3]
    for row in rows:
        ours = baseline.value(row.baseline_size, row.baseline_tokens)
        theirs = treated.value(row.treated_size, row.treated_tokens)
        assert row.difference == pytest.approx(float(theirs - ours), abs=2e-3)  # twenty times the noise
        assert row.low < row.difference < row.high
        assert row.baseline_flops == pytest.approx(WITH_ENCODER.flops(row.baseline_size, row.baseline_tokens))
        assert row.treated_flops == pytest.approx(TREATED_COST.flops(row.treated_size, row.treated_tokens))
    for row in rows[:16]:
        assert (row.baseline_size, row.baseline_tokens) == (row.treated_size, row.treated_tokens)
        assert row.treated_flops / row.baseline_flops == pytest.approx(1.4) and row.difference < 0
    for row in rows[16:32]:
        assert row.baseline_size == row.treated_size and row.treated_tokens < row.baseline_tokens
        assert row.treated_flops == pytest.approx(row.baseline_flops)
    for row, budget in zip(rows[32:], BUDGETS, strict=True):
        assert row.treated_flops == pytest.approx(row.baseline_flops) == pytest.approx(budget)
        assert row.baseline == pytest.approx(float(optimum(baseline, WITH_ENCODER, budget).value_X[0]), abs=2e-3)


def test_equal_arms_differ_by_nothing_within_the_interval():
    """Of 16 points with 95% intervals, which share their noise, most hold 0."""
    baseline = make_arm("baseline", TRUE_5, WITH_ENCODER, noise=0.004, seed=5)
    treated = make_arm("treated", TRUE_5, WITH_ENCODER, noise=0.004, seed=6)
    rows = compare_laws(baseline, treated, BUDGETS[:1])
    assert sum(row.low < 0 < row.high for row in rows if row.kind == EQUAL_DATA) >= 12
    for row in rows:
        if row.kind == EQUAL_FLOPS:  # what costs the same buys the same
            assert row.treated_tokens == pytest.approx(row.baseline_tokens)


def test_arms_that_cannot_be_compared(arms):
    baseline, treated = arms
    few = FittedArm(
        "few", dataclasses.replace(baseline.fit, resampled=Law(baseline.fit.resampled.parameters_5[:7])), SIX_N_D
    )
    with pytest.raises(ValueError, match=r"same number of resamples of both arms, above 0, not \[7, 60\]"):
        compare_laws(few, treated, BUDGETS)
    none = FittedArm("none", dataclasses.replace(baseline.fit, resampled=None), SIX_N_D)
    with pytest.raises(ValueError, match=r"not \[0, 0\]"):
        compare_laws(none, none, BUDGETS)
    other = make_arm("other", (0.2, 5.0, 40.0, 0.2, 0.2), SIX_N_D, noise=0, seed=0, ceiling=1.0, column="similarity")
    with pytest.raises(ValueError, match=r"baseline was fitted to loss \(ceiling None\), other to similarity"):
        compare_laws(baseline, other, BUDGETS)
