import dataclasses
import json
import logging

import pytest
import torch

from laver_megatron.data.loader import open_dataset
from tests.unit.data.content import picture_bytes, question


@pytest.fixture
def open_shards(tokenizer, preprocessor):
    readers = []

    def open_(paths, num_workers=0, seq_length=256, visual_seq_length=192):
        readers.append(open_dataset(paths, tokenizer, preprocessor, seq_length, visual_seq_length, 1, num_workers))
        return readers[-1]

    yield open_
    for reader in readers:
        reader.close()


def same(one, other):
    for field in dataclasses.fields(one):
        left, right = getattr(one, field.name), getattr(other, field.name)
        if field.name == "keys":
            assert left == right
        elif field.name == "pixels":
            assert [len(images) for images in left] == [len(images) for images in right]
            assert all(torch.equal(a, b) for a, b in zip(sum(left, []), sum(right, []), strict=True))
        else:
            assert left.dtype == torch.int64 and torch.equal(left, right), field.name


def test_workers_change_nothing(demo_dir, open_shards):
    shards = demo_dir / "shards" / "train-*.tar"
    plain, threaded = open_shards(shards), open_shards(shards, num_workers=3)
    packs_an_epoch = plain.plan.num_packs(0)
    # Straight on, with a stride (one of two data-parallel ranks), back, and across the end of the epoch.
    for first in (0, 4, 8, 16, 24, 2, packs_an_epoch - 2):
        for one, other in zip(plain.read(first, 4, 2), threaded.read(first, 4, 2), strict=True):
            same(one, other)
    assert len(threaded._under_way) <= 4  # only what the next call is expected to ask for


def test_micro_batches_and_ranks_cut_the_same_packs(demo_dir, open_shards):
    reader = open_shards(demo_dir / "shards")
    [whole] = reader.read(0, 4, 4)
    first, second = reader.read(0, 2, 1), reader.read(2, 2, 2)
    assert whole.keys == first[0].keys + first[1].keys + second[0].keys
    assert torch.equal(whole.tokens_BS[:2], torch.cat([first[0].tokens_BS, first[1].tokens_BS]))
    assert torch.equal(whole.tokens_BS[2:], second[0].tokens_BS)


def test_packs_hold_what_the_plan_says(demo_dir, open_shards):
    reader = open_shards(demo_dir / "shards" / "train-*.tar")
    plan = reader.plan
    for number in range(8):
        [batch] = reader.read(number, 1, 1)
        ids = plan.pack(number)
        assert batch.keys == [[reader.samples[i].key for i in ids]]
        assert (batch.document_BS >= 0).sum() == plan.token_counts_I[list(ids)].sum() <= 256
        assert (batch.image_BS >= 0).sum() == plan.visual_counts_I[list(ids)].sum() <= 192
        assert torch.equal(batch.image_BS >= 0, batch.tokens_BS == reader.encoder.image_pad)
        assert len(batch.pixels[0]) == int(batch.image_BS.max()) + 1
        assert set(batch.sample_id_BS[0].tolist()) - {-1} == set(ids)


def test_summary_line(demo_dir, open_shards, caplog):
    caplog.set_level(logging.INFO, "laver_megatron")
    reader = open_shards(demo_dir / "shards" / "train-*.tar", visual_seq_length=64)
    [line] = [record.getMessage() for record in caplog.records if record.getMessage().startswith("data: ")]
    # Every sixth sample of the demo has two pictures of 64 tokens.
    assert line.startswith("data: 80 samples, 64 images, ")
    assert line.endswith(
        f"{reader.plan.num_packs(0)} packs in the first epoch; skipped: 16 (more than 64 visual tokens)"
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_corrupt_picture_leaves_padding(write_shard, open_shards, caplog, num_workers):
    good, bad = picture_bytes((200, 200)), bytearray(picture_bytes((200, 200)))
    samples = {f"s{i}": {"json": question(), "jpg": good} for i in range(3)}
    samples["s1"]["jpg"] = bytes(bad[: len(bad) // 2])  # the header is whole: found only at decoding
    reader = open_shards(write_shard(samples), num_workers)
    assert reader.plan.num_packs(0) == 2
    batches = reader.read(0, 2, 1)
    assert sorted(key for batch in batches for key in batch.keys[0]) == ["s0", "s2"]
    tokens = reader.plan.token_counts_I
    assert sum(int((batch.document_BS >= 0).sum()) for batch in batches) == tokens[0] + tokens[2]
    assert reader.num_bad_samples == 1
    assert "train-00000.tar: 's1' stays padding" in caplog.text


def test_unreadable_samples_are_left_out_of_the_plan(write_shard, open_shards, caplog):
    samples = {
        "good": {"json": question(), "jpg": picture_bytes()},
        "no-header": {"json": question(), "jpg": b"not a picture"},
        "no-json": {"json": b"{", "jpg": picture_bytes()},
    }
    caplog.set_level(logging.INFO, "laver_megatron")
    reader = open_shards(write_shard(samples))
    assert reader.plan.num_packs(0) == 1 and reader.read(0, 1, 1)[0].keys == [["good"]]
    assert "'no-header' is left out: unreadable picture" in caplog.text
    assert "'no-json' is left out: unreadable conversation" in caplog.text
    assert "1 (unreadable picture), 1 (unreadable conversation)" in caplog.text


def test_placeholders_that_do_not_match_stop_the_start(write_shard, open_shards):
    shard = write_shard({"a/b": {"json": question("<image> <image>"), "jpg": picture_bytes()}})
    with pytest.raises(ValueError, match="'a/b': 2 <image> in the text but 1 pictures"):
        open_shards(shard)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_features_that_do_not_match_are_an_error(write_shard, open_shards, monkeypatch, num_workers):
    reader = open_shards(write_shard({"k": {"json": question(), "jpg": picture_bytes()}}), num_workers)
    monkeypatch.setattr(reader.preprocessor, "num_features", lambda pixels: 63)
    with pytest.raises(ValueError, match="'k', image 0: 64 image tokens but 63 features"):
        reader.read(0, 1, 1)


def test_a_shard_that_vanishes_is_an_error_and_no_padding(write_shard, open_shards):
    shard = write_shard({"k": {"json": question(), "jpg": picture_bytes()}})
    reader = open_shards(shard)
    shard.unlink()
    with pytest.raises(FileNotFoundError):
        reader.read(0, 1, 1)


def test_data_without_answers_are_an_error(write_shard, open_shards):
    only_asks = json.dumps([{"role": "user", "content": "What is it?"}]).encode()
    shard = write_shard({"a": {"json": only_asks}, "b": {"json": only_asks}})
    with pytest.raises(ValueError, match="none of the 2 samples that fit has an answer"):
        open_shards(shard)


def test_data_without_images_are_an_error_where_images_are_needed(write_shard, tokenizer, preprocessor):
    shard = write_shard({"a": {"json": question("What is it?")}})
    open_dataset(shard, tokenizer, preprocessor, 256, 192, 1, 0)
    with pytest.raises(ValueError, match="none of the 1 samples that fit has an image.*--no-laver"):
        open_dataset(shard, tokenizer, preprocessor, 256, 192, 1, 0, needs_images=True)


def test_the_fingerprint_follows_what_a_pack_number_means(demo_dir, open_shards):
    shards = demo_dir / "shards" / "train-*.tar"
    assert open_shards(shards).fingerprint == open_shards(shards, num_workers=2).fingerprint
    assert open_shards(shards).fingerprint != open_shards(shards, seq_length=320).fingerprint
