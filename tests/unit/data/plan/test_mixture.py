import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laver_megatron.data.plan.mixture import Mixture, SampleSizes


def source(num_shards=4, shard_size=25, weight=1.0):
    count = num_shards * shard_size
    return SampleSizes(np.full(count, 10), np.zeros(count), np.arange(count) // shard_size, weight)


def mixture(*sources, seed=3):
    return Mixture(sources, [part.tokens_I > 0 for part in sources], seed)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.floats(0, 3.5)), min_size=1, max_size=4), st.integers(0, 5))
def test_a_weight_is_whole_copies_and_a_choice_of_the_rest(sizes, epoch):
    sources = [source(1, size, weight) for size, weight in sizes]
    mixed = mixture(*sources)
    order = mixed.order(epoch)
    assert order.dtype == np.int32 and len(order) == len(mixed)
    times, first = Counter(order.tolist()), 0
    for size, weight in sizes:
        of_source = [times[first + row] for row in range(size)]
        assert set(of_source) <= {math.floor(weight), math.floor(weight) + 1}
        assert sum(of_source) == math.floor(weight) * size + round((weight - math.floor(weight)) * size)
        first += size


def test_another_choice_and_another_order_in_another_epoch():
    mixed = mixture(source(weight=0.5))
    first, second = mixed.order(0), mixed.order(1)
    assert set(first.tolist()) != set(second.tolist()) and len(first) == len(second) == 50
    whole = mixture(source())
    assert whole.order(0).tolist() != whole.order(1).tolist()
    assert whole.order(0).tolist() != mixture(source(), seed=4).order(0).tolist()
    np.testing.assert_array_equal(whole.order(1), mixture(source()).order(1))


def test_shards_of_all_sources_are_shuffled_whole():
    sources = [source(num_shards=30), source(num_shards=10, weight=2.0)]
    order = mixture(*sources).order(0)
    shards = (order // 25).tolist()
    runs = [shard for place, shard in enumerate(shards) if place == 0 or shards[place - 1] != shard]
    assert Counter(shards) == {**dict.fromkeys(range(30), 25), **dict.fromkeys(range(30, 40), 50)}
    assert len(runs) <= 30 + 20 and runs[:30] != sorted(runs[:30])
    second = [place for place, shard in enumerate(runs) if shard >= 30]
    assert min(second) < 15 and max(second) > len(runs) - 15  # not one source after the other
    assert all(np.all(np.diff(order[begin : begin + 25]) == 1) for begin in range(0, len(order), 25))


def test_rows_that_are_not_in_the_order_of_shards():
    mixed = mixture(SampleSizes([10] * 6, [0] * 6, [0, 1, 0, 1, 0, 1]))
    assert sorted(mixed.order(0)[:3].tolist()) in ([0, 2, 4], [1, 3, 5])


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_weights_that_mean_nothing(weight):
    with pytest.raises(ValueError, match="weight is"):
        source(weight=weight)
