"""Paired tests against enumeration and closed forms."""

import itertools

import numpy as np
import pytest
from scipy import stats

from laver_megatron.scores.paired import MCNEMAR, PERMUTATION, DifferentSamples, compare
from laver_megatron.scores.results import Sample


def samples(*scores: float, first: int = 0) -> dict[str, Sample]:
    return {str(first + place): Sample(score, "?") for place, score in enumerate(scores)}


def test_right_or_wrong():
    """Of 9 samples, 5 are gained and 1 is lost: 2 (C(6,0) + C(6,1)) / 2^6."""
    test = compare(samples(0, 0, 0, 0, 0, 1, 1, 0, 1), samples(1, 1, 1, 1, 1, 0, 1, 0, 1))
    assert (test.method, test.num_samples) == (MCNEMAR, 9)
    assert test.p_value == pytest.approx(2 * (1 + 6) / 64)
    assert (test.mean_baseline, test.mean_treated) == pytest.approx((3 / 9, 7 / 9))


def test_graded_scores_against_all_sign_flips():
    baseline, treated = np.array([0.1, 0.5, 0.3, 0.9, 0.2, 0.4]), np.array([0.4, 0.4, 0.8, 1.0, 0.5, 0.45])
    difference = treated - baseline
    flipped = [np.mean(difference * signs) for signs in itertools.product((1, -1), repeat=6)]
    expected = np.mean(np.abs(flipped) >= abs(difference.mean()) - 1e-12)
    test = compare(samples(*baseline), samples(*treated))
    assert test.method == PERMUTATION
    assert test.p_value == pytest.approx(expected)


def test_many_graded_scores_are_seeded():
    generator = np.random.default_rng(3)
    baseline = generator.random(400)
    treated = np.clip(baseline + generator.normal(0.02, 0.2, 400), 0, 1)
    first, second = (compare(samples(*baseline), samples(*treated)) for _ in range(2))
    assert first == second
    assert first.p_value == pytest.approx(stats.ttest_rel(treated, baseline).pvalue, abs=0.02)


def test_interval():
    baseline, treated = (0, 0, 1, 1, 0, 1), (1, 0, 1, 1, 1, 1)
    found = compare(samples(*baseline), samples(*treated))
    expected = stats.ttest_rel(treated, baseline).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_no_difference():
    for scores in ((1, 0, 1), (0.5, 0.25, 1)):
        test = compare(samples(*scores), samples(*scores))
        assert (test.p_value, test.low, test.high) == (1.0, 0.0, 0.0)


def test_a_single_sample_has_no_interval():
    test = compare(samples(1), samples(0))
    assert (test.p_value, test.low, test.high) == (1.0, None, None)


def test_questions_that_count_together_are_consecutive_numbers():
    """2-3 and 10-11, not 10-11 before 2-3 as text sorts."""
    baseline = {"2": Sample(1, ""), "3": Sample(1, ""), "10": Sample(1, ""), "11": Sample(0, "")}
    treated = {"11": Sample(1, ""), "10": Sample(1, ""), "3": Sample(0, ""), "2": Sample(1, "")}
    test = compare(baseline, treated, questions_per_sample=2)
    assert (test.num_samples, test.mean_baseline, test.mean_treated) == (2, 0.5, 0.5)
    assert compare(baseline, baseline, 2).mean_treated == 0.5
    with pytest.raises(ValueError, match="3 questions are no multiple of 2"):
        compare(samples(1, 1, 1), samples(1, 1, 1), 2)


def test_other_samples():
    with pytest.raises(DifferentSamples, match="2 of 4 are in the baseline alone, 1 of 3 are not in it"):
        compare(samples(1, 1, 1, 1), samples(1, 1, 1, first=2))
    with pytest.raises(DifferentSamples, match="1 of 2 samples, such as 0, are not the baseline"):
        compare(samples(1, 1), {**samples(1, 1), "0": Sample(1, "!")})
    with pytest.raises(DifferentSamples, match="no samples"):
        compare({}, {})
