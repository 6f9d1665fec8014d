"""How full packs are on the benchmark's data sets, and the bounds they are held against."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laver_megatron.data.plan.best_fit import pack_window
from laver_megatron.data.plan.bound import least_packs
from laver_megatron.data.plan.plan import PackPlan
from laver_megatron.data.plan.sizes import SampleSizes
from laver_megatron.data.plan.visual_budget import propose_visual_budget
from tools.benchmarks import packing
from tools.benchmarks.packing import DATA_SETS, benchmark, draw_source, least_packs_jointly, measure_fill


def planned(name, count=10_000, multiple_of=8):
    source = draw_source(name, count, seed=1)
    return PackPlan([source], 4096, propose_visual_budget([source], 4096, multiple_of), seed=0)


@pytest.mark.processes
def test_native_resolutions_fill_both_budgets():
    fill = measure_fill(planned("native"))
    assert fill.token_fill >= 0.98 and fill.visual_fill >= 0.90  # what a plan has to reach


OTHER_SIZE = pytest.mark.slow(reason="the same form of data, with images of the other size")


@pytest.mark.processes
@pytest.mark.parametrize(
    "name",
    [
        *("729", "many 576", "captions 576"),
        *(pytest.param(name, marks=OTHER_SIZE) for name in ("576", "many 729", "captions 729")),
    ],
)
def test_fixed_resolutions_come_within_a_hundredth_of_the_bound(name):
    fill = measure_fill(planned(name))
    assert fill.share_of_bound >= 0.99
    assert fill.token_fill <= fill.token_bound <= 1 and fill.visual_fill <= fill.visual_bound <= 1


def test_the_report_counts_slots():
    plan = PackPlan([SampleSizes([60, 60, 30], [30, 30, 0], [0] * 3)], 100, 40, seed=0)
    fill = measure_fill(plan)
    assert (fill.num_packs, fill.least_packs) == (2, 2)
    assert (fill.tokens_used, fill.tokens_available) == (150, 200)
    assert (fill.visual_used, fill.visual_available) == (60, 80)
    assert str(fill).startswith("75.0% of the token slots (at most 75.0% with these sizes) and 75.0% of the visual")


def test_several_windows_are_held_against_one_bound():
    plan = PackPlan([SampleSizes([60] * 5 + [40] * 5, [0] * 10, [0] * 10)], 100, 0, seed=0, window=1)
    fill = measure_fill(plan, num_windows=10)
    assert (fill.num_packs, fill.least_packs, fill.visual_fill) == (10, 5, 1.0)
    assert fill.token_bound == 1


def test_the_bound_is_of_both_budgets_together_where_packs_are_far_from_each_ones():
    # Of two kinds that share no pack, neither with its own: each budget alone would let some do so.
    plan = PackPlan([SampleSizes([70, 40] * 20, [20, 70] * 20, [0] * 40)], 100, 100, seed=0)
    assert least_packs(*plan.sizes(range(40)), 100, 100) < 35
    fill = measure_fill(plan)
    assert fill.num_packs == fill.least_packs == 40


def test_the_benchmark_prints_a_row_for_each_data_set(monkeypatch):
    monkeypatch.setattr(packing, "_GRAINS", 32)  # quick, and loose
    table = benchmark(DATA_SETS, 400, seq_length=4096, window=100, multiple_of=8)
    assert all(f"\n| {name} | " in table for name in DATA_SETS)


def fewest_packs(sizes, rooms):
    """By trying everything. sizes: (tokens, visual tokens)."""

    def search(rest, packs, best):
        if len(packs) >= best:
            return best
        if not rest:
            return len(packs)
        (tokens, visual), *others = rest
        for i, (token_room, visual_room) in enumerate(packs):
            if tokens <= token_room and visual <= visual_room and packs[i] not in packs[:i]:
                room = (token_room - tokens, visual_room - visual)
                best = search(others, [*packs[:i], room, *packs[i + 1 :]], best)
        return search(others, [*packs, (rooms[0] - tokens, rooms[1] - visual)], best)

    return search(sorted(sizes, reverse=True), [], len(sizes) + 1)


@st.composite
def few_samples(draw):
    seq_length, most_images = draw(st.integers(20, 60)), draw(st.integers(1, 4))
    image = draw(st.integers(1, seq_length // most_images))
    images = draw(st.lists(st.integers(0, most_images), min_size=1, max_size=7))
    sizes = [(draw(st.integers(max(1, image * n), seq_length)), image * n) for n in images]
    return sizes, (seq_length, image * most_images + draw(st.integers(0, image - 1)))


@settings(max_examples=60, deadline=None)
@given(few_samples(), st.sampled_from([7, 20, 512]))
def test_no_packing_needs_fewer(case, grains):
    sizes, rooms = case
    tokens, visual = np.array(sizes, np.int32).T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_GRAINS", grains)
        assert least_packs_jointly(tokens, visual, *rooms) <= fewest_packs(sizes, rooms)


def test_it_sees_what_only_both_budgets_together_forbid():
    # Two of a kind have too many tokens, two of the other too many images, and one of each too many tokens.
    tokens, visual = np.array([70, 40] * 50), np.array([20, 70] * 50)
    assert least_packs(tokens, visual, 100, 100) < 80
    assert least_packs_jointly(tokens, visual, 100, 100) == 100
    # And here all is full: it says no more than the sum.
    tokens, visual = np.array([70, 30] * 50), np.array([20, 80] * 50)
    assert least_packs_jointly(tokens, visual, 100, 100) == 50


def test_finer_grains_are_tighter(monkeypatch):
    tokens, visual = np.full(100, 51), np.full(100, 10)
    assert least_packs_jointly(tokens, visual, 100, 100) == 100
    monkeypatch.setattr(packing, "_GRAINS", 9)  # of 12 tokens: two of 51 become 4 grains each of 8
    assert least_packs_jointly(tokens, visual, 100, 100) == 50


def test_where_it_says_nothing():
    tokens = np.full(10, 60)
    assert least_packs_jointly(tokens, tokens * 0, 100, 100) == 0
    assert least_packs_jointly(tokens, tokens * 0 + 3, 100, 51) == 0  # room for 17 images
    assert least_packs_jointly(tokens, tokens * 0 + 3, 100, 50) == 10
    assert least_packs_jointly(tokens[:0], tokens[:0], 100, 50) == 0


@pytest.mark.processes
def test_it_is_far_tighter_than_the_budgets_own_where_samples_have_many_images():
    source = draw_source("many 729", 2_000, seed=0)
    fits = (source.tokens_I <= 4096) & (source.visual_I <= 2920)
    sizes = source.tokens_I[fits], source.visual_I[fits]
    own, joint = (bound(*sizes, 4096, 2920) for bound in (least_packs, least_packs_jointly))
    assert joint > 1.01 * own
    assert joint <= pack_window(*sizes, 4096, 2920).max() + 1
