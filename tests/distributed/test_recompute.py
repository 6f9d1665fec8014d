"""Activation recompute changes memory and time, not a number: losses, gradient norms and weights after three
steps are those without it to the last bit, also where the input of the first layers needs no gradient.
"""

from collections import Counter
from unittest import mock

import pytest

from laver_megatron.model import build
from laver_megatron.objective.micro_batch import TERMS
from laver_megatron.train import train_step
from tests.distributed.build import PACKS_PER_STEP, make_config, make_trainer, student_shards, whole_tensors
from tests.distributed.harness import Layout

NUM_STEPS, NUM_LAYERS, PACKS_PER_MICRO_BATCH = 2, 4, 2
INPUTS = ("encoder.", "connector.", "embedding.", "mask_token")
ALL_BUT_CONNECTOR = ("encoder.", "embedding.", "decoder.", "output_layer.", "vision_head.", "mask_token")
# What is frozen: (the configuration's words for it, prefixes of the weights that stay as they are). With
# `all but connector`, micro-batches without an image have nothing to train at all, neither below nor in the
# decoder.
FROZEN = {
    "nothing": ((), ()),
    "inputs": (("encoder", "connector"), INPUTS),
    "all but connector": (("encoder", "decoder", "heads"), ALL_BUT_CONNECTOR),
}
PART = pytest.mark.slow(reason="the same is frozen at TP2 x PP2, or in one process")
CASES = [
    (Layout(), "nothing"),
    (Layout(), "inputs"),
    (Layout(), "all but connector"),
    pytest.param(Layout(pp=2), "nothing", marks=PART),
    pytest.param(Layout(pp=2), "inputs", marks=PART),
    pytest.param(Layout(pp=2), "all but connector", marks=PART),
    (Layout(tp=2, sp=True), "nothing"),
    pytest.param(Layout(tp=2, sp=True), "inputs", marks=PART),
    (Layout(tp=2, pp=2, sp=True), "inputs"),
    (Layout(tp=2, pp=2, sp=True), "all but connector"),
    (Layout(pp=2, vpp_layers=1), "all but connector"),
]
freeze_parts = build.freeze


def freeze_inputs(stage, parts):
    """Also embedding and [MASK], which the configuration freezes only with the decoder or the heads: then the
    input of the first layers, which train, needs no gradient."""
    freeze_parts(stage, parts)
    for name, parameter in stage.named_parameters():
        if name.startswith(INPUTS):
            parameter.requires_grad_(False)


def run(layout, config, frozen):
    """Job: two steps; their numbers, the weights before and after, and how often which modules ran."""
    with mock.patch.object(build, "freeze", freeze_inputs if frozen == "inputs" else freeze_parts):
        trainer = make_trainer(config)
    calls = Counter()
    for stage in trainer.stages:
        for owner, decoder in (("student", stage.decoder), ("teacher", stage.teacher.decoder)):
            for layer in decoder.layers:
                for name, module in (("attention", layer.self_attention.core_attention), ("mlp", layer.mlp)):
                    module.register_forward_hook(lambda *_, key=f"{owner} {name}": calls.update([key]))
    before = student_shards(trainer)
    records = [train_step(trainer) for _ in range(NUM_STEPS)]
    records = [{name: record[name] for name in (*TERMS, "grad_norm")} for record in records]
    return {"records": records, "before": before, "after": student_shards(trainer), "calls": calls}


@pytest.mark.parametrize("layout, frozen", CASES, ids=str)
def test_recompute_gives_the_same_numbers(pool, assets, layout, frozen):
    parts, unmoved = FROZEN[frozen]

    def launch(granularity):
        config = make_config(
            assets, "unused", layout, load=f"hf:{assets.untied}", freeze=parts, micro_batch_size=PACKS_PER_MICRO_BATCH,
            recompute_granularity=granularity,
        )  # fmt: skip
        return pool.run(run, layout, config, frozen)

    plain = launch(None)
    weights = whole_tensors([result["after"] for result in plain])
    assert_trained(plain, unmoved)
    for granularity in ("full", "selective"):
        results = launch(granularity)
        assert [result["records"] for result in results] == [result["records"] for result in plain]
        for key, weight in whole_tensors([result["after"] for result in results]).items():
            assert weight.equal(weights[key]), f"{key} with {granularity} recompute"
        assert_recomputed(results, layout, granularity)


def assert_trained(results, unmoved):
    """All weights have moved but the frozen ones: gradients came through every layer."""
    before, after = (whole_tensors([result[when] for result in results]) for when in ("before", "after"))
    # Features are taken before the encoder's last layer.
    above = ("encoder.model.encoder.layers.1", "encoder.model.post_layernorm", "encoder.model.head")
    for key, start in before.items():
        is_still = key.startswith((*unmoved, *above))
        assert start.equal(after[key]) == is_still, f"{key} {'moved' if is_still else 'did not move'}"


def assert_recomputed(results, layout, granularity):
    """The student's attention ran twice, its MLP with full recompute only; the teacher's ran once."""
    calls = sum((result["calls"] for result in results), Counter())
    once = NUM_STEPS * PACKS_PER_STEP // PACKS_PER_MICRO_BATCH * NUM_LAYERS * layout.tp
    assert calls == {
        "student attention": 2 * once,
        "student mlp": 2 * once if granularity == "full" else once,
        "teacher attention": once,
        "teacher mlp": once,
    }
