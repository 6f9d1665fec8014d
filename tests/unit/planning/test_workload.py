"""Mask areas of planned packs against the spans of real ones."""

from dataclasses import replace

import pytest

from laver_megatron.demo.encoders import save_encoder
from laver_megatron.encoders import read_encoder
from laver_megatron.flops.encoder import EncoderWork
from laver_megatron.flops.step import model_flops
from laver_megatron.model.spans import language_spans, reconstruction_spans, span_area
from laver_megatron.planning.throughput import micro_batch_flops
from laver_megatron.planning.workload import Workload, workload_of
from tests.packs import pack
from tests.small_run import SHAPE, settings


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


def test_no_share_is_offered_that_cannot_be():
    """An image larger than the pack."""
    with pytest.raises(ValueError, match="use longer packs, or smaller images"):
        workload_of(
            seq_length=240, visual_share=0.5, image_tokens=240, num_documents=1, attention="mixed", encoder=None
        )


def test_windows_of_the_encoder_are_counted(tmp_path):
    """As by the grids of real images where these are square, and in proportion where they are not."""
    save_encoder(tmp_path, "qwen2_5_vl")
    encoder = read_encoder(tmp_path)
    planned = Workload(512, 3, 81, 3, "mixed", encoder)
    real = EncoderWork.of_grids([(9, 9)] * 3, encoder)
    assert planned.image_window_area == real.window_area > 0
    assert replace(planned, image_tokens=90).image_window_area == planned.image_window_area * 90 // 81
    assert replace(planned, encoder=None).image_window_area == 0
    model = model_flops(SHAPE, encoder=encoder)
    step = micro_batch_flops(settings(2, micro_batch_size=2), model, planned)
    assert step.encoder == 2 * sum(model.encoder.forward(real))
