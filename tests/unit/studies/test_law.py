"""The fit against laws that are known: exact without noise, covered by its intervals with noise."""

import dataclasses

import numpy as np
import pytest
from scipy.optimize import approx_fprime

from laver_megatron.studies import law as law_module
from laver_megatron.studies.law import Law, fit_law, resample
from laver_megatron.studies.observations import PARAMETERS, Observations, check_fittable, num_distinct
from tests.unit.studies.synthetic import TRUE_5, make_points


def replaced(points, **arrays):
    return dataclasses.replace(points, **arrays)


@pytest.mark.parametrize(
    "parameters_5", [TRUE_5, (0.5, 30.0, 4.0, 0.2, 0.1), (1.2, 2e5, 900.0, 0.7, 0.25)], ids=["usual", "slow", "steep"]
)
def test_without_noise_the_parameters_come_back(parameters_5):
    """To 1e-5: the objective is flat to rounding within about that of its minimum."""
    fit = fit_law(make_points(parameters_5), num_resamples=0)
    assert fit.law.parameters_5 == pytest.approx(np.asarray(parameters_5), rel=1e-5)
    assert fit.num_agreeing > fit.num_starts / 2 and fit.warnings == ()
    assert np.abs(fit.residuals_R).max() < 1e-6 and fit.resampled is None


def test_the_gradient_is_the_objectives():
    problem = law_module._Problem(make_points(noise=0.003), delta=1e-3)
    weights_R = np.random.default_rng(1).integers(0, 3, 42).astype(float)
    theta_5 = np.array([0.5, -1.5, -1.6, 0.3, 0.4])  # away from the minimum: residuals on both sides of delta
    value, gradient_5 = problem.objective(theta_5, weights_R)
    assert value > 0
    numeric_5 = approx_fprime(theta_5, lambda theta_5: problem.objective(theta_5, weights_R)[0], 1e-7)
    assert gradient_5 == pytest.approx(numeric_5, rel=1e-4)  # of one-sided differences


def test_the_objective_is_the_huber_loss_of_the_log_residuals():
    points = make_points(noise=0.002)
    fit = fit_law(points, num_resamples=0, delta=1e-3)
    residuals = [
        abs(float(np.log(y / fit.law.value(n, d))))
        for n, d, y in zip(points.size_R, points.tokens_R, points.column_R, strict=True)
    ]
    assert min(residuals) < 1e-3 < max(residuals), "both branches must count"
    expected = sum(r * r / 2 if r < 1e-3 else 1e-3 * (r - 1e-3 / 2) for r in residuals)
    assert fit.objective == pytest.approx(expected, rel=1e-9)


def test_an_outlier_moves_little_and_delta_says_how_much():
    """With the small delta each run pulls with a bounded force; with a large one it is least squares."""
    points = make_points(noise=0.002)
    column_R = points.column_R.copy()
    column_R[10] *= 1.3
    spoilt = replaced(points, column_R=column_R)
    moved = {delta: abs(fit_law(spoilt, num_resamples=0, delta=delta).law.named()["E"] - 1.8) for delta in (1e-3, 1.0)}
    assert moved[1e-3] < 0.01 < 0.03 < moved[1.0]


def test_no_start_of_a_wide_grid_finds_a_lower_minimum():
    points = make_points(noise=0.01, seed=3, num_sizes=4, num_amounts=3)
    fit = fit_law(points, num_resamples=0)
    problem, once_R = law_module._Problem(points, fit.delta), np.ones(len(points))
    generator = np.random.default_rng(0)
    starts = generator.uniform((-2, -5, -5, 0.02, 0.02), (1, 1, 1, 2, 2), (60, 5))
    others = [problem.minimise(start_5, once_R)[0] * fit.delta**2 for start_5 in starts]
    assert fit.objective <= min(others) * (1 + 1e-6)


STUDY = pytest.mark.slow(reason="a study of 50 seeds")


@pytest.mark.processes
@pytest.mark.parametrize("num_seeds, needed, num_resamples", [(6, 4, 50), pytest.param(50, 43, 200, marks=STUDY)])
def test_intervals_cover_the_truth(num_seeds, needed, num_resamples):
    """95% intervals of E, a and b: at least 43 of 50 seeds each (a right interval is below that in 1 of 100 trials),
    and 4 of 6 where there is little time."""
    covered = dict.fromkeys(("E", "a", "b"), 0)
    widths = []
    for seed in range(num_seeds):
        fit = fit_law(
            make_points(noise=0.005, seed=seed, num_sizes=6, num_amounts=5), num_resamples=num_resamples, seed=seed
        )
        intervals = fit.intervals()
        for name in covered:
            low, high = intervals[name]
            covered[name] += low <= TRUE_5[PARAMETERS.index(name)] <= high
        widths.append(intervals["a"][1] - intervals["a"][0])
    assert all(count >= needed for count in covered.values()), covered
    assert np.mean(widths) < 0.3, "an interval that holds everything covers, too"


def test_intervals_widen_with_noise_and_with_the_level():
    quiet, noisy = (fit_law(make_points(noise=noise), num_resamples=40) for noise in (0.002, 0.02))
    assert all(
        quiet.intervals()[name][1] - quiet.intervals()[name][0]
        < noisy.intervals()[name][1] - noisy.intervals()[name][0]
        for name in ("E", "a", "b")
    )
    for name, (low, high) in quiet.intervals(0.5).items():
        assert quiet.intervals(0.95)[name][0] < low < high < quiet.intervals(0.95)[name][1]


def test_the_seed_decides_the_resamples():
    points = make_points(noise=0.005)
    first, again, other = (fit_law(points, num_resamples=5, seed=seed).resampled.parameters_5 for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.allclose(first, other)


def test_a_warm_start_finds_what_many_starts_find():
    points = make_points(noise=0.01)
    fit = fit_law(points, num_resamples=3)
    problem = law_module._Problem(points, fit.delta)
    weights_KR = resample(points, 3, np.random.default_rng(0))
    for weights_R, parameters_5 in zip(weights_KR, fit.resampled.parameters_5, strict=True):
        _, theta_5 = min((problem.minimise(start_5, weights_R) for start_5 in problem.starts()), key=lambda end: end[0])
        # The exponents; E, A and B are known through the objective alone, which is as flat as residuals allow.
        assert parameters_5[3:] == pytest.approx(theta_5[3:], rel=1e-3)


@pytest.mark.parametrize("runs", ["a grid of 3 x 3", "six runs"])
def test_a_resample_can_always_determine_a_law(runs):
    points = make_points(noise=0.01, num_sizes=3, num_amounts=3)
    if runs == "six runs":
        points = points.take(np.array([0, 1, 2, 3, 6, 8]))
    weights_KR = resample(points, 200, np.random.default_rng(0))
    assert (weights_KR.sum(axis=1) == len(points)).all()
    assert len(np.unique(weights_KR, axis=0)) > 20
    for weights_R in weights_KR:
        drawn = points.take(weights_R > 0)
        assert len(drawn) >= 5 and num_distinct(drawn.size_R) == num_distinct(drawn.tokens_R) == 3


def test_a_rising_column_is_fitted_as_the_distance_from_its_ceiling():
    truth_5 = (0.2, 5.0, 40.0, 0.2, 0.2)
    points = make_points(truth_5, ceiling=1.0, column="similarity")
    assert points.column_R[0] < points.column_R[-1] < 1
    fit = fit_law(points, num_resamples=0)
    assert fit.law.parameters_5 == pytest.approx(np.asarray(truth_5), rel=1e-5)
    # Values are the column's own again, and rise.
    assert fit.law.value(points.size_R, points.tokens_R) == pytest.approx(points.column_R, rel=1e-6)
    with pytest.raises(
        ValueError, match=r"similarity rises with parameters \(as their power 0\.\d+ .* ceiling \(1 for"
    ):
        fit_law(replaced(points, ceiling=None))
    falling = make_points()
    with pytest.raises(ValueError, match=r"10 - loss rises with .* fit it without a ceiling"):
        fit_law(replaced(falling, ceiling=10.0))


def test_values_of_several_laws_at_several_points():
    laws = Law(np.stack([TRUE_5, TRUE_5 * 1.1]), ceiling=5.0)
    sizes, tokens = np.array([1e9, 2e9, 3e9]), np.array([1e10, 3e10, 5e10])
    values_KX = laws.value(sizes, tokens)
    assert values_KX.shape == (2, 3)
    for k, parameters_5 in enumerate(laws.parameters_5):
        E, A, B, a, b = parameters_5
        assert values_KX[k] == pytest.approx(5.0 - (E + A / sizes**a + B / tokens**b))
        assert Law(parameters_5, 5.0).value(sizes, tokens) == pytest.approx(values_KX[k])
        assert Law(parameters_5, 5.0).value(sizes[1], tokens[1]) == pytest.approx(values_KX[k, 1])
    assert laws.value(values_KX * 0 + sizes, tokens) == pytest.approx(values_KX)


# --- what is refused -----------------------------------------------------------------------------------


def some(points, number):
    """Runs of different sizes and amounts."""
    return points.take(np.array([0, 9, 32, 20, 40, 5, 12, 30])[:number])


def with_value(points, field, index, value):
    values = getattr(points, field).copy()
    values[index] = value
    return replaced(points, **{field: values})


POINTS = make_points(noise=0.001)
SAME_SIZE = POINTS.take(np.isclose(POINTS.size_R, POINTS.size_R[0]))
TWO_AMOUNTS = POINTS.take(POINTS.tokens_R < 1e10)
TOKENS_FOLLOW = replaced(POINTS.take(np.arange(7)), tokens_R=20 * POINTS.size_R[:7])


@pytest.mark.parametrize(
    "points, message",
    [
        (some(POINTS, 4), r"of 4 runs:\n  - 4 runs are fewer than the law's 5 parameters \(E, A, B, a, b\)"),
        (some(POINTS, 0), r"0 runs are fewer .*\n  - the runs have 0 different numbers of parameters;"),
        (SAME_SIZE, r"have 1 different numbers of parameters \(from 5e\+08 to 5e\+08\); .* at least 3"),
        (TWO_AMOUNTS, r"have 2 different numbers of tokens \(from 2e\+09 to 6\.931e\+09\)"),
        (TOKENS_FOLLOW, r"tokens follow parameters \(correlation of their logarithms 1\.00000\)"),
        (with_value(POINTS, "column_R", 4, np.nan), r"loss of run-4 is NaN or infinite; leave these runs out"),
        (replaced(POINTS, column_R=POINTS.column_R * np.inf), r"loss of run-0, run-1, run-2 and 39 more is NaN"),
        (with_value(POINTS, "tokens_R", 2, 0.0), r"tokens of run-2 is not above 0"),
        (with_value(POINTS, "size_R", 2, -1.0), r"parameters of run-2 is not above 0"),
        (with_value(POINTS, "column_R", 3, -0.25), r"loss of run-3 is not above 0 \(the lowest is -0\.25\)"),
        (replaced(POINTS, ceiling=2.5), r"run-2 and 8 more is not below the ceiling 2\.5 \(the highest is 2\.9\d+\)"),
    ],
)  # fmt: skip
def test_what_determines_no_law_is_refused_with_its_numbers(points, message):
    with pytest.raises(ValueError, match=message):
        check_fittable(points)
    with pytest.raises(ValueError, match=message):
        fit_law(points, num_resamples=0)


def test_five_runs_have_a_law_but_no_intervals():
    points = some(make_points(), 5)
    fit = fit_law(points, num_resamples=0)
    assert np.abs(fit.residuals_R).max() < 1e-3
    with pytest.raises(ValueError, match=r"^5 runs determine 5 parameters exactly .* \(0 resamples\)$"):
        fit_law(points, num_resamples=10)


@pytest.mark.parametrize(
    "parameters_5, name, message",
    [
        ((1.8, 1e-9, 2085.0, 0.35, 0.37), "A", "A is at a bound of the fit: the column does not depend on size"),
        ((1e-9, 480.0, 2085.0, 0.35, 0.37), "E", "E is at a bound of the fit: the runs show no irreducible part"),
    ],
)
def test_a_parameter_at_its_bound_is_said(parameters_5, name, message):
    fit = fit_law(make_points(parameters_5), num_resamples=0)
    assert any(message in warning for warning in fit.warnings), fit.warnings


def test_few_runs_are_said_to_give_rough_intervals():
    few = make_points(noise=0.001, num_sizes=3, num_amounts=3)
    assert "intervals from 9 runs are rough" in fit_law(few, num_resamples=5).warnings[0]
    assert not any("rough" in warning for warning in fit_law(make_points(noise=0.001), num_resamples=5).warnings)


def test_points_are_taken_by_mask_and_by_index():
    mask = POINTS.size_R > 1e10
    assert POINTS.take(mask).names == POINTS.take(np.flatnonzero(mask)).names
    assert isinstance(POINTS.take(mask), Observations) and (POINTS.take(mask).size_R > 1e10).all()
