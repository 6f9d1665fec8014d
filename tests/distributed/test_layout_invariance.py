"""The same global batch gives the same numbers for every division of the work.

Five steps of eight packs in fp32, fixed masks (three of nine tokens of every image), centre on, the teacher
moving at every step; everything trains, the encoder included. Other orders of summation are all that
differs: fp32 sums agree to some 1e-7, and the bands below are the project's promise.
"""

from pathlib import Path

import pytest
import torch

from laver_megatron.losses import TERMS
from laver_megatron.train import train_step
from tests.distributed.build import (
    gradient_shards,
    make_config,
    make_trainer,
    relative_distance,
    teacher_shards,
    whole_tensors,
)
from tests.distributed.harness import Layout

NUM_STEPS = 5
NUMBERS = (*TERMS, "grad_norm", "num_masked_tokens", "num_tokens", "num_samples")
# (layout, packs of a micro-batch)
DIVISIONS = (
    (Layout(), 4),
    (Layout(tp=2), 1),
    (Layout(pp=2), 1),
    (Layout(pp=2), 2),
    (Layout(tp=2, pp=2, sp=True), 1),
    (Layout(pp=2, vpp_layers=1), 1),
    (Layout(dp=2), 2),
    (Layout(tp=2, dp=2), 1),
    (Layout(tp=2, dp=2, sp=True), 2),
    (Layout(pp=2, dp=2), 1),
    (Layout(tp=4), 2),
    (Layout(pp=4), 1),
)


def run(layout, config):
    """Job: five steps; the numbers of each, the first gradient, the teacher before and after, the centre."""
    trainer = make_trainer(config)
    result = {"teacher_before": teacher_shards(trainer), "records": []}
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
    result["teacher"] = teacher_shards(trainer)
    result["centre"] = None if trainer.centre is None else trainer.centre.value_K.clone()
    return result


def launch(pool, assets, layout, micro_batch_size, weights):
    config = make_config(
        assets, Path("unused"), layout, micro_batch_size=micro_batch_size, freeze=(), load=f"hf:{weights}"
    )  # fmt: skip
    results = pool.run(run, layout, config)
    for result in results[1:]:
        assert result["records"] == results[0]["records"], "ranks report different numbers"
    return results


def whole_centre(results, layout):
    last_stage = [result["centre"] for result in results if result["centre"] is not None]
    return torch.cat(last_stage[: layout.tp])


@pytest.fixture(scope="module", params=["tied", "untied"])
def reference(request, pool, assets):
    """(which weights, the results of one process that takes the packs one by one)."""
    weights = getattr(assets, request.param)
    return weights, launch(pool, assets, Layout(), 1, weights)


@pytest.mark.parametrize("layout, micro_batch_size", DIVISIONS, ids=lambda value: str(value))
def test_layouts_agree(pool, assets, reference, layout, micro_batch_size):
    weights, expected = reference
    results = launch(pool, assets, layout, micro_batch_size, weights)

    for step, (record, wanted) in enumerate(zip(results[0]["records"], expected[0]["records"], strict=True)):
        for name in NUMBERS:
            assert record[name] == pytest.approx(wanted[name], rel=1e-5), f"{name} at step {step}"

    gradients = whole_tensors([result["gradients"] for result in results], rtol=1e-5)
    wanted_gradients = whole_tensors([result["gradients"] for result in expected])
    assert gradients.keys() == wanted_gradients.keys()
    # The encoder's key biases do not move its softmax: their gradient is 0 but for rounding, a part in 1e7
    # of the others'. What lies below a millionth of the norm is held to 1e-5 of that.
    floor = 1e-6 * expected[0]["records"][0]["grad_norm"]
    distances = {
        key: relative_distance(gradient, wanted_gradients[key], floor) for key, gradient in gradients.items()
    }
    assert max(distances.values()) <= 1e-5, sorted(distances.items(), key=lambda item: -item[1])[:5]

    for key, before in whole_tensors([result["teacher_before"] for result in results]).items():
        moved = whole_tensors([result["teacher"] for result in results], rtol=1e-5)[key] - before
        wanted = whole_tensors([result["teacher"] for result in expected])[key] - before
        assert relative_distance(moved, wanted) <= 1e-3, key
        assert wanted.norm() > 0, f"the teacher's {key} has not moved"

    torch.testing.assert_close(
        whole_centre(results, layout), whole_centre(expected, Layout()), rtol=1e-4, atol=1e-6
    )


def test_the_reference_is_a_real_run(reference):
    """Images, masks, all terms and differing packs are there: the comparison above compares something."""
    _, expected = reference
    records = expected[0]["records"]
    for name in ("lm_loss", "mim_loss", "gram_loss", "grad_norm", "teacher_entropy"):
        values = [record[name] for record in records]
        assert len({round(value, 6) for value in values}) == NUM_STEPS, (name, values)
    assert all(record["num_masked_tokens"] >= 3 * 7 for record in records)
    gradients = whole_tensors([result["gradients"] for result in expected])
    no_gradient = sorted(key for key, gradient in gradients.items() if not gradient.any())
    # Features are taken before the encoder's last layer.
    assert all(key.startswith(("encoder.model.encoder.layers.1", "encoder.model.post", "encoder.model.head"))
               for key in no_gradient), no_gradient  # fmt: skip
