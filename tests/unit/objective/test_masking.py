"""Masks: their statistics, exact counts, and that nothing but (seed, step, sample, image) decides them."""

import math
from fractions import Fraction

import pytest
import torch

from laver_megatron.objective.masking import mask_visual_tokens, num_masked_tokens

# Hidden tokens of sample 12, image 0, 30 tokens, ratio 0.3, seed 1, step 0.
BERNOULLI_REFERENCE = [4, 5, 6, 11, 16, 17, 18, 22, 24, 25]
FIXED_REFERENCE = [5, 9, 13, 16, 19, 25, 26, 27, 28]


def pack(*images, length=None, gap=2):
    """A pack [1, S] of images (sample_id, image_number, num_tokens), after `gap` text tokens each."""
    image_S, sample_S, number_S = [], [], []
    for index, (sample_id, number, num_tokens) in enumerate(images):
        image_S += [-1] * gap + [index] * num_tokens
        sample_S += [sample_id] * (gap + num_tokens)
        number_S += [-1] * gap + [number] * num_tokens
    padding = [-1] * ((length or len(image_S)) - len(image_S))
    return tuple(torch.tensor([row + padding]) for row in (image_S, sample_S, number_S))


def draw(batch, mask_ratio=0.3, sampling="bernoulli", seed=1, step=0):
    return mask_visual_tokens(*batch, mask_ratio=mask_ratio, sampling=sampling, seed=seed, step=step)


def mask_of(batch, index, **settings):
    """The mask of the image `index` of a batch of one pack, its tokens in order."""
    return draw(batch, **settings)[batch[0] == index].tolist()


@pytest.mark.parametrize("mask_ratio", [0.05, 0.3, 0.75])
def test_bernoulli_hides_the_asked_share(mask_ratio):
    num_images, num_tokens = 200, 100
    batch = pack(*[(sample, 0, num_tokens) for sample in range(num_images)])
    masked = draw(batch, mask_ratio)[batch[0] >= 0].view(num_images, num_tokens).double()
    total = num_images * num_tokens
    # Five standard deviations of a binomial share: false alarm 6e-7, and the seed is fixed.
    assert abs(masked.mean() - mask_ratio) < 5 * math.sqrt(mask_ratio * (1 - mask_ratio) / total)
    # Tokens are independent: the counts per image have the binomial variance N r (1 - r). The relative error
    # of a variance from n = 200 draws is sqrt(2 / n) = 0.1 (kurtosis excess < 0.2): five of them.
    assert masked.sum(1).var() / (num_tokens * mask_ratio * (1 - mask_ratio)) == pytest.approx(1, abs=0.5)


def test_fixed_hides_every_position_equally_often():
    num_images, num_tokens = 2000, 20
    batch = pack(*[(sample, 0, num_tokens) for sample in range(num_images)], gap=0)
    share_N = draw(batch, 0.25, "fixed")[0].view(num_images, num_tokens).double().mean(0)
    # Five standard deviations of the share of one position over 2000 images.
    assert (share_N - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / num_images)


@pytest.mark.parametrize("num_tokens", [1, 7, 10, 19, 20, 100, 196, 729, 1000])
@pytest.mark.parametrize("mask_ratio", [0.0, 0.05, 0.1, 0.29, 0.3, 0.57, 0.6, 0.7, 1.0])
def test_fixed_hides_exactly_the_decimal_floor(num_tokens, mask_ratio):
    expected = math.floor(Fraction(str(mask_ratio)) * num_tokens)
    assert num_masked_tokens(num_tokens, mask_ratio) == expected
    assert draw(pack((5, 0, num_tokens)), mask_ratio, "fixed").sum() == expected


def test_plain_floor_would_lose_a_token():
    assert math.floor(0.29 * 100) == 28
    assert num_masked_tokens(100, 0.29) == 29


@pytest.mark.parametrize("sampling", ["bernoulli", "fixed"])
def test_ends_of_the_ratio(sampling):
    batch = pack((3, 0, 50), length=60)
    assert not draw(batch, 0.0, sampling).any()
    assert torch.equal(draw(batch, 1.0, sampling), batch[0] >= 0)


@pytest.mark.parametrize("sampling", ["bernoulli", "fixed"])
def test_a_mask_does_not_depend_on_the_company(sampling):
    settings = {"sampling": sampling, "seed": 9, "step": 4}
    alone = mask_of(pack((7, 1, 40)), 0, **settings)
    assert True in alone and False in alone
    assert mask_of(pack((2, 0, 11), (7, 0, 30), (7, 1, 40), (8, 0, 5), length=120), 2, **settings) == alone
    torch.manual_seed(77)
    other, this = pack((2, 0, 11), length=64), pack((7, 1, 40), gap=9, length=64)
    batch = tuple(torch.cat(rows) for rows in zip(other, this, strict=True))
    assert draw(batch, **settings)[1][batch[0][1] >= 0].tolist() == alone


def test_a_mask_depends_on_seed_step_sample_and_image():
    base = {"seed": 1, "step": 2}
    reference = mask_of(pack((3, 4, 64)), 0, **base)
    assert mask_of(pack((3, 4, 64)), 0, **base) == reference
    # Two independent masks of 64 tokens at 0.5 agree with probability 5e-20.
    others = [
        mask_of(pack((3, 4, 64)), 0, **base | {"seed": 2}),
        mask_of(pack((3, 4, 64)), 0, **base | {"step": 3}),
        mask_of(pack((4, 4, 64)), 0, **base),
        mask_of(pack((3, 5, 64)), 0, **base),
        mask_of(pack((4, 3, 64)), 0, **base),
        mask_of(pack((3, 4, 64)), 0, seed=2, step=1),
    ]
    assert reference not in others
    assert len({tuple(mask) for mask in others}) == len(others)


def test_a_mask_is_the_same_in_every_version():
    """Guards resumed runs: a change of the key or of the draw would change the masks of a run half done."""
    assert [i for i, hidden in enumerate(mask_of(pack((12, 0, 30)), 0)) if hidden] == BERNOULLI_REFERENCE
    hidden = mask_of(pack((12, 0, 30)), 0, sampling="fixed")
    assert [i for i, hidden in enumerate(hidden) if hidden] == FIXED_REFERENCE


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    draw(pack((3, 0, 50)))
    draw(pack((3, 0, 50)), sampling="fixed")
    assert torch.equal(torch.get_rng_state(), before)


def test_no_image_and_no_token():
    no_image = tuple(torch.full((2, 8), -1) for _ in range(3))
    assert draw(no_image).shape == (2, 8) and not draw(no_image).any()
    assert draw(tuple(torch.empty(1, 0, dtype=torch.int64) for _ in range(3))).shape == (1, 0)


def test_refusals():
    with pytest.raises(ValueError, match="bernoulli"):
        draw(pack((3, 0, 5)), sampling="exact")
    with pytest.raises(ValueError, match="between 0"):
        draw(pack((3, 0, 5)), mask_ratio=1.5)
    with pytest.raises(ValueError, match="between 0"):
        num_masked_tokens(10, -0.1)
