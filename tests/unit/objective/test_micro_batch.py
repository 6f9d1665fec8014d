"""The terms of a micro-batch whose logits are written down."""

import pytest
import torch

from laver_megatron.data.batch.batches import GlobalCounts
from laver_megatron.model.laver import StageOutput
from laver_megatron.model.streams import StreamSettings, build_micro_batch
from laver_megatron.objective.micro_batch import TERMS, micro_batch_losses
from laver_megatron.objective.similarity import mean_pairwise_cosine
from tests.packs import pack
from tests.small_run import SHAPE, settings


def test_an_image_of_one_token_adds_nothing_to_the_similarities():
    """It has no pair of tokens. The other image's cosine is halved: the mean is over both images."""
    config = settings(1)
    packs = pack([2, (1, 1), 1, (2, 2), 1], seq_length=config.data.visual_seq_length)
    batch = build_micro_batch(packs, packs.image_BS >= 0, StreamSettings.of(config, SHAPE), torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    student_TK, teacher_TK = torch.randn(2, 5, 8, generator=generator)
    counts = GlobalCounts(1, 5, 2, 5, 9, 1, 0, 1, 1, 1)
    output = StageOutput(torch.randn(len(batch.labels_R), 16, generator=generator), student_TK, teacher_TK)
    _, terms = micro_batch_losses(output, batch, counts, config.objective, None, None)
    found = dict(zip(TERMS, terms.tolist(), strict=True))
    for name, logits_TK in (("student", student_TK), ("teacher", teacher_TK)):
        expected = mean_pairwise_cosine(logits_TK[1:]).item() / 2
        assert found[f"{name}_visual_similarity"] == pytest.approx(expected, abs=1e-6)
