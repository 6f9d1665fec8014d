"""Planned counts held against packs that are read: mixtures, several images, windows, shortened samples, epochs."""

import numpy as np
import pytest

from laver_megatron.config.command_line import load_config
from laver_megatron.data.batch.data_spec import DataSpec
from laver_megatron.data.batch.pack_reader import open_reader
from laver_megatron.data.batch.packing import image_grids
from laver_megatron.demo.make import make_demo
from laver_megatron.encoders import open_preprocessor
from laver_megatron.flops.encoder import window_area
from laver_megatron.hf.shape import read_model_shape
from laver_megatron.hf.tokenizer import load_tokenizer
from laver_megatron.model.streams import StreamSettings, span_areas
from laver_megatron.studies.iteration_counts import COUNTS, IterationCounts

WINDOW_TOKENS = 2
BATCH = 4


@pytest.fixture(scope="module")
def directory(demo_dir, tmp_path_factory):
    """The demo with an encoder of native resolution, of which images differ in size."""
    place = tmp_path_factory.mktemp("planned")
    for part in ("model", "encoder", "shards"):
        (place / part).symlink_to(demo_dir / part)
    return make_demo(place, encoders=["qwen2_5_vl"])


def open_data(directory, *flags):
    config = load_config([
        "--load", f"hf:{directory / 'model'}", "--encoder", str(directory / "encoder_qwen2_5_vl"),
        "--data-path", str(directory / "shards" / "train-*.tar"), "--run-dir", "unused", "--train-iters", "1",
        "--global-batch-size", str(BATCH), "--num-workers", "0", *flags,
    ])  # fmt: skip
    reader = open_reader(
        DataSpec.of(config, config.data.data_path, training=True),
        load_tokenizer(directory / "model"),
        open_preprocessor(directory / "encoder_qwen2_5_vl"),
    )
    streams = StreamSettings.of(config.replace(visual_seq_length=reader.visual_seq_length),
                                read_model_shape(directory / "model"))  # fmt: skip
    return config, reader, streams


def counted(reader, streams, num_packs):
    """COUNTS of the first packs, from their tensors."""
    sums = np.zeros(len(COUNTS), np.int64)
    for number in range(num_packs):
        (packs,) = reader.read(number, 1, 1)
        lm_area, image_area = span_areas(packs, streams)
        sums += [
            int((packs.document_BS >= 0).sum()), lm_area, int((packs.image_BS >= 0).sum()), image_area,
            int(packs.image_BS.amax() + 1), window_area(image_grids(packs), WINDOW_TOKENS),
        ]  # fmt: skip
    return dict(zip(COUNTS, sums.tolist(), strict=True))


@pytest.mark.parametrize(
    "flags",
    [
        ("--seq-length", "256", "--attention", "mixed"),
        ("--seq-length", "256", "--attention", "causal", "--shuffle-window", "30"),
        ("--seq-length", "110", "--visual-seq-length", "64", "--long-samples", "drop_turns", "--seed", "3"),
    ],
    ids=["mixed", "causal in windows", "shortened"],
)
def test_counts_are_those_of_the_packs(directory, flags):
    config, reader, streams = open_data(directory, *flags)
    planned = IterationCounts(reader, config, WINDOW_TOKENS)
    iterations = planned.iterations_in(1) + 2  # into the second epoch
    assert planned.counts(iterations) == counted(reader, streams, iterations * BATCH)
    assert planned.counts(2) == counted(reader, streams, 2 * BATCH)  # and going back
    assert planned.counts(0) == dict.fromkeys(COUNTS, 0)
    if "drop_turns" in flags:
        assert any(part.dropped_I.any() for part in _counts_of(reader, directory))
    reader.close()


def _counts_of(reader, directory):
    from laver_megatron.data.index.counts import count_samples

    maker = reader.maker
    return [
        count_samples(index, load_tokenizer(directory / "model"), maker.preprocessor, 1, maker.limits)
        for index in maker.indexes
    ]


def test_sources_with_weights(directory):
    shards = str(directory / "shards" / "train-*.tar"), str(directory / "shards" / "valid-*.tar")
    config, reader, streams = open_data(
        directory, "--seq-length", "256", "--data-path", *shards, "--data-weights", "0.5", "2"
    )
    planned = IterationCounts(reader, config, WINDOW_TOKENS)
    iterations = planned.iterations_in(1)
    assert planned.counts(iterations) == counted(reader, streams, iterations * BATCH)
    whole = np.concatenate([source.tokens_I for source in planned.plan.sources])
    assert planned.epoch_tokens == pytest.approx(whole[:96].sum() / 2 + 2 * whole[96:].sum(), rel=0.05)
    assert planned.epochs(iterations) == pytest.approx(1, abs=BATCH / planned.plan.num_packs())
    reader.close()
