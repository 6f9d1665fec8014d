"""Which values count as different, what lies outside the runs, and columns that do not change."""

import dataclasses

import numpy as np
import pytest

from laver_megatron.studies.law import fit_law, resample
from laver_megatron.studies.observations import check_fittable, cluster, num_distinct
from tests.unit.studies.synthetic import make_points


def test_clusters_do_not_chain():
    """Each amount is within 1% of the next, and the last 500 times the first."""
    dense = np.geomspace(2e9, 1e12, 1000)
    numbers = cluster(dense)
    assert np.log(500) / 0.01 * 0.5 < num_distinct(dense) < np.log(500) / 0.01
    for number in range(numbers.max() + 1):
        chosen = dense[numbers == number]
        assert chosen.max() / chosen.min() < np.exp(0.01)


def test_clusters_are_of_values_in_any_order():
    assert cluster(np.array([3.0, 1.0, 1.005, 3.02, 1.0, 2.0])).tolist() == [2, 0, 0, 2, 0, 1]
    assert cluster(np.array([])).tolist() == []


def test_a_dense_ladder_of_amounts_is_fitted():
    points = make_points(noise=1e-3, num_sizes=4, num_amounts=650)
    check_fittable(points)
    assert resample(points, 2, np.random.default_rng(0)).shape == (2, 2600)
    assert fit_law(points, num_resamples=0).law.named()["E"] == pytest.approx(1.8, rel=0.01)


def test_outside_the_runs():
    points = make_points()  # 5e8 to 7e10 parameters, 2e9 to 1e12 tokens
    sizes, tokens = np.array([4e8, 5e8, 4.97e8, 8e10, 1e9, 1e9]), np.array([2e9, 2e9, 2e9, 2e12, 1e9, 1.009e12])
    assert points.outside(sizes, tokens) == ["N", "", "", "N D", "D", ""]
    assert points.outside(1e9, 1e10) == [""]


@pytest.mark.parametrize("ceiling", [None, 3.0])
@pytest.mark.parametrize("rounding", [0.0, 1e-14])
def test_a_constant_column_is_called_constant(rounding, ceiling):
    points = make_points(ceiling=ceiling)
    noise_R = rounding * np.random.default_rng(0).standard_normal(len(points))
    constant = dataclasses.replace(points, column_R=2.5 + noise_R)
    with pytest.raises(
        ValueError, match=r"loss is 2\.5 in all runs: it depends on neither parameters nor tokens"
    ) as told:
        check_fittable(constant)
    assert "rises" not in str(told.value)


def test_rounding_is_no_rise():
    """Without noise, a column that depends on tokens alone has a slope by size of rounding's size, and no error."""
    points = make_points()
    for seed in range(20):
        noise_R = 1e-15 * np.random.default_rng(seed).standard_normal(len(points))
        check_fittable(dataclasses.replace(points, column_R=np.exp(8 - 0.3 * np.log(points.tokens_R)) * (1 + noise_R)))
