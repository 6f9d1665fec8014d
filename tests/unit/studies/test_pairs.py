"""Pairs of runs and their means, held against Student's t of scipy."""

import dataclasses

import numpy as np
import pytest
from scipy import stats

from laver_megatron.studies.observations import Observations
from laver_megatron.studies.pairs import EQUAL_DATA, EQUAL_FLOPS, find_pairs, mean_differences, unpaired
from laver_megatron.studies.study import ArmRuns

SIZES, AMOUNTS = (1e8, 2e8, 4e8), (1e9, 3e9)


def make_arm(name, value, *, seeds=("1",), cost=6.0, amounts=AMOUNTS, ceiling=None):
    """Runs of every size, amount and seed; value is a function (size, tokens, seed) -> column."""
    places = [(size, tokens, seed) for seed in seeds for size in SIZES for tokens in amounts]
    size_R, tokens_R = (np.array(values) for values in zip(*[place[:2] for place in places], strict=True))
    names = tuple(f"{name}-{size:g}-{tokens:g}-{seed}" for size, tokens, seed in places)
    points = Observations(names, size_R, tokens_R, np.array([value(*place) for place in places]), "loss", ceiling)
    return ArmRuns(points, cost * size_R * tokens_R, tuple(seed for *_, seed in places))


def plain(size, tokens, seed):
    return 2 + 1e7 / size + 1e8 / tokens + 0.1 * int(seed)


def better(size, tokens, seed):
    return plain(size, tokens, seed) - 0.01 * int(seed) - 1e6 / size


def test_pairs_share_size_data_and_seed_whatever_their_order():
    baseline, treated = (
        make_arm("plain", plain, seeds=("1", "2")),
        make_arm("laver", better, seeds=("2", "1"), cost=9.0),
    )
    pairs = find_pairs(baseline, treated)
    assert len(pairs) == 12 and {pair.kind for pair in pairs} == {EQUAL_DATA}
    for pair in pairs:
        assert pair.baseline_name.removeprefix("plain") == pair.treated_name.removeprefix("laver")
        assert pair.difference == pytest.approx(-0.01 * int(pair.seed) - 1e6 / pair.size)
        assert pair.log_ratio == pytest.approx(np.log(pair.treated / pair.baseline))
        assert pair.treated_flops == pytest.approx(1.5 * pair.baseline_flops)


def test_the_mean_has_students_interval():
    baseline, treated = make_arm("plain", plain, seeds=("1", "2")), make_arm("laver", better, seeds=("1", "2"))
    pairs = find_pairs(baseline, treated)
    for level in (0.95, 0.5):
        means = mean_differences(pairs, level)
        assert [(mean.amount, mean.num_pairs) for mean in means] == [(1e9, 6), (3e9, 6), (None, 12)]
        for mean in means:
            differences = [pair.difference for pair in pairs if mean.amount in (None, pair.baseline_tokens)]
            expected = stats.ttest_1samp(differences, 0).confidence_interval(level)
            assert mean.difference == pytest.approx(np.mean(differences))
            assert (mean.low, mean.high) == pytest.approx((expected.low, expected.high))
    (alone, _) = mean_differences(pairs[:1])
    assert (alone.low, alone.high) == (None, None)


def test_runs_of_equal_flops_are_pairs_of_their_own():
    """A compute budget gives the dearer arm fewer tokens; whole iterations miss it by a little."""
    treated = make_arm("laver", better, cost=9.0, amounts=[tokens * 6 / 9 * 1.004 for tokens in AMOUNTS])
    pairs = find_pairs(make_arm("plain", plain), treated)
    assert [pair.kind for pair in pairs] == [EQUAL_FLOPS] * 6
    for pair in pairs:
        assert pair.treated_flops / pair.baseline_flops == pytest.approx(1.004)
        assert pair.treated_tokens / pair.baseline_tokens == pytest.approx(1.004 * 6 / 9)
    assert [mean.num_pairs for mean in mean_differences(pairs)] == [1, 1, 1, 1, 1, 1, 6]


def test_what_is_no_pair():
    baseline = make_arm("plain", plain)
    assert find_pairs(baseline, make_arm("laver", better, seeds=("2",))) == []
    far = make_arm("laver", better, amounts=[1.02 * tokens for tokens in AMOUNTS])
    assert find_pairs(baseline, far) == []
    # Repeats that nothing tells apart: which of them belongs to which?
    twice = make_arm("laver", better, seeds=("1", "1"))
    assert find_pairs(baseline, twice) == []
    uncounted = dataclasses.replace(baseline, flops_R=None)
    assert [pair.baseline_flops for pair in find_pairs(uncounted, make_arm("laver", better))] == [None] * 6


def test_the_ratio_is_that_of_what_falls():
    baseline = make_arm("plain", lambda *place: 0.5, ceiling=1.0)
    treated = make_arm("laver", lambda *place: 0.6, ceiling=1.0)
    pair = find_pairs(baseline, treated)[0]
    assert pair.difference == pytest.approx(0.1) and pair.log_ratio == pytest.approx(np.log(0.4 / 0.5))


def test_runs_without_a_partner_are_named_with_what_is_nearest():
    """A budget that whole iterations miss by 3% for one size; another has no run of the other arm at all."""
    cost = 9.0

    def amounts(size):
        return 1.03 if size == SIZES[0] else 1.0

    baseline, treated = make_arm("plain", plain, seeds=("1", "2")), make_arm("laver", better, cost=cost)
    points = treated.observations
    tokens_R = points.tokens_R * 6 / cost * np.array([amounts(size) for size in points.size_R])
    treated = dataclasses.replace(
        treated, observations=dataclasses.replace(points, tokens_R=tokens_R), flops_R=cost * points.size_R * tokens_R
    )
    pairs = find_pairs(baseline, treated)
    assert len(pairs) == 4
    alone = unpaired(baseline, treated, pairs)
    near = {name: distance for name, distance in alone.items() if distance < np.inf}
    assert sorted(near) == ["laver-1e+08-1e+09-1", "laver-1e+08-3e+09-1", "plain-1e+08-1e+09-1", "plain-1e+08-3e+09-1"]
    assert list(near.values()) == pytest.approx([0.03] * 4)
    assert {name for name in alone if name not in near} == {
        name for name in baseline.observations.names if name.endswith("-2")
    }
    both = make_arm("plain", plain), make_arm("laver", better)
    assert unpaired(*both, find_pairs(*both)) == {}
