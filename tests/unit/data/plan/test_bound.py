import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from laver_megatron.data.plan.bound import least_packs


def fewest_packs(sizes, capacity):
    """By trying everything."""

    def search(rest, rooms, best):
        if len(rooms) >= best:
            return best
        if not rest:
            return len(rooms)
        for i in range(len(rooms)):
            if rest[0] <= rooms[i] and rooms[i] not in rooms[:i]:
                best = search(rest[1:], [*rooms[:i], rooms[i] - rest[0], *rooms[i + 1 :]], best)
        return search(rest[1:], [*rooms, capacity - rest[0]], best)

    return search(sorted(sizes, reverse=True), [], len(sizes) + 1)


@settings(max_examples=200, deadline=None)
@given(st.integers(5, 30).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), min_size=1, max_size=8))))
def test_no_packing_needs_fewer(case):
    capacity, sizes = case
    assert least_packs(np.array(sizes), np.zeros(len(sizes), int), capacity, 0) <= fewest_packs(sizes, capacity)
    assert least_packs(np.ones(len(sizes), int), np.array(sizes), 10**6, capacity) <= fewest_packs(sizes, capacity)


def test_it_counts_what_cannot_share_a_pack():
    size = np.full(100, 51)
    assert least_packs(size, size * 0, 100, 0) == 100  # by their sum it would be 51
    images = np.full(100, 729)
    assert least_packs(images, images, 4096, 2920) == 25  # by their sum 24.97
    assert least_packs(images, images, 4096, 3640) == 25  # by their sum 20.03: a fifth image would need 3645
    assert least_packs(np.full(4, 25), np.zeros(4, int), 100, 0) == 1
