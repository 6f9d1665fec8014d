"""Which rank encodes which images."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from laver_megatron.data.batch.broadcast import image_num_tokens
from laver_megatron.data.batch.division import divide_images
from tests.packs import pack, padding


@given(st.lists(st.integers(1, 2000), max_size=40), st.integers(1, 8))
def test_every_image_has_one_rank(num_tokens, num_ranks):
    division = divide_images(num_tokens, num_ranks)
    assert len(division) == num_ranks
    assert sorted(image for images in division for image in images) == list(range(len(num_tokens)))
    assert all(list(images) == sorted(images) for images in division)


@given(st.lists(st.integers(1, 1000), min_size=16, max_size=64), st.integers(1, 4))
def test_the_work_is_balanced(num_tokens, num_ranks):
    """No rank has more than its even share and one image."""
    loads = [sum(num_tokens[image] for image in images) for images in divide_images(num_tokens, num_ranks)]
    assert max(loads) - min(loads) <= max(num_tokens)


def test_images_of_one_size_are_dealt_out():
    assert divide_images([9] * 5, 2) == ((0, 2, 4), (1, 3))
    assert divide_images([9], 4) == ((0,), (), (), ())
    assert divide_images([], 2) == ((), ())


def test_tokens_of_every_image():
    first, second = pack([3, (2, 3), 2], padding(4), [(1, 2), (1, 4)]), pack([21])
    both = torch.cat([first.image_BS, second.image_BS])
    assert image_num_tokens(type(first)(**{**vars(first), "image_BS": both})) == [6, 2, 4]
    assert image_num_tokens(second) == []


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_the_example_of_the_docstring(num_ranks):
    assert divide_images([64, 16, 16, 32], 2) == ((0,), (1, 2, 3))
    assert len(divide_images([64, 16, 16, 32], num_ranks)) == num_ranks
