"""The visual stream derived from packs: slots, images, masks, spans and angles of a micro-batch."""

import pytest
import torch

from laver_megatron.model.positions import rotary_angles
from laver_megatron.model.spans import language_spans, spans_to_mask
from laver_megatron.model.streams import (
    StreamSettings,
    build_micro_batch,
    images_of,
    span_areas,
    visual_slots,
)
from tests import oracles
from tests.packs import LAYOUTS, pack, padding, stack

CPU = torch.device("cpu")


def settings(**changes):
    defaults = {
        "visual_seq_length": 16,
        "attention": "mixed",
        "positions": "2d",
        "head_dim": 16,
        "rope_theta": 1e6,
        "laver": True,
    }
    return StreamSettings(**{**defaults, **changes})


def uneven():
    """Three images, one, none: 15, 4 and 0 of 16 visual slots."""
    return stack(
        pack([2, (2, 3), (1, 5), 1], [(2, 2), 1], seq_length=24),
        pack([3], padding(2), [5, (4, 1), 2], seq_length=24),
        pack([9], seq_length=24),
    )


@pytest.mark.parametrize("layout", [*LAYOUTS, "uneven"])
def test_slots_hold_the_visual_tokens_in_order(layout):
    packs = uneven() if layout == "uneven" else LAYOUTS[layout]()
    num_slots = 32 if layout == "wide and tall images" else 16
    num_slots = min(num_slots, packs.image_BS.shape[1])
    slot_BS, source_BV, filled_BV = visual_slots(packs.image_BS, num_slots)
    assert source_BV.shape == filled_BV.shape == (packs.image_BS.shape[0], num_slots)
    for b, images in enumerate(packs.image_BS.tolist()):
        places = [i for i, image in enumerate(images) if image != -1]
        assert filled_BV[b].tolist() == [True] * len(places) + [False] * (num_slots - len(places))
        assert source_BV[b, : len(places)].tolist() == places
        assert slot_BS[b].tolist() == [places.index(i) if i in places else -1 for i in range(len(images))]
        assert (source_BV[b] < len(images)).all() and (source_BV[b] >= 0).all()


def test_too_many_visual_tokens():
    with pytest.raises(ValueError, match="a pack holds 15 visual tokens, more than --visual-seq-length 14"):
        build_micro_batch(uneven(), torch.zeros(3, 24, dtype=torch.bool), settings(visual_seq_length=14), CPU)


def test_images_of():
    image_BV = torch.tensor([[0, 0, 1, 2, 2, -1], [-1] * 6, [0] * 6])
    assert images_of(image_BV) == ((0, 0, 2), (0, 2, 3), (0, 3, 5), (2, 0, 6))
    assert images_of(torch.full((2, 4), -1)) == ()


@pytest.mark.parametrize("positions", ["1d", "2d", "mrope"])
def test_micro_batch(positions):
    packs, chosen = uneven(), settings(positions=positions)
    masked_BS = (torch.rand(3, 24, generator=torch.Generator().manual_seed(0)) < 0.5) & (packs.image_BS >= 0)
    batch = build_micro_batch(packs, masked_BS, chosen, CPU)
    assert batch.image_BV.tolist()[0] == [0] * 6 + [1] * 5 + [2] * 4 + [-1]
    assert batch.image_BV.tolist()[1] == [0] * 4 + [-1] * 12
    assert batch.image_BV.tolist()[2] == [-1] * 16
    assert batch.image_slots == ((0, 0, 6), (0, 6, 11), (0, 11, 15), (1, 0, 4))
    assert sum(batch.image_num_tokens) == 19
    for b in range(3):
        visual = packs.image_BS[b] >= 0
        count = int(visual.sum())
        assert batch.masked_BV[b, :count].tolist() == masked_BS[b][visual].tolist()
        assert not batch.masked_BV[b, count:].any()

    expected = torch.zeros(3, 40, 40, dtype=torch.bool)
    expected[:, :24, :24] = oracles.language_mask(packs, "mixed")
    expected[:, 24:, 24:] = torch.eye(16, dtype=torch.bool)
    for b, start, end in batch.image_slots:
        expected[b, 24 + start : 24 + end, 24 + start : 24 + end] = True
    assert batch.student_spans_B2L.dtype == torch.int32
    assert torch.equal(spans_to_mask(batch.student_spans_B2L), expected)
    assert torch.equal(spans_to_mask(batch.teacher_spans_B2V), expected[:, 24:, 24:])

    assert batch.student_angles_LB1D.shape == (40, 3, 1, 16) and batch.teacher_angles_VB1D.shape == (16, 3, 1, 16)
    assert torch.equal(batch.student_angles_LB1D[24:], batch.teacher_angles_VB1D)
    for b, indices in enumerate(oracles.language_positions(packs, positions)):
        for i, index in enumerate(indices):
            if index is not None:
                position_311 = torch.tensor(index).view(3, 1, 1)
                angles_D = rotary_angles(position_311, 16, 1e6, positions).flatten()
                assert torch.equal(batch.student_angles_LB1D[i, b, 0], angles_D)
    for b, start, end in batch.image_slots:
        here = batch.image_BV[b] == batch.image_BV[b, start]
        source = (packs.image_BS[b] == batch.image_BV[b, start]).nonzero()[:, 0]
        rows, cols = packs.row_BS[b][source].tolist(), packs.col_BS[b][source].tolist()
        position_31N = torch.tensor(oracles.image_positions(rows, cols, positions)).t().unsqueeze(1)
        angles = rotary_angles(position_31N, 16, 1e6, positions)
        assert torch.equal(batch.teacher_angles_VB1D[here, b], angles[:, 0]), (b, start, end)


def test_without_laver_there_is_the_language_stream_alone():
    packs = uneven()
    batch = build_micro_batch(packs, torch.zeros(3, 24, dtype=torch.bool), settings(laver=False), CPU)
    assert torch.equal(batch.student_spans_B2L, language_spans(packs.document_BS, packs.image_BS, "mixed"))
    assert batch.student_angles_LB1D.shape[0] == 24
    assert batch.teacher_spans_B2V is None and batch.teacher_angles_VB1D is None
    # Images still have to reach the language model.
    assert sum(batch.image_num_tokens) == 19


def test_attention_and_positions_switch_the_parts_they_name():
    """Causal attention leaves the reconstruction stream bidirectional; the positions switch moves both."""
    packs, nothing = uneven(), torch.zeros(3, 24, dtype=torch.bool)
    mixed, causal, flat = (
        build_micro_batch(packs, nothing, settings(**change), CPU)
        for change in ({}, {"attention": "causal"}, {"positions": "1d"})
    )
    assert not torch.equal(mixed.student_spans_B2L[:, :, :24], causal.student_spans_B2L[:, :, :24])
    assert torch.equal(mixed.student_spans_B2L[:, :, 24:], causal.student_spans_B2L[:, :, 24:])
    assert torch.equal(mixed.student_angles_LB1D, causal.student_angles_LB1D)
    assert torch.equal(mixed.student_spans_B2L, flat.student_spans_B2L)
    for part in (slice(0, 24), slice(24, 40)):
        assert not torch.equal(mixed.student_angles_LB1D[part], flat.student_angles_LB1D[part])


def test_span_areas_leave_padding_out():
    packs = uneven()
    real_BS = packs.document_BS >= 0
    language = int(oracles.language_mask(packs, "mixed")[real_BS].sum())
    assert span_areas(packs, settings()) == (language, 6 * 6 + 5 * 5 + 4 * 4 + 4 * 4)
    # The encoder attends within images with or without LaVer.
    assert span_areas(packs, settings(laver=False)) == span_areas(packs, settings())
    causal = int(oracles.language_mask(packs, "causal")[real_BS].sum())
    assert span_areas(packs, settings(attention="causal"))[0] == causal < language
