"""The encoder's work over ranks, in FLOPs: within 15% of the mean wherever images can be divided so at all."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from laver_megatron.encoders import EncoderShape
from laver_megatron.flops.encoder import EncoderWork, encoder_flops, image_cost
from tools.benchmarks.image_division import (
    ENCODERS,
    MOST,
    benchmark,
    image_work,
    random_batches,
    unevenness,
    work_per_rank,
)

grids = st.tuples(st.integers(1, 64), st.integers(1, 64)).filter(lambda grid: grid[0] * grid[1] <= 2048)


def best_unevenness(work: list[int]) -> float:
    """Of all divisions over two ranks."""
    sums = np.zeros(1)
    for of_image in work[1:]:  # the first image's rank is one of the two
        sums = np.concatenate([sums, sums + of_image])
    return float(np.abs(2 * sums - sum(work)).min() / sum(work))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(ENCODERS)), st.lists(grids, min_size=16, max_size=18))
def test_two_ranks_are_within_15_percent(name, batch):
    """Whenever 16 images or more, none of more than a quarter of all patches, can be divided so. (Five large ones and
    specks cannot: one rank has three of the five.)"""
    sizes = [rows * columns for rows, columns in batch]
    assume(4 * max(sizes) <= sum(sizes))
    shape = ENCODERS[name]
    found = unevenness(work_per_rank(batch, shape, 2))
    assert found <= MOST or best_unevenness([image_work(grid, shape) for grid in batch]) > MOST


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("most_tokens", [2048, 8192])
def test_random_batches(name, most_tokens):
    batches = list(random_batches(100, most_tokens, seed=1))
    assert all(len(batch) >= 16 for batch in batches)
    assert max(unevenness(work_per_rank(batch, ENCODERS[name], 2)) for batch in batches) <= MOST


def test_images_that_the_largest_first_divides_badly():
    """3 + 3 against 2 + 2 + 2, and specks: largest first gives one rank 7 of 12."""
    shape = EncoderShape(
        model_type="", feature_size=8, num_layers=1, hidden_size=8, intermediate_size=80_000, patch_size=1,
        image_size=None, default_feature_layer=-1,
    )  # fmt: skip
    batch = [(1, 300)] * 2 + [(1, 200)] * 3 + [(1, 1)] * 12
    assert unevenness(work_per_rank(batch, shape, 2)) < 0.02


@pytest.mark.parametrize("name", ENCODERS)
def test_the_cost_that_divides_is_nearly_flops(name):
    """Exactly, where windows are whole: 16 x 24 tokens hold windows of 4 x 4."""
    shape = ENCODERS[name]
    embedding, behind = encoder_flops(shape).forward(EncoderWork.of_grids([(16, 24)], shape))
    assert image_cost(shape)(16 * 24) == embedding + behind


def test_the_table():
    lines = benchmark([2], 3, [512], seed=0).splitlines()
    assert len(lines) == 2 + len(ENCODERS) and all(line.count("|") == 9 for line in lines)
