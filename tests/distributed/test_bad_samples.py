"""Too many bad samples end a run, on all ranks together and with the last whole step saved."""

from unittest import mock

import pytest

from laver_megatron.data.batch import run_data
from laver_megatron.data.batch.packing import PackedSample
from laver_megatron.train import setup, train
from tests.distributed.build import PACKS_PER_STEP, SyntheticReader, assert_same_bits, make_config, snapshot
from tests.distributed.harness import Layout


class WorseningReader(SyntheticReader):
    """From the third step on the samples of the first pack are bad; `limit` of them may be."""

    def __init__(self, limit):
        super().__init__("packs")
        self.limit = limit

    def _pack(self, number):
        samples = super()._pack(number)
        if number < 2 * PACKS_PER_STEP or number % PACKS_PER_STEP:
            return samples
        return [PackedSample(sample.sample_id, sample.num_tokens, None) for sample in samples]

    def check_bad(self, num_bad, num_read, found):
        if num_bad > self.limit:
            raise ValueError(f"{num_bad} of {num_read} samples cannot be used\nthe table")


def train_on_worse_and_worse(layout, config, limit):
    """Job: the error that ends `train`, the state, and where it stands."""
    with (
        mock.patch.object(run_data, "load_tokenizer"),
        mock.patch.object(run_data, "open_preprocessor"),
        mock.patch.object(run_data, "open_reader", lambda *_: WorseningReader(limit)),
    ):
        trainer = setup(config)
        problem = ""
        try:
            train(trainer)
        except ValueError as error:
            problem = f"{type(error).__name__}: {error}"
    return problem, snapshot(trainer), trainer.progress.iteration


DIVIDED = pytest.mark.slow(reason="replicas and ranks that do not read are in PP2 x DP2")


@pytest.mark.parametrize(
    "layout",
    [
        Layout(pp=2, dp=2),
        pytest.param(Layout(tp=2, dp=2), marks=DIVIDED),
        pytest.param(Layout(tp=2, pp=2), marks=DIVIDED),
    ],
    ids=str,
)
def test_the_limit_of_bad_samples_saves_first(pool, assets, tmp_path, layout):
    """Ranks that do not read end with the same message; a run that allows more resumes as if nothing had been."""
    config = make_config(assets, tmp_path / "limited", layout, train_iters=4)
    for problem, _, iteration in pool.run(train_on_worse_and_worse, layout, config, 0):
        assert problem.startswith("RaisedByAll: ") and "samples cannot be used\nthe table" in problem
        assert iteration == 2
    assert (tmp_path / "limited" / "checkpoints" / "latest").read_text() == "2"
    resumed = pool.run(train_on_worse_and_worse, layout, config, 100)
    whole_config = make_config(assets, tmp_path / "whole", layout, train_iters=4)
    whole = pool.run(train_on_worse_and_worse, layout, whole_config, 100)
    for (problem, state, iteration), (_, expected, _) in zip(resumed, whole, strict=True):
        assert problem == "" and iteration == 4
        assert_same_bits(state, expected)


def test_what_prevents_the_save_hides_no_error(pool, assets, tmp_path):
    config = make_config(assets, tmp_path, train_iters=4)
    (tmp_path / "checkpoints").write_text("no directory")
    ((problem, *_),) = pool.run(train_on_worse_and_worse, Layout(), config, 0)
    assert problem.startswith("RaisedByAll: ") and "cannot be used" in problem
