"""Fitted studies of known laws: compute, extrapolation, two arms, and what a reader is told beside the numbers."""

import dataclasses

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from laver_megatron.studies.fit_output import study_text
from laver_megatron.studies.fitted_study import (
    BEST_AT_FLOPS,
    FitSettings,
    FittedArm,
    compare_laws,
    fit_study,
    leave_largest_out,
)
from laver_megatron.studies.law import SIX_N_D, Cost, Law, fit_cost, fit_law, optimum
from laver_megatron.studies.pairs import EQUAL_DATA, EQUAL_FLOPS
from laver_megatron.studies.study import ArmRuns
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


def test_arms_that_are_fitted_otherwise_are_no_comparison(arms):
    baseline, treated = arms
    fewer = dataclasses.replace(baseline.fit, resampled=Law(baseline.fit.resampled.parameters_5[:7]))
    none = dataclasses.replace(baseline.fit, resampled=None)
    other = make_arm("other", (0.2, 5.0, 40.0, 0.2, 0.2), SIX_N_D, noise=0, seed=0, ceiling=1.0, column="similarity")
    for wrong in (FittedArm("fewer", fewer, SIX_N_D), FittedArm("none", none, SIX_N_D), other):
        with pytest.raises(AssertionError):
            compare_laws(wrong, treated, BUDGETS)


SETTINGS = FitSettings(num_resamples=20)


def study_arm(points, seed="1"):
    return ArmRuns(points, 6 * points.size_R * points.tokens_R, (seed,) * len(points))


def make_study(*, noise, factor=0.99, **options):
    """Both arms with the noise of the same seed, as runs on the same packs have it; treated is better by a factor."""
    points = make_points(noise=noise, num_sizes=4, num_amounts=4, **options)
    better = dataclasses.replace(points, column_R=points.column_R * factor)
    return {"laver": study_arm(better), "baseline": study_arm(points)}


def notes_with(report, words):
    return [note for note in report.notes if words in note]


def test_a_law_that_its_runs_follow_needs_no_note():
    report = fit_study(make_study(noise=1e-3), SETTINGS)
    assert not notes_with(report, "misses its runs") and not notes_with(report, "miss their runs")
    assert not notes_with(report, "nothing is measured")


def test_a_bad_fit_is_called_bad():
    report = fit_study(make_study(noise=0.15), SETTINGS)
    first, second = notes_with(report, "misses its runs by")
    assert first.startswith("baseline: ") and second.startswith("laver: ")
    residuals_R = np.abs(report.arms[0].fit.residuals_R)
    assert f"by {residuals_R.mean():.1%} on average" in first
    assert f"run-{residuals_R.argmax()} by a factor of {np.exp(residuals_R.max()):.3g}" in first
    assert all(note in study_text(report) for note in (first, second))


@pytest.mark.processes
def test_residuals_are_held_against_the_difference_of_the_arms():
    """1% apart: noise of 4% hides that from the laws, that of 0.1% does not. The pairs measure it either way."""
    for noise, told in ((0.04, True), (1e-3, False)):
        report = fit_study(make_study(noise=noise), FitSettings(num_resamples=0))
        notes = notes_with(report, "read the measured differences, not those of the laws")
        assert bool(notes) == told, noise
        assert len(report.measured.pairs) == 16
        assert all(pair.log_ratio == pytest.approx(np.log(0.99)) for pair in report.measured.pairs)
        assert [mean.num_pairs for mean in report.measured.means] == [4, 4, 4, 4, 16]
    assert (
        "(1.01%)" in notes_with(fit_study(make_study(noise=0.04), FitSettings(num_resamples=0)), "read the measured")[0]
    )


@pytest.mark.processes
def test_means_are_in_the_text_and_need_no_resamples():
    study = make_study(noise=1e-3)
    for settings in (SETTINGS, FitSettings(num_resamples=0)):
        report = fit_study(study, settings)
        measured = study_text(report).split("laver minus baseline, measured")[1].split("laver minus")[0]
        assert measured.count("4 pairs") == 4 and measured.count("all  ") == 1
        mean = report.measured.means[-1]
        assert f"{mean.difference:+.4g} [{mean.low:+.4g}, {mean.high:+.4g}]" in measured
    assert report.differences == ()


def test_arms_without_a_pair_are_told():
    study = make_study(noise=1e-3)
    study["laver"] = dataclasses.replace(study["laver"], seeds=("2",) * 16)
    report = fit_study(study, SETTINGS)
    assert report.measured.pairs == () and notes_with(report, "nothing is measured in pairs")
    assert "measured: means" not in study_text(report)


def test_where_a_law_is_extrapolated():
    """LaVer has no run of the largest size: every row there is marked, and those at smaller sizes are not."""
    study = make_study(noise=1e-3)
    points = study["laver"].observations
    study["laver"] = study_arm(points.take(points.size_R < 6e10))
    report = fit_study(study, SETTINGS)
    for row in report.differences:
        if row.kind == "equal data":
            assert row.outside == ("laver: N" if row.baseline_size > 6e10 else "")
    number = sum(bool(row.outside) for row in report.differences)
    assert notes_with(
        report, f"{number} of {len(report.differences)} differences between the laws are outside the runs"
    )
    assert "outside the runs (laver: N)" in study_text(report)


def test_a_budget_far_from_the_runs_is_outside():
    report = fit_study(make_study(noise=1e-3), dataclasses.replace(SETTINGS, budgets=(1e30,)))
    assert report.differences[-1].outside == "baseline: N D; laver: N D"


def test_a_cost_is_judged_after_the_points():
    points = make_points(TRUE_5).take(np.array([0, 1]))
    with pytest.raises(ValueError, match=r"^all runs: no law can be fitted to 'loss' of 2 runs:\n  - 2 runs are fewer"):
        fit_study({"all runs": ArmRuns(points, np.ones(2), ("", ""))}, SETTINGS)
