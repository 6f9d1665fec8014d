"""Between a micro-batch and its gradients nothing asks the device for a value, which a GPU's host would wait for.

`torch.cuda.set_sync_debug_mode("error")` shows it on a GPU (tests/gpu); here operations that would wait are counted.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.small_run import build_stage, loss_of, make_micro_batch, settings, write_encoder


@pytest.fixture(scope="module")
def encoder_dir(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("encoder"))


pytestmark = pytest.mark.usefixtures("single_process")

ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "equal", "repeat_interleave.Tensor")


class Questions(TorchDispatchMode):
    """Names of operations whose result the host needs, boolean indexing among them."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        indexes = name.startswith(("index.Tensor", "index_put")) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if indexes or name.removesuffix(".default") in ASKING:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("changes", [{}, {"recompute_granularity": "full"}, {"laver": False}, {"freeze": ()}], ids=str)
def test_a_micro_batch_asks_the_device_nothing(encoder_dir, changes):
    config = settings(2, **changes)
    stage = build_stage(config, encoder_dir)
    micro_batch, pixels = make_micro_batch(config, 2)
    with Questions() as questions:
        loss = loss_of(config, micro_batch, stage(micro_batch, pixels))
        loss.backward()
    assert questions.found == []


def test_the_count_sees_questions():
    values = torch.arange(4.0)
    with Questions() as questions:
        values[values > 1].sum().item()
        values.nonzero()
        values[torch.tensor([0, 1])]
    assert len(questions.found) == 3
