"""Batches of a real reader: the same samples for any number of ranks and workers; bad ones are counted."""

import contextlib
import json
import threading
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from laver_megatron.checkpoint.progress import Progress
from laver_megatron.config.command_line import load_config
from laver_megatron.data.batch import batches
from laver_megatron.data.batch.batches import BatchSource, GlobalCounts, count, num_bad_samples
from laver_megatron.data.batch.data_spec import DataSpec
from laver_megatron.data.batch.pack_reader import open_reader
from laver_megatron.data.index.faults import Fault
from laver_megatron.flops.encoder import BY_TOKENS
from laver_megatron.objective.masking import mask_visual_tokens
from laver_megatron.run_log.step_record import advance
from tests.content import picture_bytes
from tests.packs import pack, padding

GLOBAL_BATCH_SIZE = 4


@pytest.fixture(scope="module")
def config(demo_dir):
    arguments = ["--data-path", str(demo_dir / "shards"), "--run-dir", "unused", "--train-iters", "10"]
    arguments += ["--seq-length", "256", "--visual-seq-length", "128", "--shuffle-window", "50"]
    return load_config([*arguments, "--global-batch-size", str(GLOBAL_BATCH_SIZE)])


def source_on(config, reader, rank: int, num_ranks: int) -> BatchSource:
    """The batches of one of several data-parallel ranks."""
    source = BatchSource.__new__(BatchSource)
    source.config, source.reader, source.areas = config, reader, lambda packs: (0, 0, 0)
    source.image_cost = BY_TOKENS
    source.dtype, source.device = torch.float32, torch.device("cpu")
    source.num_samples = source.num_bad_samples = source._num_bad_checked = 0
    source.faults, source._reported_faults = Counter(), Counter(reader.faults.counts)
    source.packs_per_rank = GLOBAL_BATCH_SIZE // num_ranks
    return source


@contextlib.contextmanager
def on_ranks(all_reduce, data_parallel_rank):
    """Without process groups."""
    with (
        mock.patch.object(batches, "parallel_state") as state,
        mock.patch.object(batches, "share_metadata", lambda packs, masked, *_: (packs, masked)),
        mock.patch.object(batches, "scatter_pixels", lambda packs, *_: [p.pixels for p in packs]),
        mock.patch.object(batches.dist, "all_reduce", all_reduce),
        mock.patch.object(batches.dist, "broadcast_object_list"),
    ):
        state.get_data_parallel_rank.side_effect = data_parallel_rank
        yield


@pytest.fixture
def reader_of(tokenizer, preprocessor):
    """reader_of(config, paths=those of the configuration)"""
    return lambda config, paths=None: open_reader(
        DataSpec.of(config, paths or config.data.data_path), tokenizer, preprocessor
    )


def keys_at(source, rank, num_ranks, first_pack):
    with on_ranks(mock.Mock(), lambda: rank):
        batch = source.at(first_pack, mask_ratio=0.3, step=0)
    return [(keys, masked.sum().item()) for p, masked in zip(batch.packs, batch.masked, strict=True) for keys in p.keys]


@pytest.mark.processes
@pytest.mark.parametrize("num_ranks, num_workers", [(1, 0), (2, 1), (4, 3)])
def test_whole_epochs(config, reader_of, num_ranks, num_workers):
    """Every sample once in each of two epochs, whatever the ranks and workers; batches run across the end of an epoch;
    changing the number of ranks on the way changes nothing."""
    config = config.replace(num_workers=num_workers)
    readers = [reader_of(config) for _ in range(num_ranks)]
    sources = [source_on(config, reader, rank, num_ranks) for rank, reader in enumerate(readers)]
    alone = source_on(config, reader_of(config.replace(num_workers=0)), 0, 1)
    plan = readers[0].plan
    num_packs = plan.num_packs(0) + plan.num_packs(1)
    found = []
    for first in range(0, num_packs, GLOBAL_BATCH_SIZE):
        together = [pair for rank, source in enumerate(sources) for pair in keys_at(source, rank, num_ranks, first)]
        if first % 12 == 0:
            assert together == keys_at(alone, 0, 1, first), "as one rank without workers reads them there"
        found += together
    epochs = found[: plan.num_packs(0)], found[plan.num_packs(0) : num_packs]
    names = [sorted(key for keys, _ in epoch for key in keys) for epoch in epochs]
    assert len(names[0]) == len(set(names[0])) == 96 + 24 and names[0] == names[1]
    assert epochs[0] != epochs[1][: len(epochs[0])]
    for reader in readers:
        reader.close()


@pytest.mark.parametrize("sampling", ["bernoulli", "fixed"])
def test_masks_are_those_of_the_step(config, reader_of, sampling):
    """The same packs, so the same images, at two steps: each time the masks of that step, and not the same ones."""
    config = config.replace(num_workers=0, mask_sampling=sampling)
    source = source_on(config, reader_of(config), 0, 1)
    found = {}
    for step in (0, 1, 7):
        with on_ranks(mock.Mock(), lambda: 0):
            batch = source.at(0, mask_ratio=0.3, step=step)
        for packs, masked_BS in zip(batch.packs, batch.masked, strict=True):
            expected_BS = mask_visual_tokens(
                packs.image_BS, packs.sample_id_BS, packs.image_number_BS, mask_ratio=0.3, sampling=sampling,
                seed=config.training.seed, step=step,
            )  # fmt: skip
            assert torch.equal(masked_BS, expected_BS) and masked_BS.any()
        found[step] = torch.cat(batch.masked)
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[7])


def test_bad_samples_are_counted(write_shard, reader_of, config):
    """In the batch's counts, and up to the limit."""
    whole = picture_bytes((64, 64))
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "Yes."}]
    samples = {
        f"s{i}": {"json": json.dumps(turns).encode(), "jpg": whole[:-400] if i < 3 else whole} for i in range(12)
    }
    shard = write_shard(samples)
    for limit, ends in ((0.26, False), (0.24, True)):
        reader = reader_of(config.replace(num_workers=0, max_bad_fraction=limit), [str(shard)])
        source = source_on(config, reader, 0, 1)
        assert reader.plan.num_packs(0) > GLOBAL_BATCH_SIZE
        if ends:
            with pytest.raises(ValueError, match=r"samples cannot be used \(\d"):
                for step in range(3):
                    keys_at(source, 0, 1, step * GLOBAL_BATCH_SIZE)
        else:
            for step in range(3):
                keys_at(source, 0, 1, step * GLOBAL_BATCH_SIZE)
            assert source.num_bad_samples / source.num_samples == pytest.approx(0.25, abs=0.08)


def test_a_restart_goes_on_counting_bad_samples(write_shard, reader_of, config):
    whole = picture_bytes((64, 64))
    turns = json.dumps([{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "Yes."}]).encode()
    shard = write_shard({f"s{i}": {"json": turns, "jpg": whole[:-400] if i < 3 else whole} for i in range(12)})
    config = config.replace(num_workers=0, max_bad_fraction=0.3)
    sources = []
    for known in ((0, 0), (7, 1), (90, 60)):
        reader = reader_of(config, [str(shard)])
        sources.append(source_on(config, reader, 0, 1))
        sources[-1].resume_from({}, *known)
        assert (sources[-1].num_samples, sources[-1].num_bad_samples) == (sum(known), known[1])
    keys_at(sources[0], 0, 1, 0), keys_at(sources[1], 0, 1, 0)
    assert sources[1].num_samples == sources[0].num_samples + 8
    assert sources[1].num_bad_samples == sources[0].num_bad_samples + 1
    with pytest.raises(ValueError, match=r"6\d of 1\d\d samples cannot be used"):
        keys_at(sources[2], 0, 1, 0)


def test_progress_keeps_the_bad_samples_apart(config):
    progress = Progress(consumed_samples=10, bad_samples=1)
    counts = GlobalCounts(*[0] * 10)
    flops = SimpleNamespace(total=1, laver_overhead=0)
    with mock.patch.object(batches.dist, "get_world_size", return_value=1):
        advance(
            progress,
            config,
            replace(counts, samples=5, bad_samples=2),
            flops,
            seconds=1.0,
            data_seconds=0.25,
            skipped=False,
        )
    assert (progress.consumed_samples, progress.bad_samples) == (15, 3)


def test_the_table_holds_what_all_readers_have_found(write_shard, reader_of, config):
    whole = picture_bytes((64, 64))
    contents = {"cut": whole[:-400], "none": whole[:20]}  # the second is known before the start
    turns = json.dumps([{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "Yes."}]).encode()
    kinds = ["none", *["cut"] * 6, *["whole"] * 17]
    shard = write_shard({f"s{i}": {"json": turns, "jpg": contents.get(kind, whole)} for i, kind in enumerate(kinds)})
    config = config.replace(num_workers=0, max_bad_fraction=0.2)
    readers = [reader_of(config, [str(shard)]) for _ in range(2)]
    sources = [source_on(config, reader, rank, 2) for rank, reader in enumerate(readers)]
    barrier, tables, found = threading.Barrier(2), {}, []

    def all_reduce(table, group):
        tables[threading.current_thread().name] = table.clone()
        barrier.wait(60)
        table.copy_(sum(tables.values()))
        barrier.wait(60)

    def read(source):
        try:
            for step in range(20):
                source.at(step * GLOBAL_BATCH_SIZE, mask_ratio=0.3, step=step)
        except ValueError as error:
            found.append(str(error))

    with on_ranks(all_reduce, lambda: int(threading.current_thread().name)):
        threads = [threading.Thread(target=read, args=[s], name=str(rank)) for rank, s in enumerate(sources)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 2 and found[0] == found[1], "both readers stop, and say the same"
    own = [reader.faults.counts[Fault.unreadable_image] - 1 for reader in readers]
    assert min(own) > 0 and f"\n{sum(own):>12,}  unreadable_image" in found[0]


def built(config, reader, told):
    """A source as it is built on a rank to which rank 0 tells this."""
    with (
        mock.patch.object(batches, "parallel_state") as state,
        mock.patch.object(batches.dist, "broadcast_object_list", lambda values, src: told(values)),
    ):
        state.get_data_parallel_world_size.return_value = 1
        return BatchSource(config, reader, lambda packs: (0, 0, 0), torch.float32, torch.device("cpu"))


def test_marks_pass_from_rank_to_rank(config, reader_of):
    """From a run to the checkpoint and to a reader that begins anew; other data than rank 0's are an error."""
    config = config.replace(num_workers=0)
    first, second = (reader_of(config) for _ in range(2))
    position = first.plan.num_packs(0)
    source = built(config, first, lambda values: None)
    with mock.patch.object(batches.dist, "broadcast_object_list"):
        mark = source.mark(position)
    assert mark["window"] == first.plan.num_windows > 1 and mark == json.loads(json.dumps(mark))
    resumed = built(config, second, lambda values: None)
    resumed.resume_from({})  # of a checkpoint without one
    with mock.patch.object(second.plan, "_pack_window", wraps=second.plan._pack_window) as packed:
        resumed.resume_from(mark)
        assert keys_at(resumed, 0, 1, position) == keys_at(source, 0, 1, position)
    assert min(call.args[0] for call in packed.call_args_list) == mark["window"]
    with pytest.raises(ValueError, match="other data or to another version"):
        resumed.resume_from({**mark, "first_pack": position + 1})
    built(config, None, lambda values: values.__setitem__(0, "rank 0's")).resume_from(mark)  # reads nothing
    with pytest.raises(ValueError, match="those of rank 0 other: the indexes or shards .* not the same on all nodes"):
        built(config, second, lambda values: values.__setitem__(0, "other"))


def test_counts_of_a_pack():
    packs = pack([3, (2, 2), 2], padding(4), [2], padding(3))
    packs.sample_id_BS[0, 9:11], packs.sample_id_BS[0, 11:13] = 77, 78
    assert num_bad_samples(packs) == 2
    with (
        mock.patch.object(batches, "parallel_state"),
        mock.patch.object(batches.dist, "all_reduce"),
    ):
        counts, faults = count(
            [packs],
            [packs.image_BS == 0],
            lambda packs: (5, 6, 7),
            torch.device("cpu"),
            Counter({Fault.image_shape: 3}),
        )
    assert (counts.tokens, counts.samples, counts.bad_samples, counts.images, counts.masked) == (11, 2, 2, 1, 4)
    assert (counts.language_span_area, counts.image_span_area, counts.image_window_area) == (5, 6, 7)
    assert faults == {Fault.image_shape: 3}
