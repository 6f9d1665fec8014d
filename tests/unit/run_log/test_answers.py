"""Which answers of a micro-batch are right, and to whom they belong."""

from dataclasses import replace

import torch

from laver_megatron.model.streams import label_rows
from laver_megatron.objective.language import IGNORE_LABEL
from laver_megatron.objective.sharded import sharded_is_likeliest
from laver_megatron.run_log.answers import answers_of
from tests.packs import pack, padding, stack


def _packs():
    """Two packs: documents of two answers, of one and of none; of one answer."""
    packs = stack(pack([9], [5], [3], padding(1)), pack([6], seq_length=18, seed=1))
    packs.labels_BS.fill_(IGNORE_LABEL)
    for row, places in ((0, (1, 2, 3, 5, 6, 11)), (1, (2, 3))):
        packs.labels_BS[row, list(places)] = packs.tokens_BS[row, [place + 1 for place in places]]
    return replace(packs, families=[["count", "read", ""], [""]])


def _found(*wrong):
    """Answers where the labels at these (pack, position) are not the likeliest words."""
    packs = _packs()
    labels_BS = packs.labels_BS
    is_right_BS = torch.ones_like(labels_BS, dtype=torch.bool)
    for row, place in wrong:
        assert labels_BS[row, place] != IGNORE_LABEL
        is_right_BS[row, place] = False
    rows_R, labels_R = label_rows(labels_BS, False)
    is_right_R = is_right_BS.t().flatten()[rows_R][labels_R != IGNORE_LABEL]
    return answers_of(packs, is_right_R)


def test_every_turn_is_an_answer_of_its_samples_family():
    assert _found() == [("count", True), ("count", True), ("read", True), ("", True)]


def test_one_wrong_token_makes_an_answer_wrong():
    assert _found((0, 2)) == [("count", False), ("count", True), ("read", True), ("", True)]
    assert _found((0, 6), (1, 3)) == [("count", True), ("count", False), ("read", True), ("", False)]
    assert _found((0, 11), (0, 1), (0, 3)) == [("count", False), ("count", True), ("read", False), ("", True)]


def test_packs_without_families_have_answers_all_the_same():
    packs = replace(_packs(), families=[])
    assert answers_of(packs, torch.ones(8, dtype=torch.bool)) == [("", True)] * 4


def test_the_likeliest_word_is_the_first_of_the_largest():
    logits_TW = torch.tensor([[1.0, 3.0, 2.0], [4.0, 0.0, 4.0], [4.0, 0.0, 4.0], [0.0, 1.0, 2.0]])
    labels_T = torch.tensor([1, 0, 2, IGNORE_LABEL])
    assert sharded_is_likeliest(logits_TW, labels_T, None).tolist() == [True, True, False, False]
