import numpy as np
import pytest

from laver_megatron.data.plan.sizes import SampleSizes
from laver_megatron.data.plan.visual_budget import propose_visual_budget
from tools.benchmarks.packing import draw_source


@pytest.mark.processes
def test_the_budget_is_a_number_of_images_where_all_are_of_one_size():
    for name, image in (("729", 729), ("captions 576", 576)):
        source = draw_source(name, 3000, seed=0)
        assert propose_visual_budget([source], 4096) % image == 0
        assert propose_visual_budget([source], 4096, multiple_of=16) % 16 == 0


def test_the_budget_leaves_out_no_more_than_allowed():
    # One sample in twenty has ten times the others' visual tokens: a small budget would be filled best.
    tokens, visual = np.full(2000, 110), np.full(2000, 40)
    tokens[::20], visual[::20] = 510, 400
    source = SampleSizes(tokens, visual, tokens * 0)
    assert propose_visual_budget([source], 600) >= 400
    assert propose_visual_budget([source], 600, max_left_out=0.1) < 400


def test_the_budget_follows_the_weights():
    text, images = SampleSizes([50] * 500, [0] * 500, [0] * 500), SampleSizes([50] * 500, [40] * 500, [0] * 500)
    heavy = SampleSizes(text.tokens_I, text.visual_I, text.shard_I, weight=9)
    assert propose_visual_budget([heavy, images], 1000) < propose_visual_budget([text, images], 1000)
    none = SampleSizes(images.tokens_I, images.visual_I, images.shard_I, weight=0)
    assert propose_visual_budget([text, none], 1000) == 0


def test_no_budget_without_samples():
    with pytest.raises(ValueError, match="none of the 2 samples has between 1 and 40 tokens"):
        propose_visual_budget([SampleSizes([0, 41], [0, 0], [0, 0])], 40)
