"""`freeze` stops exactly the modules it names, in every layout: all others get the gradients that they get when nothing
is frozen, in one process.
"""

import pytest
import torch

from laver_megatron.config.modules import MODULES
from laver_megatron.train import train_step
from tests.distributed.build import (
    gradient_shards,
    make_config,
    make_trainer,
    relative_distance,
    student_shards,
    whole_tensors,
)
from tests.distributed.harness import Layout

FROZEN = (
    ("encoder",),
    ("connector",),
    ("decoder",),
    ("heads",),
    ("encoder", "connector", "decoder"),
    ("encoder", "connector", "heads"),
    ("encoder", "decoder", "heads"),
    ("connector", "decoder", "heads"),
)
OTHER = pytest.mark.slow(reason="frozen at the other layout, and others than it at this one")
LAYOUTS = (Layout(tp=2, pp=2, sp=True), Layout(pp=2, vpp_layers=1, dp=2))
# Features are taken before the encoder's last layer; without rotary positions its keys' biases have no gradient.
WITHOUT_GRADIENT = ("encoder.model.encoder.layers.1", "encoder.model.post_layernorm", "encoder.model.head")


def run(layout, config):
    """Job: one step; the gradients before clipping, and the weights before and after."""
    trainer = make_trainer(config)
    before, gradients = student_shards(trainer), []
    prepare = trainer.optimizer.prepare_grads

    def note_and_prepare():
        gradients.extend(gradient_shards(trainer))
        return prepare()

    trainer.optimizer.prepare_grads = note_and_prepare
    train_step(trainer)
    return before, gradients, student_shards(trainer)


def launch(pool, assets, layout, frozen):
    config = make_config(
        assets, "unused", layout, load=f"hf:{assets.untied}", freeze=frozen, micro_batch_size=2, clip_grad=0.0
    )
    results = pool.run(run, layout, config)
    return [whole_tensors([result[i] for result in results], rtol=1e-5) for i in range(3)]


@pytest.fixture(scope="module")
def unfrozen(pool, assets):
    """Gradients of one process in which everything trains."""
    return launch(pool, assets, Layout(), ())[1]


@pytest.mark.parametrize(
    "frozen, layout",
    [
        *((frozen, LAYOUTS[0]) for frozen in FROZEN),
        *((frozen, LAYOUTS[1]) for frozen in FROZEN[4:6]),
        *(pytest.param(frozen, LAYOUTS[1], marks=OTHER) for frozen in (*FROZEN[:4], *FROZEN[6:])),
    ],
    ids=lambda value: str(value) if isinstance(value, Layout) else "-".join(value),
)
def test_frozen_modules_and_no_others_stand_still(pool, assets, unfrozen, frozen, layout):
    before, gradients, after = launch(pool, assets, layout, frozen)
    prefixes = tuple(prefix for module in frozen for prefix in MODULES[module])
    assert before.keys() == unfrozen.keys() and any(not key.startswith(prefixes) for key in before)
    for key, gradient in gradients.items():
        if key.startswith(prefixes):
            assert not gradient.any() and torch.equal(before[key], after[key]), key
        elif not key.startswith(WITHOUT_GRADIENT) and not (key.startswith("encoder.") and "k_proj.bias" in key):
            # Other orders of summation in fp32; the band of test_layout_invariance.
            assert relative_distance(gradient, unfrozen[key]) <= 1e-5, key
            assert gradient.any() and not torch.equal(before[key], after[key]), key
