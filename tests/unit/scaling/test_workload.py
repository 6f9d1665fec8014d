"""Mask areas of planned packs against the spans of real ones."""

import pytest

from laver_megatron.model.spans import language_spans, reconstruction_spans, span_area
from laver_megatron.scaling.workload import workload_of
from tests.packs import pack


@pytest.mark.parametrize("attention", ["mixed", "causal"])
@pytest.mark.parametrize(
    "share, num_documents", [(0.0, 1), (0.0, 3), (0.2, 1), (0.5, 2), (0.6, 1), (0.75, 4), (0.9, 1)]
)
def test_areas_are_sums_of_span_lengths(attention, share, num_documents):
    work = workload_of(
        seq_length=240,
        visual_share=share,
        image_tokens=16,
        num_documents=num_documents,
        attention=attention,
        encoder=None,
    )
    assert work.num_visual_tokens == int(share * 240 / 16) * 16 <= share * 240
    documents, left = [], work.num_images
    for number in range(num_documents):
        images = work.num_images // num_documents + (number < work.num_images % num_documents)
        documents.append([(4, 4)] * images + [240 // num_documents - 16 * images])
        left -= images
    assert left == 0
    packs = pack(*documents, seq_length=240)
    language = language_spans(packs.document_BS, packs.image_BS, attention)
    assert work.lm_area == span_area(language, packs.document_BS >= 0)
    assert work.image_area == span_area(reconstruction_spans(packs.image_BS), packs.image_BS >= 0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"visual_share": 1.0}, "visual share is 1.0"),
        (
            {"visual_share": 0.05},
            "0.05 of 240 tokens is less than one image of 16; use a visual share of at least 0.067",
        ),
        ({"num_documents": 241}, "241 documents do not fit"),
        ({"visual_share": 0.9, "num_documents": 12}, "13 images of 16 tokens do not fit 12 documents of 20 tokens"),
    ],
)
def test_what_cannot_be(changes, message):
    given = {"seq_length": 240, "visual_share": 0.5, "image_tokens": 16, "num_documents": 1, **changes}
    with pytest.raises(ValueError, match=message):
        workload_of(**given, attention="mixed", encoder=None)
