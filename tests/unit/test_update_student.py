"""The part of the student's update that needs no GPU to be seen: which gradients clipping scales."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from laver_megatron import train
from laver_megatron.checkpoint.progress import Progress
from laver_megatron.runtime.backend import use_backend
from tests.small_run import settings


@pytest.mark.parametrize("is_decoupled", [False, True])
def test_clipping_scales_the_gradients_that_are_applied(is_decoupled):
    """With --use-precision-aware-optimizer Megatron-Core applies `decoupled_grad`, which `.grad` does not name."""
    use_backend()
    parameter = torch.nn.Parameter(torch.zeros(4))
    name = "decoupled_grad" if is_decoupled else "grad"
    setattr(parameter, name, torch.full((4,), 3.0))
    part = SimpleNamespace(
        is_stub_optimizer=False,
        get_parameters=lambda: [parameter],
        config=SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=is_decoupled),
    )
    optimizer = mock.Mock(chained_optimizers=[part], param_groups=[])
    trainer = SimpleNamespace(config=settings(2, clip_grad=1.5), optimizer=optimizer, progress=Progress())
    with mock.patch.object(train, "agreed_loss_and_norm", lambda optimizer, loss: (loss, 6.0)):
        train.update_student(trainer, 1e-3, 2.0)
    # 3 times 1.5 / 6; Megatron adds 1e-6 to the norm.
    torch.testing.assert_close(getattr(parameter, name), torch.full((4,), 0.75), rtol=1e-6, atol=0)
    optimizer.step_with_ready_grads.assert_called_once_with()
