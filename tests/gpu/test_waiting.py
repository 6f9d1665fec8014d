"""The host of a GPU does not wait for it within a step, except where the log and the decision to skip need a value."""

import warnings

import pytest
import torch

from laver_megatron import train
from laver_megatron.model.streams import build_micro_batch
from laver_megatron.objective.micro_batch import micro_batch_losses
from laver_megatron.runtime.backend import shut_down_parallelism
from tests.distributed.build import make_assets, make_config, make_trainer
from tests.gpu.kernels import BF16, kernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# Of a whole step: the counts of the batch, the losses, the gradient norm.
ALLOWED = 3


@pytest.fixture(scope="module", params=kernels(BF16))
def trainer(request, tmp_path_factory):
    """After two steps, which compile and allocate."""
    directory = tmp_path_factory.mktemp("assets")
    config = make_config(make_assets(directory), directory / "run", attention_kernel=request.param, bf16=True)
    trainer = make_trainer(config)
    for _ in range(2):
        train.train_step(trainer)
    yield trainer
    shut_down_parallelism()


@pytest.fixture
def waiting_is_an_error():
    def begin():
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")

    yield begin
    torch.cuda.set_sync_debug_mode("default")


def batch_of(trainer):
    trainer.optimizer.zero_grad()
    for chunk in trainer.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    return trainer.training_data.at(trainer.progress.consumed_packs, mask_ratio=0.4, step=2)


def test_a_micro_batch_waits_for_nothing(trainer, waiting_is_an_error):
    batch = batch_of(trainer)
    micro_batch = build_micro_batch(batch.packs[0], batch.masked[0], trainer.streams, trainer.backend.device)
    waiting_is_an_error()
    output = trainer.chunks[0](micro_batch, batch.pixels[0])
    loss, _ = micro_batch_losses(output, micro_batch, batch.counts, trainer.config.objective, trainer.centre, None)
    loss.backward()


def test_the_schedule_waits_for_nothing(trainer, waiting_is_an_error):
    batch = batch_of(trainer)
    waiting_is_an_error()
    train.run_schedule(trainer, batch, forward_only=False)


def test_a_step_waits_where_it_must(trainer):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            train.train_step(trainer)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing CUDA operation" in str(w.message)]
    assert 0 < len(waits) <= ALLOWED, "\n".join(waits)
