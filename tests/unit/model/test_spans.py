"""Spans against the definition of the mask, written as nested loops over pairs of tokens."""

import pytest
import torch

from laver_megatron.model.spans import (
    concatenate_spans,
    language_spans,
    reconstruction_spans,
    run_starts_and_ends,
    span_area,
    spans_to_mask,
)
from tests import oracles
from tests.packs import LAYOUTS, pack, stack


@pytest.mark.parametrize("attention", ["mixed", "causal"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_language_mask(layout, attention):
    packs = LAYOUTS[layout]()
    spans = language_spans(packs.document_BS, packs.image_BS, attention)
    assert spans.dtype == torch.int32 and spans.shape == (1, 2, packs.document_BS.shape[1])
    expected = oracles.language_mask(packs, attention)
    assert torch.equal(spans_to_mask(spans), expected)
    assert span_area(spans, torch.ones_like(spans[:, 0], dtype=torch.bool)) == int(expected.sum())


def test_packs_of_a_micro_batch_do_not_mix():
    names = ["padding at the end", "hole at the start", "text only", "image last"]
    packs = stack(*[LAYOUTS[name]() for name in names])
    mask = spans_to_mask(language_spans(packs.document_BS, packs.image_BS, "mixed"))
    assert torch.equal(mask, oracles.language_mask(packs, "mixed"))


def test_mixed_and_causal_differ_at_visual_tokens_only():
    packs = LAYOUTS["two images in a document"]()
    mixed, causal = (
        spans_to_mask(language_spans(packs.document_BS, packs.image_BS, attention)) for attention in ("mixed", "causal")
    )
    changed_BS = (mixed != causal).any(2)
    # The last token of an image sees the same in both: its image ends with it.
    last_BS = (packs.image_BS >= 0) & (packs.image_BS != packs.image_BS.roll(-1, 1))
    assert torch.equal(changed_BS, (packs.image_BS >= 0) & ~last_BS)


def test_unknown_attention_is_refused():
    packs = LAYOUTS["text only"]()
    with pytest.raises(ValueError, match="'mixed' or 'causal', got 'full'"):
        language_spans(packs.document_BS, packs.image_BS, "full")


@pytest.mark.parametrize(
    "image_V",
    [[0, 0, 0, 1, 1, -1, -1], [0], [-1, -1], [0, 1, 2, 3], [0, 0, 0, 0]],
    ids=["uneven and padded", "one token", "no image", "images of one token", "full"],
)
def test_reconstruction_mask(image_V):
    length = len(image_V)
    expected = torch.zeros(1, length, length, dtype=torch.bool)
    for query in range(length):
        for key in range(length):
            same_image = image_V[query] != -1 and image_V[query] == image_V[key]
            expected[0, query, key] = same_image or query == key
    assert torch.equal(spans_to_mask(reconstruction_spans(torch.tensor([image_V]))), expected)


def test_concatenated_sequences_stay_apart():
    packs = LAYOUTS["hole of padding"]()
    language = language_spans(packs.document_BS, packs.image_BS, "mixed")
    visual = reconstruction_spans(torch.tensor([[0, 0, 0, 0, 1, 1, -1, -1]]))
    both = concatenate_spans(language, visual, visual)
    assert both.dtype == torch.int32
    blocks = [spans_to_mask(spans)[0] for spans in (language, visual, visual)]
    assert torch.equal(spans_to_mask(both)[0], torch.block_diag(*[b.int() for b in blocks]).bool())


def test_runs_of_equal_labels():
    starts, ends = run_starts_and_ends(torch.tensor([[7, 7, 3, 7], [1, 1, 1, 1]]))
    assert starts.tolist() == [[0, 0, 2, 3], [0, 0, 0, 0]]
    assert ends.tolist() == [[2, 2, 3, 4], [4, 4, 4, 4]]


def test_random_packs():
    """Random layouts, so that no shape of a pack is right only by the choice of examples."""
    generator = torch.Generator().manual_seed(0)

    def draw(high):
        return int(torch.randint(1, high, (), generator=generator))

    for seed in range(20):
        documents = [[draw(4) if draw(3) == 1 else (draw(4), draw(4)) for _ in range(draw(5))] for _ in range(draw(4))]
        packs = pack(*documents, seed=seed)
        mask = spans_to_mask(language_spans(packs.document_BS, packs.image_BS, "mixed"))
        assert torch.equal(mask, oracles.language_mask(packs, "mixed")), documents
