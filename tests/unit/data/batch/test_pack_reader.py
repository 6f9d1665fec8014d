import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from laver_megatron.data.batch.data_spec import DataSpec
from laver_megatron.data.batch.pack_reader import open_reader
from laver_megatron.data.index import mapped
from laver_megatron.data.index.build import index_tars
from laver_megatron.data.index.faults import Fault
from laver_megatron.data.index.index_file import write_index
from laver_megatron.encoders import ImagePreprocessor
from laver_megatron.tasks.make import make_tasks
from laver_megatron.tasks.sample import TaskSettings
from tests.content import picture_bytes, question
from tests.small_run import settings


@pytest.fixture
def open_shards(tokenizer, preprocessor):
    readers = []

    def open_(paths, num_workers=0, seq_length=256, visual_seq_length=192, **options):
        options = {"max_bad_fraction": 1.0, **options}
        paths = [paths] if not isinstance(paths, list) else paths
        spec = DataSpec(paths, seq_length, visual_seq_length, 1, num_workers, **options)
        readers.append(open_reader(spec, tokenizer, preprocessor))
        return readers[-1]

    yield open_
    for reader in readers:
        reader.close()


def same(one, other):
    for field in dataclasses.fields(one):
        left, right = getattr(one, field.name), getattr(other, field.name)
        if field.name in ("keys", "families"):
            assert left == right
        elif field.name == "pixels":
            assert [len(images) for images in left] == [len(images) for images in right]
            assert all(torch.equal(a, b) for a, b in zip(sum(left, []), sum(right, []), strict=True))
        else:
            assert left.dtype == torch.int64 and torch.equal(left, right), field.name


@pytest.mark.processes
@pytest.mark.parametrize("num_workers", [0, 2])
def test_kinds_of_question_come_with_the_packs(tmp_path, open_shards, num_workers):
    names = ("position", "counting")
    make_tasks(TaskSettings(1, 24, 1, families=names), tmp_path / "set")
    [packs] = open_shards(tmp_path / "set" / "train-00.tar", num_workers).read(0, 2, 2)
    assert sum(map(len, packs.keys)) >= 4
    assert packs.families == [[names[int(key[-1]) % 2] for key in keys] for keys in packs.keys]


@pytest.mark.processes
@pytest.mark.parametrize("num_workers", [0, 2])
def test_pixels_in_bfloat16(demo_dir, open_shards, num_workers):
    """A run in bf16 has its workers round, which halves what they share with the trainer."""
    shards = demo_dir / "shards" / "train-*.tar"
    [exact] = open_shards(shards).read(0, 2, 2)
    rounded_reader = open_shards(shards, num_workers, pixel_dtype=torch.bfloat16)
    [rounded] = rounded_reader.read(0, 2, 2)
    for images, expected in zip(rounded.pixels, exact.pixels, strict=True):
        assert [image.dtype for image in images] == [torch.bfloat16] * len(expected)
        assert all(torch.equal(a, b.to(torch.bfloat16)) for a, b in zip(images, expected, strict=True))


@pytest.mark.parametrize("bf16", [False, True])
def test_pixels_are_in_the_dtype_of_the_run(bf16):
    expected = torch.bfloat16 if bf16 else torch.float32
    assert DataSpec.of(settings(2, bf16=bf16), ["shards"]).pixel_dtype == expected


@pytest.mark.processes
def test_workers_change_nothing(demo_dir, open_shards):
    shards = demo_dir / "shards" / "train-*.tar"
    plain, threaded = open_shards(shards), open_shards(shards, num_workers=3)
    packs_an_epoch = plain.plan.num_packs(0)
    # Straight on, with a stride (one of two data-parallel ranks), back, and across the end of the epoch.
    for first in (0, 4, 8, 16, 24, 2, packs_an_epoch - 2):
        for one, other in zip(plain.read(first, 4, 2), threaded.read(first, 4, 2), strict=True):
            same(one, other)
    assert len(threaded._under_way) == 8  # what the next two calls are expected to ask for: six packs for 3 workers


@pytest.mark.processes
def test_a_mapped_index_changes_nothing(demo_dir, open_shards, monkeypatch, tmp_path):
    write_index(index_tars(sorted((demo_dir / "shards").glob("train-*.tar"))), tmp_path / "index.parquet")
    plain = open_shards(tmp_path)
    monkeypatch.setattr(mapped, "SMALLEST", 1)
    for _ in range(2):  # made, and found
        reader = open_shards(tmp_path, num_workers=2)
        assert reader.fingerprint == plain.fingerprint
        for one, other in zip(plain.read(3, 4, 2), reader.read(3, 4, 2), strict=True):
            same(one, other)
    assert len(list(tmp_path.glob("*.mapped"))) == 2


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
        assert batch.keys == [[index.key(row) for index, row in map(reader.maker.locate_sample, ids)]]
        assert (batch.document_BS >= 0).sum() == plan.sizes(ids)[0].sum() <= 256
        assert (batch.image_BS >= 0).sum() == plan.sizes(ids)[1].sum() <= 192
        assert torch.equal(batch.image_BS >= 0, batch.tokens_BS == reader.maker.encoder.image_pad)
        assert len(batch.pixels[0]) == int(batch.image_BS.max()) + 1
        assert set(batch.sample_id_BS[0].tolist()) - {-1} == set(ids)


def test_unused_keys_are_named_when_tars_are_trained_on(write_shard, open_shards, caplog):
    caplog.set_level(logging.INFO, "laver_megatron")
    record = json.dumps({"messages": json.loads(question("Q")), "zzz": 1}).encode()
    shard = write_shard({"a": {"json": record}})
    open_shards(shard)
    assert f"{shard}: unused keys of records: zzz (1)" in caplog.messages


def test_summary_line(demo_dir, open_shards, caplog):
    caplog.set_level(logging.INFO, "laver_megatron")
    reader = open_shards(demo_dir / "shards" / "train-*.tar", visual_seq_length=64)
    [line] = [record.getMessage() for record in caplog.records if record.getMessage().startswith("data: ")]
    # Every sixth sample of the demo has two pictures of 64 tokens.
    assert line.startswith("data: 80 samples, 64 images, ")
    assert line.endswith(
        f"{reader.plan.num_packs(0)} packs in the first epoch; skipped: 16 (more than 64 visual tokens)"
    )


@pytest.mark.processes
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_corrupt_picture_leaves_padding(write_shard, open_shards, caplog, num_workers):
    good, bad = picture_bytes((200, 200)), bytearray(picture_bytes((200, 200)))
    samples = {f"s{i}": {"json": question(), "jpg": good} for i in range(3)}
    samples["s1"]["jpg"] = bytes(bad[: len(bad) // 2])  # the header is whole: found only at decoding
    reader = open_shards(write_shard(samples), num_workers)
    assert reader.plan.num_packs(0) == 2
    batches = reader.read(0, 2, 1)
    assert sorted(key for batch in batches for key in batch.keys[0]) == ["s0", "s2"]
    tokens, _ = reader.plan.sizes(range(3))
    assert sum(int((batch.document_BS >= 0).sum()) for batch in batches) == tokens[0] + tokens[2]
    assert reader.num_bad_samples == 1
    assert "train-00000.tar: 's1' cannot be used (unreadable_image, 1 so far): it stays padding" in caplog.text
    reader.read(0, 2, 1)
    assert reader.num_bad_samples == 2 and reader.faults.counts == {Fault.unreadable_image: 1}


def test_a_picture_of_another_size_than_its_header_said(write_shard, open_shards, tmp_path, caplog):
    """The visual tokens were planned by the index; with an encoder of one resolution nothing else would notice."""
    index = index_tars([write_shard({f"s{i}": {"json": question(), "jpg": picture_bytes()} for i in range(2)})])
    wider_P = index.image_width_P + np.array([0, 1], np.int32)
    write_index(dataclasses.replace(index, image_width_P=wider_P), tmp_path / "index.parquet")
    reader = open_shards(tmp_path / "index.parquet")
    batches = reader.read(0, reader.plan.num_packs(0), 1)
    assert [key for batch in batches for key in batch.keys[0]] == ["s0"]
    assert "'s1' cannot be used (unreadable_image, 1 so far)" in caplog.text
    assert "the picture is (40, 30), but its header says (41, 30)" in caplog.text


def test_unusable_samples_are_left_out_of_the_plan(write_shard, open_shards, caplog):
    samples = {
        "good": {"json": question(), "jpg": picture_bytes()},
        "no-header": {"json": question(), "jpg": b"not a picture"},
        "no-json": {"json": b"{", "jpg": picture_bytes()},
        "two/for-one": {"json": question("<image> <image>"), "jpg": picture_bytes()},
        "spelt-out": {"json": question("<image> <|image_pad|>"), "jpg": picture_bytes()},
        "alone": {"jpg": picture_bytes()},
    }
    caplog.set_level(logging.INFO, "laver_megatron")
    reader = open_shards(write_shard(samples))
    assert reader.plan.num_packs(0) == 1 and reader.read(0, 1, 1)[0].keys == [["good"]]
    counts = {"unreadable_image": 1, "invalid_json": 1, "image_count": 2, "no_json": 1}
    assert reader.faults.counts == counts
    faults = ("unreadable_image", "invalid_json", "image_count", "image_count", "no_json")
    for key, name in zip(list(samples)[1:], faults, strict=True):
        assert f"{key!r} cannot be used ({name}" in caplog.text
    assert all(f"{count} ({name})" in caplog.messages[-1] for name, count in counts.items())


def test_what_counting_finds_is_logged_once(write_shard, open_shards, caplog, tmp_path):
    samples = {"good": {"json": question("?")}, "spelt": {"json": question("<|image_pad|>")}, "bad": {"json": b"{"}}
    write_index(index_tars([write_shard(samples)]), tmp_path / "index.parquet")
    for _ in range(2):  # counted, and from the file
        caplog.clear()
        reader = open_shards(tmp_path / "index.parquet")
        assert reader.faults.counts == {Fault.image_count: 1, Fault.invalid_json: 1}
        assert [sum(repr(key) in text for text in caplog.messages) for key in samples] == [0, 1, 1]


def test_too_many_unusable_samples_stop_the_start(write_shard, open_shards):
    bad = {"json": question("<image> <image>"), "jpg": picture_bytes()}
    shard = write_shard({"a": bad, "b": {"json": question("?")}})
    open_shards(shard, max_bad_fraction=0.5)
    with pytest.raises(ValueError, match=r"1 of 2 samples cannot be used \(50.0%, allowed are 49.0%\)") as caught:
        open_shards(shard, max_bad_fraction=0.49)
    assert "1  image_count       not as many <image> in the questions as images" in str(caught.value)


@pytest.mark.processes
@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_samples_that_turn_out_bad_stop_the_run(write_shard, open_shards, num_workers):
    whole = picture_bytes((200, 200))
    samples = {f"s{i}": {"json": question(), "jpg": whole[: len(whole) // (1 + i % 2)]} for i in range(4)}
    reader = open_shards(write_shard(samples), num_workers, max_bad_fraction=0.25)
    reader.read(0, reader.plan.num_packs(0), 1)
    assert reader.num_bad_samples == 2
    reader.check_bad(num_bad=1, num_read=4, found=reader.faults.counts)
    with pytest.raises(ValueError, match=r"2 of 4 samples cannot be used .*\n +2  unreadable_image"):
        reader.check_bad(num_bad=2, num_read=4, found=reader.faults.counts)
    reader.check_bad(num_bad=2, num_read=8, found=reader.faults.counts)  # two epochs


def test_the_limit_is_a_share_of_an_epoch(write_shard, open_shards):
    """Those known beforehand are not planned; a weight makes the epoch shorter."""
    samples = {f"s{i}": {"json": question("?") if i else b"{"} for i in range(10)}
    for weight, num_samples in ((1.0, 9), (1 / 3, 3)):
        reader = open_shards(write_shard(samples), max_bad_fraction=0.34, weights=[weight])
        assert reader.plan.num_samples == num_samples
        reader.check_bad(num_bad=num_samples // 3, num_read=num_samples, found={})
        with pytest.raises(ValueError, match=f"{num_samples // 3 + 1} of {num_samples} samples cannot be used"):
            reader.check_bad(num_bad=num_samples // 3 + 1, num_read=2, found={})


@pytest.mark.processes
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_shard_that_changes_under_the_run(write_shard, open_shards, num_workers):
    shard = write_shard({f"s{i}": {"json": question("?", "word " * (10 + i))} for i in range(3)})
    reader = open_shards(shard, num_workers, seq_length=80)
    assert reader.plan.num_packs(0) == 3
    content = bytearray(shard.read_bytes())
    content[content.index(b"word")] ^= 1
    shard.write_bytes(content)
    batches = reader.read(0, 3, 1)
    assert sorted(key for batch in batches for key in batch.keys[0]) == ["s1", "s2"]
    assert reader.faults.counts == {Fault.damaged_shard: 1}


def test_a_shard_that_shrinks_under_the_run(write_shard, open_shards):
    shard = write_shard({f"s{i}": {"json": question("?")} for i in range(3)})
    reader = open_shards(shard)
    os.truncate(shard, 3 * 512)  # within the second sample
    [batch] = reader.read(0, 1, 1)
    assert len(batch.keys[0]) < 3 and reader.faults.counts[Fault.damaged_shard] == 3 - len(batch.keys[0])


@pytest.mark.processes
@pytest.mark.parametrize("num_workers", [0, 2])
def test_features_that_do_not_match_are_an_error(write_shard, open_shards, monkeypatch, num_workers):
    monkeypatch.setattr(ImagePreprocessor, "num_features", lambda self, pixels: 63)
    reader = open_shards(write_shard({"k": {"json": question(), "jpg": picture_bytes()}}), num_workers)
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
    with pytest.raises(ValueError, match="none of the 2 samples can be used"):
        open_shards(shard)
    with pytest.raises(ValueError, match="2  no_answer"):
        open_shards(shard, max_bad_fraction=0.01)


def test_data_without_images_are_an_error_where_images_are_needed(write_shard, tokenizer, preprocessor):
    shard = write_shard({"a": {"json": question("What is it?")}})
    open_reader(DataSpec([shard], 256, 192, 1), tokenizer, preprocessor)
    with pytest.raises(ValueError, match="none of the 1 samples that fit has an image.*--no-laver"):
        open_reader(DataSpec([shard], 256, 192, 1, needs_images=True), tokenizer, preprocessor)


@pytest.mark.processes
def test_the_fingerprint_follows_what_a_pack_number_means(demo_dir, open_shards):
    shards = demo_dir / "shards" / "train-*.tar"
    assert open_shards(shards).fingerprint == open_shards(shards, num_workers=2).fingerprint
    assert open_shards(shards).fingerprint != open_shards(shards, seq_length=320).fingerprint


def worker_ids(reader):
    return [worker.pid for worker in reader._workers._workers]


@pytest.mark.processes
def test_a_killed_worker_is_an_error_and_no_hang(demo_dir, open_shards):
    reader = open_shards(demo_dir / "shards", num_workers=2)
    reader.read(0, 2, 1)
    for worker in worker_ids(reader):
        os.kill(worker, signal.SIGKILL)
    with pytest.raises(ValueError, match=r"a reader process died \(SIGKILL\).*memory ran out"):
        for first in range(2, 40, 2):
            reader.read(first, 2, 1)


@pytest.mark.processes
def test_workers_leave_signals_to_the_trainer(demo_dir, open_shards):
    reader, plain = open_shards(demo_dir / "shards", num_workers=2), open_shards(demo_dir / "shards")
    killer = "import os, sys; [os.kill(int(pid), number) for pid in sys.argv[1:] for number in (15, 2)]"
    subprocess.run([sys.executable, "-c", killer, *map(str, worker_ids(reader))], check=True)
    for first in (0, 2, 4, 6, 8, 10):
        for one, other in zip(reader.read(first, 2, 1), plain.read(first, 2, 1), strict=True):
            same(one, other)


@pytest.mark.processes
def test_close_ends_the_workers(demo_dir, open_shards):
    reader = open_shards(demo_dir / "shards", num_workers=2)
    reader.read(0, 2, 1)
    workers = worker_ids(reader)
    reader.close()
    assert not any(os.path.exists(f"/proc/{worker}") for worker in workers)


@pytest.mark.processes
def test_workers_end_with_the_trainer(tmp_path):
    """Also if it is killed and cannot close anything."""
    program = """
import sys, time
from laver_megatron.runtime import processes
processes._WATCH_SECONDS = 0.1
pool = processes.WorkerPool(print, 2)
print(*(worker.pid for worker in pool._workers), flush=True)
time.sleep(60)
"""
    trainer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    workers = trainer.stdout.readline().split()
    assert len(workers) == 2
    trainer.kill()
    trainer.wait()
    for _ in range(100):
        if not any(is_running(worker) for worker in workers):
            return
        time.sleep(0.1)
    pytest.fail(f"{workers} outlive their parent")


def is_running(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.processes
def test_long_samples_lose_their_last_turns(write_shard, open_shards):
    turns = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "a b c"}]
    long = [*turns, {"role": "user", "content": "<image>"}, {"role": "assistant", "content": "d " * 300}]
    pictures = {"0.jpg": picture_bytes(), "1.jpg": picture_bytes()}
    shard = write_shard({"long": {"json": json.dumps(long).encode(), **pictures}, "short": {"json": question("?")}})
    skipping = open_shards(shard)
    assert skipping.read(0, 1, 1)[0].keys == [["short"]]
    for num_workers in (0, 1):
        reader = open_shards(shard, num_workers, long_samples="drop_turns")
        [batch] = reader.read(0, 1, 1)
        assert sorted(batch.keys[0]) == ["long", "short"] and len(batch.pixels[0]) == 1


def test_entries_that_overlap_are_told(write_shard, open_shards, caplog):
    shard = write_shard({f"s{i}": {"json": question("?")} for i in range(3)})
    open_shards([shard, shard.parent])
    assert "both have samples of" in caplog.text


@pytest.mark.processes
def test_memory_is_used_again_but_not_while_it_is_lent(demo_dir, open_shards):
    """However long a run is, the memory is that of one call and of what is under way."""
    reader = open_shards(demo_dir / "shards" / "train-*.tar", num_workers=2)
    plain = open_shards(demo_dir / "shards" / "train-*.tar")
    for first in (*range(0, 24, 2), 3, 9, 1):  # straight on, then wrong guesses
        batches = reader.read(first, 2, 1)
        time.sleep(0.02)  # workers are at what may come next
        for one, other in zip(batches, plain.read(first, 2, 1), strict=True):
            same(one, other)
    assert reader._buffers._num_buffers <= 2 + 4 + 4  # lent, ahead, and guessed wrongly while a worker was at it
    assert plain._buffers._num_buffers == 2
