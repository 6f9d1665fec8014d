"""The visual stream derived from packs: slots, images, masks, spans and angles of a micro-batch."""

import pytest
import torch

from laver_megatron.model.spans import language_spans, spans_to_mask
from laver_megatron.model.streams import (
    ROWS_MULTIPLE,
    StreamSettings,
    build_micro_batch,
    images_by_size,
    label_rows,
    span_areas,
    visual_slots,
)
from laver_megatron.objective.language import IGNORE_LABEL
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
        "kernel": "dense",
        "dtype": torch.float32,
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


def test_images_by_size():
    found = [(size, tokens_IN.tolist()) for size, tokens_IN in images_by_size((2, 1, 2, 3))]
    assert found == [(1, [[2]]), (2, [[0, 1], [3, 4]]), (3, [[5, 6, 7]])]
    assert images_by_size(()) == []


def test_rows_with_a_label():
    """Of [S, B] flattened, filled up with row 0 and no label."""
    labels_BS = torch.tensor([[IGNORE_LABEL, 7, IGNORE_LABEL], [5, IGNORE_LABEL, 6]])
    rows_R, labels_R = label_rows(labels_BS, everywhere=False)
    assert rows_R[:4].tolist() == [1, 2, 5, 0] and labels_R[:3].tolist() == [5, 7, 6]
    assert len(rows_R) == ROWS_MULTIPLE and (rows_R[3:] == 0).all() and (labels_R[3:] == IGNORE_LABEL).all()
    rows_R, labels_R = label_rows(labels_BS, everywhere=True)
    assert rows_R.tolist() == list(range(6)) and labels_R.tolist() == labels_BS.t().flatten().tolist()
    nothing = label_rows(torch.full((2, 3), IGNORE_LABEL), everywhere=False)
    assert [len(part) for part in nothing] == [0, 0]


@pytest.mark.parametrize("positions", ["1d", "2d", "mrope"])
def test_micro_batch(positions):
    packs, chosen = uneven(), settings(positions=positions)
    masked_BS = (torch.rand(3, 24, generator=torch.Generator().manual_seed(0)) < 0.5) & (packs.image_BS >= 0)
    batch = build_micro_batch(packs, masked_BS, chosen, CPU)
    image_slots = ((0, 0, 6), (0, 6, 11), (0, 11, 15), (1, 0, 4))
    assert batch.image_num_tokens == (6, 5, 4, 4)
    assert batch.visual_rows_T.tolist() == [3 * slot + b for b, start, end in image_slots for slot in range(start, end)]
    visual_BS = packs.image_BS >= 0
    assert torch.equal(batch.language_rows_T % 3, visual_BS.nonzero()[:, 0])
    assert torch.equal(batch.language_rows_T // 3, visual_BS.nonzero()[:, 1])
    assert torch.equal(batch.masked_T, masked_BS[visual_BS])
    assert torch.equal(batch.masked_M, masked_BS[visual_BS].nonzero()[:, 0])

    expected = torch.zeros(3, 40, 40, dtype=torch.bool)
    expected[:, :24, :24] = oracles.language_mask(packs, "mixed")
    expected[:, 24:, 24:] = torch.eye(16, dtype=torch.bool)
    for b, start, end in image_slots:
        expected[b, 24 + start : 24 + end, 24 + start : 24 + end] = True
    assert batch.student_spans_B2L.dtype == torch.int32
    assert torch.equal(spans_to_mask(batch.student_spans_B2L), expected)
    assert torch.equal(spans_to_mask(batch.teacher_spans_B2V), expected[:, 24:, 24:])

    assert batch.student_positions_3BL.shape == (3, 3, 40) and batch.teacher_positions_3BV.shape == (3, 3, 16)
    assert torch.equal(batch.student_positions_3BL[:, :, 24:], batch.teacher_positions_3BV)
    for b, indices in enumerate(oracles.language_positions(packs, positions)):
        for i, index in enumerate(indices):
            if index is not None:
                assert batch.student_positions_3BL[:, b, i].tolist() == list(index)
    for number, (b, start, end) in enumerate(image_slots):
        source = (packs.image_BS[b] == number % 3).nonzero()[:, 0]
        rows, cols = packs.row_BS[b][source].tolist(), packs.col_BS[b][source].tolist()
        position_3N = torch.tensor(oracles.image_positions(rows, cols, positions)).t()
        assert torch.equal(batch.teacher_positions_3BV[:, b, start:end], position_3N), (b, start, end)


def test_without_laver_there_is_the_language_stream_alone():
    packs = uneven()
    batch = build_micro_batch(packs, torch.zeros(3, 24, dtype=torch.bool), settings(laver=False), CPU)
    assert torch.equal(batch.student_spans_B2L, language_spans(packs.document_BS, packs.image_BS, "mixed"))
    assert batch.student_positions_3BL.shape[2] == 24
    assert batch.teacher_spans_B2V is None and batch.teacher_positions_3BV is None
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
    assert torch.equal(mixed.student_positions_3BL, causal.student_positions_3BL)
    assert torch.equal(mixed.student_spans_B2L, flat.student_spans_B2L)
    for part in (slice(0, 24), slice(24, 40)):
        assert not torch.equal(mixed.student_positions_3BL[:, :, part], flat.student_positions_3BL[:, :, part])


def test_span_areas_leave_padding_out():
    packs = uneven()
    real_BS = packs.document_BS >= 0
    language = int(oracles.language_mask(packs, "mixed")[real_BS].sum())
    assert span_areas(packs, settings()) == (language, 6 * 6 + 5 * 5 + 4 * 4 + 4 * 4)
    # The encoder attends within images with or without LaVer.
    assert span_areas(packs, settings(laver=False)) == span_areas(packs, settings())
    causal = int(oracles.language_mask(packs, "causal")[real_BS].sum())
    assert span_areas(packs, settings(attention="causal"))[0] == causal < language
