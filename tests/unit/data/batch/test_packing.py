import pytest
import torch

from laver_megatron.data.batch.packing import PackedSample, build_packs, check_features
from laver_megatron.objective.language import IGNORE_LABEL
from tests.content import messages_of

PADDING = 7


def sample(encoder, text, grids=(), key="k"):
    return encoder.encode(messages_of([f"user: {text}", "assistant: Yes."]), grids, key)


@pytest.fixture
def encoded(encoder):
    return [
        sample(encoder, "<image> and <image>", [(1, 2), (2, 2)], "two"),
        sample(encoder, "no picture", key="none"),
        sample(encoder, "<image>", [(2, 1)], "one"),
    ]


def packed(encoded, sample_id, pixels=True):
    images = tuple(torch.full((3, 2, 2), float(i)) for i in range(len(encoded.grids))) if pixels else ()
    return PackedSample(sample_id, len(encoded), encoded, images)


def test_documents_and_images_of_a_pack(encoded):
    two, none, one = encoded
    length = sum(map(len, encoded)) + 5
    pack = [packed(two, 40), packed(none, 3), packed(one, 12)]
    batch = build_packs([pack, [packed(one, 9)]], seq_length=length, padding_token=PADDING)
    lengths = torch.tensor([len(two), len(none), len(one), 5])

    def blocks(*values):
        return torch.tensor(values).repeat_interleave(lengths)

    assert torch.equal(batch.document_BS[0], blocks(0, 1, 2, -1))
    assert torch.equal(batch.sample_id_BS[0], blocks(40, 3, 12, -1))
    padding = torch.full((5,), PADDING)
    assert torch.equal(batch.tokens_BS[0], torch.cat([two.tokens_T, none.tokens_T, one.tokens_T, padding]))
    assert torch.equal(batch.labels_BS[0, :-5], torch.cat([two.labels_T, none.labels_T, one.labels_T]))
    visual_S = batch.image_BS[0] >= 0
    assert batch.image_BS[0][visual_S].tolist() == [0, 0, 1, 1, 1, 1, 2, 2]
    assert batch.image_number_BS[0][visual_S].tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    assert batch.row_BS[0][visual_S].tolist() == [0, 0, 0, 0, 1, 1, 0, 1]
    assert batch.col_BS[0][visual_S].tolist() == [0, 1, 0, 1, 0, 1, 0, 0]
    assert batch.keys == [["two", "none", "one"], ["one"]]
    assert [[float(image[0, 0, 0]) for image in images] for images in batch.pixels] == [[0, 1, 0], [0]]
    assert batch.document_BS[1].max() == 0 and batch.image_BS[1].max() == 0


def test_no_label_crosses_a_document(encoded):
    pack = [packed(sample, i) for i, sample in enumerate(encoded)]
    batch = build_packs([pack], seq_length=200, padding_token=PADDING)
    last_S = batch.document_BS[0, :-1] != batch.document_BS[0, 1:]
    assert last_S.sum() == 3
    assert (batch.labels_BS[0, :-1][last_S] == IGNORE_LABEL).all()


def test_a_bad_sample_leaves_padding_and_moves_nothing(encoded):
    two, none, one = encoded
    whole = [packed(two, 0), packed(none, 1), packed(one, 2)]
    bad = [PackedSample(0, len(two), None), packed(none, 1), packed(one, 2)]
    whole_batch, batch = (build_packs([pack], seq_length=200, padding_token=PADDING) for pack in (whole, bad))
    hole, rest = slice(0, len(two)), slice(len(two), 200)
    assert (batch.tokens_BS[0, hole] == PADDING).all()
    for name, value in {"labels": IGNORE_LABEL, "document": -1, "image": -1, "row": 0, "col": 0}.items():
        assert (getattr(batch, f"{name}_BS")[0, hole] == value).all(), name
    assert (batch.sample_id_BS[0, hole] == 0).all(), "which sample was planned there"
    assert (batch.image_number_BS[0, hole] == -1).all()
    for name in ("tokens", "labels", "row", "col", "sample_id", "image_number"):
        field = f"{name}_BS"
        assert torch.equal(getattr(batch, field)[0, rest], getattr(whole_batch, field)[0, rest]), name
    # Documents and images count from 0 without gaps.
    assert sorted(set(batch.document_BS[0].tolist())) == [-1, 0, 1]
    assert sorted(set(batch.image_BS[0].tolist())) == [-1, 0]
    assert batch.keys == [["none", "one"]] and len(batch.pixels[0]) == 1


def test_an_empty_pack_is_padding():
    batch = build_packs([[PackedSample(3, 10, None)]], seq_length=12, padding_token=PADDING)
    assert (batch.document_BS == -1).all() and batch.keys == [[]] and batch.pixels == [[]]


def test_image_tokens_must_match_features(encoded):
    two = encoded[0]
    check_features(two, [2, 4])
    with pytest.raises(ValueError, match="'two', image 1: 4 image tokens but 5 features"):
        check_features(two, [2, 5])
    with pytest.raises(ValueError, match="'two' has tokens for 2 images but 1 pictures"):
        check_features(two, [2])


def test_a_sample_must_be_as_long_as_planned(encoded):
    two = encoded[0]
    with pytest.raises(ValueError, match=rf"'two' has {len(two)} tokens but was planned with {len(two) + 1}"):
        build_packs([[PackedSample(0, len(two) + 1, two)]], seq_length=200, padding_token=PADDING)
