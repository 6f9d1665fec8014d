"""The size that a picture of native resolution gets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from laver_megatron.encoders.native import native_size

sides = st.integers(1, 4000)


@given(sides, sides, st.sampled_from([14, 16, 28]), st.integers(1, 3000), st.integers(0, 16))
def test_whole_tokens_within_the_limit(width, height, token, most, least):
    rows, columns = (
        side / token
        for side in native_size(width, height, token, min_pixels=least * token**2, max_pixels=most * token**2)
    )
    assert rows == int(rows) >= 1 and columns == int(columns) >= 1
    assert rows * columns <= most
    assert rows * columns >= least or least > most / 2  # of an elongated picture less fits into a tight limit


@given(sides, sides, st.integers(4, 3000), st.integers(0, 500))
def test_it_is_qwens_size_within_the_limit(width, height, most, more_pixels):
    if max(width, height) > 200 * min(width, height):
        return
    limits = {"min_pixels": 56 * 56, "max_pixels": most * 28 * 28 + more_pixels}
    own = smart_resize(height, width, 28, **limits)
    ours = native_size(width, height, 28, **limits)
    if own[0] * own[1] <= limits["max_pixels"]:
        assert ours == own
    else:
        assert ours[0] * ours[1] <= limits["max_pixels"] < own[0] * own[1]


@pytest.mark.parametrize(
    "width, height, most, expected",
    [
        (280, 140, 100, (140, 280)),  # nothing to do
        (10, 10, 100, (28, 28)),  # smaller than a token
        (500, 3, 100, (28, 504)),  # narrower than a token
        (2800, 1400, 50, (140, 280)),  # shrunk, its shape kept
        (2800, 14, 10, (28, 280)),  # cut down: 100 tokens for 10
        (14, 2800, 10, (280, 28)),
        (5000, 5000, 1, (28, 28)),
    ],
)
def test_examples(width, height, most, expected):
    assert native_size(width, height, 28, min_pixels=0, max_pixels=most * 28 * 28) == expected


@given(st.integers(300, 4000), st.integers(300, 4000))
def test_the_shape_is_kept(width, height):
    if max(width, height) > 4 * min(width, height):
        return
    resized = native_size(width, height, 14, min_pixels=0, max_pixels=1024 * 14 * 14)
    # 1024 tokens on at most 4 : 1 are 16 on the short side: half a token up or down is 1/16 on each side together.
    assert resized[1] / resized[0] == pytest.approx(width / height, rel=0.07)
