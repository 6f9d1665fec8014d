import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laver_megatron.data.plan.best_fit import STYLES, Style, pack_window, rank_styles
from laver_megatron.data.plan.bound import least_packs
from tools.benchmarks.packing import draw_source

BEST_FIT, *AIMING = STYLES


@st.composite
def windows(draw):
    """(tokens, visual tokens, seq_length, visual_seq_length) of samples that all fit."""
    seq_length = draw(st.integers(10, 300))
    visual_seq_length = draw(st.integers(0, seq_length))
    tokens = draw(st.lists(st.integers(1, seq_length), min_size=1, max_size=80))
    share = draw(st.sampled_from([0.0, 0.3, 1.0]))
    visual = [min(int(share * count), visual_seq_length) for count in tokens]
    return np.array(tokens, np.int32), np.array(visual, np.int32), seq_length, visual_seq_length


def draw_sizes(count=2000, image=576, seed=0):
    rng = np.random.default_rng(seed)
    num_images = rng.integers(0, 3, count)
    visual = num_images * image if image else num_images * rng.integers(50, 900, count)
    return (visual + rng.integers(30, 600, count)).astype(np.int32), visual.astype(np.int32)


def draw_sizes_of_fixed_images(count):
    source = draw_source("576", count, seed=0)
    fits = source.tokens_I <= 4096
    return source.tokens_I[fits], source.visual_I[fits]


def num_packs(tokens, visual, visual_seq_length, *styles):
    return pack_window(tokens, visual, 4096, visual_seq_length, styles).max() + 1


@settings(max_examples=150, deadline=None)
@given(windows(), st.sampled_from(STYLES))
def test_packs_keep_within_both_budgets_and_hold_every_sample(window, style):
    tokens, visual, seq_length, visual_seq_length = window
    pack_of = pack_window(*window, [style])
    assert pack_of.dtype == np.int32 and len(pack_of) == len(tokens)
    assert set(pack_of.tolist()) == set(range(pack_of.max() + 1))  # none is empty
    assert np.bincount(pack_of, tokens).max() <= seq_length
    assert np.bincount(pack_of, visual).max() <= visual_seq_length
    assert pack_of.max() + 1 >= least_packs(*window)
    np.testing.assert_array_equal(pack_of, pack_window(*window, [style]))


@pytest.mark.parametrize("style", STYLES)
def test_perfect_fits_are_found(style):
    tokens = np.array([60, 60, 40, 40], np.int32)
    assert pack_window(tokens, tokens // 2, 100, 50, [style]).max() == 1


@pytest.mark.parametrize("style", STYLES)
def test_either_budget_alone_can_close_a_pack(style):
    tokens, visual = np.full(8, 10, np.int32), np.full(8, 5, np.int32)
    assert pack_window(tokens, visual, 100, 40, [style]).max() == 0
    assert pack_window(tokens, visual, 100, 10, [style]).max() == 3
    assert pack_window(tokens, visual, 20, 40, [style]).max() == 3


def test_best_fit_suits_sizes_of_every_kind():
    rng = np.random.default_rng(1)
    tokens = rng.integers(20, 4000, 3000).astype(np.int32)
    assert num_packs(tokens, tokens // 2, 2200, BEST_FIT) <= 1.02 * least_packs(tokens, tokens // 2, 4096, 2200)


def test_aiming_suits_images_of_one_size_and_is_found():
    tokens, visual = draw_sizes_of_fixed_images(2000)
    best_fit = num_packs(tokens, visual, 2880, BEST_FIT)
    aiming = min(num_packs(tokens, visual, 2880, style) for style in AIMING)
    assert aiming < best_fit
    styles, good_enough = rank_styles(tokens, visual, 4096, 2880)
    assert styles[0].aims and num_packs(tokens, visual, 2880, *styles) == aiming
    assert good_enough >= aiming / least_packs(tokens, visual, 4096, 2880)


def test_the_first_style_that_is_good_enough_ends_the_search():
    tokens = np.array([50, 50], np.int32)
    broken = Style(True, rounding=float("nan"))  # floor(nan) raises, if it is ever tried
    assert pack_window(tokens, tokens * 0, 100, 0, [BEST_FIT, broken]).tolist() == [0, 0]


def test_what_is_as_good_as_usual_ends_the_search():
    # No two share a pack, which neither budget's own bound can tell.
    sizes = np.array([70, 40] * 20), np.array([20, 70] * 20), 100, 100
    assert least_packs(*sizes) < 35
    styles, good_enough = rank_styles(*sizes)
    broken = Style(True, rounding=float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        pack_window(*sizes, [styles[0], broken])
    assert pack_window(*sizes, [styles[0], broken], good_enough).max() + 1 == 40
    assert rank_styles(*(np.full(10, 50), np.zeros(10, int), 100, 0))[1] == 1.005


@pytest.mark.parametrize("change", [{"largest_first": 0.5}, {"rounding": 0.0}, {"aims": False}])
def test_every_part_of_a_style_changes_the_packs(change):
    tokens, visual = draw_sizes()
    style = Style(aims=True, largest_first=1.0, rounding=0.5)
    changed = Style(**{**vars(style), **change})
    packs = [pack_window(tokens, visual, 4096, 2880, [one]).tolist() for one in (style, changed)]
    assert packs[0] != packs[1]


def test_more_samples_than_the_pool_holds():
    tokens, visual = draw_sizes_of_fixed_images(7000)
    pack_of = pack_window(tokens, visual, 4096, 2880, [Style(True, largest_first=1.0, rounding=0.25)])
    assert np.bincount(pack_of, tokens).max() <= 4096 and np.bincount(pack_of, visual).max() <= 2880
    assert pack_of.max() + 1 <= 1.02 * least_packs(tokens, visual, 4096, 2880)
