"""Rows of a Megatron tensor and of its Hugging Face tensors: any range, in both directions, against whole joins."""

import dataclasses
import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from laver_megatron.hf.rows import (
    join_blocks,
    row_blocks,
    row_runs,
    runs_of_megatron_rows,
    runs_of_part_rows,
    split,
)
from laver_megatron.hf.weights import ModelParts, weight_table
from tests.conversions import SHAPE, VISION_HEAD, numbered

GROUPS = [1, 2, 3, 6]


@functools.cache
def table(groups: int, kv_channels: int = 4):
    shape = dataclasses.replace(SHAPE, num_query_groups=groups, kv_channels=kv_channels, num_layers=1)
    encoder = {"embeddings.patch_embedding.weight": (6, 3, 2, 2), "post_layernorm.bias": (6,)}
    return weight_table(
        ModelParts(shape, encoder=encoder, feature_size=6, vision_head=VISION_HEAD, teacher=True, centre=True)
    )


@pytest.mark.parametrize("kv_channels", [1, 4, 16])
@pytest.mark.parametrize("groups", GROUPS)
def test_split_undoes_join(groups, kv_channels):
    for weight in table(groups, kv_channels).values():
        parts = numbered(weight.sizes)
        back = split(weight, weight.join(parts))
        assert len(back) == len(parts)
        assert all(torch.equal(part, again) for part, again in zip(parts, back, strict=True)), weight.megatron


@pytest.mark.parametrize("groups", GROUPS)
def test_runs_are_all_rows_once_and_as_long_as_they_can_be(groups):
    for weight in table(groups).values():
        runs = row_runs(weight)
        assert [run.row for run in runs] == [sum(r.num_rows for r in runs[:i]) for i in range(len(runs))]
        assert sum(run.num_rows for run in runs) == weight.size[0]
        for run, following in zip(runs, runs[1:], strict=False):
            goes_on = following.part == run.part and following.part_row == run.part_row + run.num_rows
            assert not goes_on, f"{weight.megatron}: two runs at {following.row} are one"


def test_the_example_of_the_documentation():
    """4 query heads of 64 rows and 2 groups: six runs."""
    shape = dataclasses.replace(SHAPE, num_attention_heads=4, num_query_groups=2, kv_channels=64, num_layers=1)
    weight = weight_table(ModelParts(shape))["decoder.layers.0.self_attention.linear_qkv.weight"]
    found = [(run.row, "qkv"[run.part], run.part_row, run.num_rows) for run in row_runs(weight)]
    assert found == [
        (0, "q", 0, 128), (128, "k", 0, 64), (192, "v", 0, 64),
        (256, "q", 128, 128), (384, "k", 64, 64), (448, "v", 64, 64),
    ]  # fmt: skip


@st.composite
def weight_and_range(draw, whose: str):
    """A weight, one of its parts, and a range of rows of the part or of the whole; empty ones included."""
    weights = list(table(draw(st.sampled_from(GROUPS))).values())
    weight = weights[draw(st.integers(0, len(weights) - 1))]
    part = draw(st.integers(0, len(weight.sizes) - 1))
    num_rows = weight.size[0] if whose == "megatron" else weight.sizes[part][0]
    ends = draw(st.tuples(st.integers(0, num_rows), st.integers(0, num_rows)))
    return weight, part, min(ends), max(ends)


def gathered(blocks, like):
    return join_blocks(blocks) if blocks else like[:0]


@given(weight_and_range("megatron"))
def test_any_rows_of_megatrons_tensor(drawn):
    weight, _, start, stop = drawn
    parts = numbered(weight.sizes)
    whole = weight.join(parts)
    runs = runs_of_megatron_rows(weight, start, stop)
    assert [run.row for run in runs] == sorted(run.row for run in runs)
    found = gathered([parts[run.part][run.part_row : run.part_row + run.num_rows] for run in runs], whole)
    assert torch.equal(found, whole[start:stop])
    for run in runs:  # each says where it lies, for those who write into place
        assert start <= run.row and run.row + run.num_rows <= stop


@given(weight_and_range("part"))
def test_any_rows_of_a_hugging_face_tensor(drawn):
    weight, part, start, stop = drawn
    parts = numbered(weight.sizes)
    whole = weight.join(parts)
    runs = runs_of_part_rows(weight, part, start, stop)
    assert {run.part for run in runs} <= {part}
    found = gathered([whole[run.row : run.row + run.num_rows] for run in runs], parts[part])
    assert torch.equal(found, parts[part][start:stop])


@given(weight_and_range("megatron"), st.data())
def test_columns_go_with_their_rows(drawn, data):
    """Tensor parallelism over columns: a block of both is cut out of the parts as out of the whole."""
    weight, _, start, stop = drawn
    parts = [part.flatten(1) if part.dim() > 1 else part[:, None] for part in numbered(weight.sizes)]
    num_columns = parts[0].shape[1]
    first, last = sorted(data.draw(st.tuples(st.integers(0, num_columns), st.integers(0, num_columns))))
    whole = weight.join(parts)
    runs = runs_of_megatron_rows(weight, start, stop)
    blocks = [parts[run.part][run.part_row : run.part_row + run.num_rows, first:last] for run in runs]
    assert torch.equal(gathered(blocks, whole[:, first:last]), whole[start:stop, first:last])


@given(st.integers(0, 300), st.integers(0, 50), st.integers(0, 2000))
def test_row_blocks(num_rows, num_columns, block_bytes):
    """Every row once, in order, and never more than the bytes unless a single row is more."""
    blocks = list(row_blocks((num_rows, num_columns), torch.bfloat16, block_bytes))
    assert [row for start, stop in blocks for row in range(start, stop)] == list(range(num_rows))
    for start, stop in blocks:
        assert stop > start
        assert (stop - start) * num_columns * 2 <= block_bytes or stop - start == 1


def test_one_block_is_not_copied():
    block = torch.arange(6.0)
    assert join_blocks([block]) is block
    assert torch.equal(join_blocks([block[:2], block[2:]]), block)
