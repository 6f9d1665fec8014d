import numpy as np
import pytest

from laver_megatron.data.plan import joint_bound
from laver_megatron.data.plan.bound import least_packs
from laver_megatron.data.plan.fill import measure_fill, propose_visual_budget
from laver_megatron.data.plan.mixture import Source
from laver_megatron.data.plan.plan import PackPlan
from tools.benchmarks.packing import DATA_SETS, benchmark, draw_source


def planned(name, count=10_000, multiple_of=8):
    source = draw_source(name, count, seed=1)
    return PackPlan([source], 4096, propose_visual_budget([source], 4096, multiple_of), seed=0)


def test_native_resolutions_fill_both_budgets():
    fill = measure_fill(planned("native"))
    assert fill.token_fill >= 0.98 and fill.visual_fill >= 0.90  # what a plan has to reach


@pytest.mark.parametrize("name", ["729", "576", "many 729", "many 576", "captions 729", "captions 576"])
def test_fixed_resolutions_come_within_a_hundredth_of_the_bound(name):
    fill = measure_fill(planned(name))
    assert fill.share_of_bound >= 0.99
    assert fill.token_fill <= fill.token_bound <= 1 and fill.visual_fill <= fill.visual_bound <= 1


def test_the_report_counts_slots():
    plan = PackPlan([Source([60, 60, 30], [30, 30, 0], [0] * 3)], 100, 40, seed=0)
    fill = measure_fill(plan)
    assert (fill.num_packs, fill.least_packs) == (2, 2)
    assert (fill.tokens_used, fill.tokens_available) == (150, 200)
    assert (fill.visual_used, fill.visual_available) == (60, 80)
    assert str(fill).startswith("75.0% of the token slots (at most 75.0% with these sizes) and 75.0% of the visual")


def test_several_windows_are_held_against_one_bound():
    plan = PackPlan([Source([60] * 5 + [40] * 5, [0] * 10, [0] * 10)], 100, 0, seed=0, window=1)
    fill = measure_fill(plan, num_windows=10)
    assert (fill.num_packs, fill.least_packs, fill.visual_fill) == (10, 5, 1.0)
    assert fill.token_bound == 1


def test_the_budget_is_a_number_of_images_where_all_are_of_one_size():
    for name, image in (("729", 729), ("captions 576", 576)):
        source = draw_source(name, 3000, seed=0)
        assert propose_visual_budget([source], 4096) % image == 0
        assert propose_visual_budget([source], 4096, multiple_of=16) % 16 == 0


def test_the_budget_leaves_out_no_more_than_allowed():
    # One sample in twenty has ten times the others' visual tokens: a small budget would be filled best.
    tokens, visual = np.full(2000, 110), np.full(2000, 40)
    tokens[::20], visual[::20] = 510, 400
    source = Source(tokens, visual, tokens * 0)
    assert propose_visual_budget([source], 600) >= 400
    assert propose_visual_budget([source], 600, max_left_out=0.1) < 400


def test_the_budget_follows_the_weights():
    text, images = Source([50] * 500, [0] * 500, [0] * 500), Source([50] * 500, [40] * 500, [0] * 500)
    heavy = Source(text.tokens_I, text.visual_I, text.shard_I, weight=9)
    assert propose_visual_budget([heavy, images], 1000) < propose_visual_budget([text, images], 1000)
    none = Source(images.tokens_I, images.visual_I, images.shard_I, weight=0)
    assert propose_visual_budget([text, none], 1000) == 0


def test_the_bound_is_of_both_budgets_together_where_packs_are_far_from_each_ones():
    # Of two kinds that share no pack, neither with its own: each budget alone would let some do so.
    plan = PackPlan([Source([70, 40] * 20, [20, 70] * 20, [0] * 40)], 100, 100, seed=0)
    assert least_packs(plan.token_counts_I, plan.visual_counts_I, 100, 100) < 35
    fill = measure_fill(plan)
    assert fill.num_packs == fill.least_packs == 40


def test_no_budget_without_samples():
    with pytest.raises(ValueError, match="none of the 2 samples has between 1 and 40 tokens"):
        propose_visual_budget([Source([0, 41], [0, 0], [0, 0])], 40)


def test_the_benchmark_prints_a_row_for_each_data_set(monkeypatch):
    monkeypatch.setattr(joint_bound, "_GRAINS", 32)  # quick, and loose
    table = benchmark(DATA_SETS, 400, seq_length=4096, window=100, multiple_of=8)
    assert all(f"\n| {name} | " in table for name in DATA_SETS)
