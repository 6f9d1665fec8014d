import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laver_megatron.data.plan import mixture as mixture_module
from laver_megatron.data.plan import usable
from laver_megatron.data.plan.mixture import Mixture, _Choice, random_bits, shuffle
from laver_megatron.data.plan.sizes import SampleSizes
from laver_megatron.data.plan.usable import UsableRows


def source(num_shards=4, shard_size=25, weight=1.0):
    count = num_shards * shard_size
    return SampleSizes(np.full(count, 10), np.zeros(count), np.arange(count) // shard_size, weight)


def mixture(*sources, seed=3):
    return Mixture(sources, [UsableRows(part, 100, 100) for part in sources], seed)


def order_of(mixed, epoch=0):
    return mixed.order(epoch).at(np.arange(len(mixed)))


def listed_order(sources, seed, epoch):
    """The order as it was made before it could be asked for by position: all samples in a list. Positions of
    checkpoints of that time count in it."""
    blocks, first = [np.empty(0, np.int64)], 0
    for number, part in enumerate(sources):
        rows = np.flatnonzero((part.tokens_I > 0) & (part.tokens_I <= 100) & (part.visual_I <= 100))
        rows = rows[np.argsort(part.shard_I[rows], kind="stable")]
        shards = part.shard_I[rows]
        ends = np.flatnonzero(shards[1:] != shards[:-1]) + 1
        blocks += np.split(rows + first, ends) * math.floor(part.weight)
        if num_chosen := round(part.weight % 1 * len(rows)):
            bits = random_bits(len(rows), seed, epoch, 1, number)
            highest = np.partition(bits, num_chosen - 1)[num_chosen - 1]
            chosen = np.flatnonzero(bits <= highest)[:num_chosen]
            blocks += np.split(rows[chosen] + first, np.searchsorted(chosen, ends))
        first += len(part)
    return np.concatenate([blocks[block] for block in shuffle(len(blocks), seed, epoch, 0)])


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 90), st.integers(1, 30), st.floats(0, 2.5), st.booleans()), min_size=1, max_size=4
    ),
    st.integers(0, 99),
    st.integers(0, 2),
    st.sampled_from([1, 7, 64]),
)
def test_the_order_by_position_is_that_of_the_list(parts, seed, epoch, chunk):
    """A bijection, keyed by seed and epoch, the one that earlier versions held in memory; any position by itself."""
    random = np.random.default_rng(seed)
    sources = []
    for size, shard_size, weight, is_sorted in parts:
        shards = np.arange(size) // shard_size if is_sorted else random.integers(0, 4, size)
        sources.append(SampleSizes(random.integers(0, 120, size), random.integers(0, 120, size), shards, weight))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(usable, "_CHUNK", chunk)
        patch.setattr(mixture_module, "_BITS_A_TIME", chunk)
        mixed = mixture(*sources, seed=seed)
        expected = listed_order(sources, seed, epoch)
        assert len(mixed) == len(mixed.order(epoch)) == len(expected)
        np.testing.assert_array_equal(order_of(mixed, epoch), expected)
        some = random.permutation(len(expected))[:20]
        np.testing.assert_array_equal(mixed.order(epoch).at(some), expected[some])
        assert [mixed.order(epoch).at(np.array([place]))[0] for place in some[:3]] == expected[some[:3]].tolist()


def test_the_bits_of_a_choice_are_those_of_one_long_draw():
    bits = random_bits(5000, 3, 1, 1, 0)
    choice = _Choice(5000, 700, seed=3, epoch=1, source=0)
    expected = np.sort(np.argsort(bits)[:700])
    assert (
        np.concatenate([choice.places(begin, begin + 1000) for begin in range(0, 5000, 1000)]).tolist()
        == expected.tolist()
    )
    assert choice.count(np.array([1000, 4000])).tolist() == np.histogram(expected, [0, 1000, 4000, 5000])[0].tolist()


def test_an_order_holds_nothing_for_each_sample():
    small, large = (mixture(source(num_shards=10, shard_size=size, weight=1.5)) for size in (10, 20_000))
    held = [
        sum(
            part.nbytes
            for owner in (mixed.order(0), *mixed.rows)
            for part in vars(owner).values()
            if isinstance(part, np.ndarray)
        )
        for mixed in (small, large)
    ]
    assert held[1] - held[0] <= 8 * 200_000 / usable._CHUNK + 8


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.floats(0, 3.5)), min_size=1, max_size=4), st.integers(0, 5))
def test_a_weight_is_whole_copies_and_a_choice_of_the_rest(sizes, epoch):
    sources = [source(1, size, weight) for size, weight in sizes]
    mixed = mixture(*sources)
    order = order_of(mixed, epoch)
    assert order.dtype == np.int32 and len(order) == len(mixed)
    times, first = Counter(order.tolist()), 0
    for size, weight in sizes:
        of_source = [times[first + row] for row in range(size)]
        assert set(of_source) <= {math.floor(weight), math.floor(weight) + 1}
        assert sum(of_source) == math.floor(weight) * size + round((weight - math.floor(weight)) * size)
        first += size


def test_another_choice_and_another_order_in_another_epoch():
    mixed = mixture(source(weight=0.5))
    first, second = order_of(mixed, 0), order_of(mixed, 1)
    assert set(first.tolist()) != set(second.tolist()) and len(first) == len(second) == 50
    whole = mixture(source())
    assert order_of(whole, 0).tolist() != order_of(whole, 1).tolist()
    assert order_of(whole, 0).tolist() != order_of(mixture(source(), seed=4)).tolist()
    np.testing.assert_array_equal(order_of(whole, 1), order_of(mixture(source()), 1))


def test_shards_of_all_sources_are_shuffled_whole():
    sources = [source(num_shards=30), source(num_shards=10, weight=2.0)]
    order = order_of(mixture(*sources))
    shards = (order // 25).tolist()
    runs = [shard for place, shard in enumerate(shards) if place == 0 or shards[place - 1] != shard]
    assert Counter(shards) == {**dict.fromkeys(range(30), 25), **dict.fromkeys(range(30, 40), 50)}
    assert len(runs) <= 30 + 20 and runs[:30] != sorted(runs[:30])
    second = [place for place, shard in enumerate(runs) if shard >= 30]
    assert min(second) < 15 and max(second) > len(runs) - 15  # not one source after the other
    assert all(np.all(np.diff(order[begin : begin + 25]) == 1) for begin in range(0, len(order), 25))


def test_rows_that_are_not_in_the_order_of_shards():
    mixed = mixture(SampleSizes([10] * 6, [0] * 6, [0, 1, 0, 1, 0, 1]))
    assert sorted(order_of(mixed)[:3].tolist()) in ([0, 2, 4], [1, 3, 5])


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_weights_that_mean_nothing(weight):
    with pytest.raises(ValueError, match="weight is"):
        source(weight=weight)
