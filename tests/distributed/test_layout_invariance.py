"""The same global batch gives the same numbers for every division of the work.

Five steps of eight packs in fp32, fixed masks (three of nine tokens of every image), centre on, the teacher
moving at every step; everything trains, the encoder included. Other orders of summation are all that
differs: they move sums by some 1e-7 and, after Adam, the teacher's displacement by some 1e-5. The bands
below are the project's promise.
"""

from pathlib import Path

import pytest
import torch

from laver_megatron.objective.micro_batch import TERMS
from laver_megatron.train import train_step
from tests.distributed.build import (
    gradient_shards,
    make_config,
    make_trainer,
    relative_distance,
    student_shards,
    teacher_shards,
    whole_tensors,
)
from tests.distributed.harness import Layout

NUM_STEPS = 3
NUMBERS = (*TERMS, "grad_norm", "num_masked_tokens", "num_tokens", "num_samples", "consumed_packs")
# (layout, packs of a micro-batch): what divides in several ways at once.
DIVISIONS = {
    # With LaVer, embedding and LM head tied.
    "tied": (
        (Layout(), 4),
        (Layout(tp=2, pp=2, sp=True), 1),
        (Layout(tp=2, dp=2, sp=True), 2),
        (Layout(pp=2, vpp_layers=1, dp=2), 2),
        (Layout(pp=3, first_layers=1, last_layers=1), 1),
        (Layout(tp=4), 2),
    ),
    "untied": (
        (Layout(tp=2, pp=2, sp=True), 2),
        (Layout(pp=2, vpp_layers=1), 2),
    ),
    # Without LaVer: beside the reconstruction's gradients, which are a hundred times larger, a mistake in
    # those of the language loss could hide.
    "no-laver": (
        (Layout(tp=2, pp=2, sp=True), 1),
        (Layout(tp=2, dp=2), 2),
    ),
    # Only the connector trains: the later stages have no parameter to train, its gradients cross them.
    "connector-only": (
        (Layout(tp=2, dp=2, sp=True), 1),
        (Layout(pp=2, dp=2, vpp_layers=1), 2),
        (Layout(pp=3, first_layers=1, last_layers=1), 1),
    ),
    # The same with an LM head of its own, the last stage's only weight beside layers.
    "connector-only-untied": ((Layout(tp=2, pp=2), 1),),
}
# What divides as the combinations above do, too.
OTHER_DIVISIONS = {
    "tied": (
        (Layout(tp=2, dp=2), 1),
        (Layout(dp=4), 2),
        (Layout(tp=2), 1),
        (Layout(pp=2), 2),
        (Layout(dp=2), 2),
        (Layout(pp=2, vpp_layers=1), 1),
        (Layout(pp=2, first_layers=1), 1),
    ),
    "untied": ((Layout(pp=2), 1), (Layout(tp=2, dp=2), 1), (Layout(pp=4), 1)),
    "no-laver": ((Layout(pp=2), 2), (Layout(pp=2, vpp_layers=1), 1)),
    "connector-only": ((Layout(pp=2), 1), (Layout(dp=2), 2), (Layout(tp=2, pp=2, sp=True), 2)),
    "connector-only-untied": ((Layout(pp=2, last_layers=1), 1),),
}
OTHER = pytest.mark.slow(reason="the combinations hold each of these divisions")
SETTINGS = {
    "tied": {"freeze": ()},
    "untied": {"freeze": ()},
    "no-laver": {"freeze": (), "laver": False},
    "connector-only": {"freeze": ("encoder", "decoder"), "laver": False},
    "connector-only-untied": {"freeze": ("encoder", "decoder"), "laver": False},
}


def run(layout, config):
    """Job: three steps; the numbers of each, the first gradient, the teacher before and after, the centre."""
    trainer = make_trainer(config)
    averaged = teacher_shards if config.objective.laver else student_shards
    result = {"before": averaged(trainer), "records": []}
    prepare, gradients = trainer.optimizer.prepare_grads, []

    def prepare_and_note():
        if not gradients:
            gradients.extend(gradient_shards(trainer))
        return prepare()

    trainer.optimizer.prepare_grads = prepare_and_note
    for _ in range(NUM_STEPS):
        record = train_step(trainer)
        result["records"].append({name: record[name] for name in NUMBERS})
    result["gradients"] = gradients
    result["after"] = averaged(trainer)
    result["centre"] = None if trainer.centre is None else trainer.centre.value_K.clone()
    return result


def launch(pool, assets, variant, layout, micro_batch_size):
    weights = assets.untied if variant.endswith("untied") else assets.tied
    config = make_config(
        assets, Path("unused"), layout, micro_batch_size=micro_batch_size, load=f"hf:{weights}", **SETTINGS[variant]
    )
    results = pool.run(run, layout, config)
    for result in results[1:]:
        assert result["records"] == results[0]["records"], "ranks report different numbers"
    return results


def whole_centre(results, layout):
    last_stage = [result["centre"] for result in results if result["centre"] is not None]
    return torch.cat(last_stage[: layout.tp]) if last_stage else None


@pytest.fixture(scope="module")
def reference(pool, assets):
    """Results of one process that takes the packs one by one, by variant."""
    results = {}

    def of(variant):
        if variant not in results:
            results[variant] = launch(pool, assets, variant, Layout(), 1)
        return results[variant]

    return of


@pytest.mark.parametrize(
    "variant, layout, micro_batch_size",
    [
        *((variant, *division) for variant, divisions in DIVISIONS.items() for division in divisions),
        *(
            pytest.param(variant, *division, marks=OTHER)
            for variant, divisions in OTHER_DIVISIONS.items()
            for division in divisions
        ),
    ],
    ids=lambda value: str(value),
)
def test_layouts_agree(pool, assets, reference, variant, layout, micro_batch_size):
    expected = reference(variant)
    results = launch(pool, assets, variant, layout, micro_batch_size)

    for step, (record, wanted) in enumerate(zip(results[0]["records"], expected[0]["records"], strict=True)):
        for name in NUMBERS:
            if wanted[name] is None:  # what LaVer's terms are without it
                assert record[name] is None, name
            else:
                assert record[name] == pytest.approx(wanted[name], rel=1e-5), f"{name} at step {step}"

    gradients = whole_tensors([result["gradients"] for result in results], rtol=1e-5)
    wanted_gradients = whole_tensors([result["gradients"] for result in expected])
    assert gradients.keys() == wanted_gradients.keys()
    grad_norm = expected[0]["records"][0]["grad_norm"]
    for key, gradient in gradients.items():
        if key.startswith("encoder.") and key.endswith("k_proj.bias"):
            # Without rotary positions a key's bias does not move the softmax: its gradient is rounding alone.
            assert gradient.norm() <= 1e-7 * grad_norm, key
        else:
            assert relative_distance(gradient, wanted_gradients[key]) <= 1e-5, key

    # The teacher's path, or without LaVer the student's. Copies of a teacher's tensor may differ by rounding.
    before, after = (whole_tensors([r[when] for r in results], rtol=1e-5) for when in ("before", "after"))
    wanted_after = whole_tensors([result["after"] for result in expected])
    for key, start in whole_tensors([result["before"] for result in expected]).items():
        assert torch.equal(before[key], start), f"{key} starts elsewhere"
        if is_compared(key, variant):
            assert relative_distance(after[key] - start, wanted_after[key] - start) <= 1e-3, key
            assert not torch.equal(wanted_after[key], start), f"{key} has not moved"

    centre, wanted_centre = whole_centre(results, layout), whole_centre(expected, Layout())
    if wanted_centre is not None:
        assert relative_distance(centre, wanted_centre) <= 1e-5


def is_compared(key, variant):
    """Not what is frozen; nor the encoder, of which a part has no gradient but rounding."""
    return not key.startswith("encoder.") and (not variant.startswith("connector-only") or key.startswith("connector."))


def test_the_reference_is_a_real_run(reference):
    """Images, masks, all terms and differing packs are there: the comparison above compares something."""
    expected = reference("tied")
    records = expected[0]["records"]
    for name in ("lm_loss", "mim_loss", "gram_loss", "grad_norm", "teacher_entropy"):
        values = [record[name] for record in records]
        assert len({round(value, 6) for value in values}) == NUM_STEPS, (name, values)
    assert {record["num_masked_tokens"] for record in records} == {3 * 7, 3 * 10}
    gradients = whole_tensors([result["gradients"] for result in expected])
    without = [key for key, gradient in gradients.items() if not gradient.any()]
    # Features are taken before the encoder's last layer.
    above = ("encoder.model.encoder.layers.1", "encoder.model.post_layernorm", "encoder.model.head")
    assert without and all(key.startswith(above) for key in without), without
