"""The curve that validation measures is that of the export, at every division of the model; so are the visual logits.

Training and transformers compute the same in fp32 with sums in another order: cosines, at most 1 in size, then differ
by some 1e-6. 1e-5 is the promise of layout invariance.
"""

from functools import cache
from pathlib import Path

import pytest
import torch

from laver_megatron import train
from laver_megatron.checkpoint.directory import latest_checkpoint
from laver_megatron.inspection.model import InspectedModel, SeenImage
from laver_megatron.inspection.reconstruction import Reconstruction
from laver_megatron.inspection.sources import exported, find_sources
from laver_megatron.objective.similarity import mean_pairwise_cosine
from laver_megatron.run_log.run_summary import VISUAL_SIMILARITY
from tests.distributed.build import (
    GRID,
    IMAGE_TOKEN,
    ONE_PROCESS,
    PACKS_PER_STEP,
    SyntheticReader,
    make_config,
    make_trainer,
)
from tests.distributed.harness import Layout
from tests.parity import model_outputs

TOLERANCE = 1e-5
FOUR = Layout(tp=2, pp=2, sp=True)
SETTINGS = {"valid_data_path": ("packs",), "eval_interval": 1, "eval_iters": 2, "inspect_interval": 1}


def reader() -> SyntheticReader:
    return SyntheticReader("packs")


def inspect_and_save(layout, config):
    """Job: a step; the validation with the curve and without; visual logits without [MASK]; a checkpoint."""
    trainer = make_trainer(config)
    train.train_step(trainer)
    results = train.inspect(trainer), train.evaluate(trainer)
    num_hooks = sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for stage in trainer.stages
        for module in (stage, *stage.decoder.layers)
    )
    train.save(trainer)
    packs = reader().read(0, PACKS_PER_STEP, 2)
    outputs = None
    if layout in (ONE_PROCESS, FOUR):
        outputs = model_outputs(trainer.stages, [(it, torch.zeros_like(it.image_BS, dtype=torch.bool)) for it in packs])
    return results, num_hooks, outputs


@pytest.fixture(scope="module")
def inspected(pool, files, tmp_path_factory):
    """By layout: what all ranks found, and the run directory."""
    directory = tmp_path_factory.mktemp("inspected")

    @cache
    def run(layout: Layout) -> tuple[list, Path]:
        run_dir = directory / str(layout)
        return pool.run(inspect_and_save, layout, make_config(files, run_dir, layout, **SETTINGS)), run_dir

    return run


def curve_of(results) -> torch.Tensor:
    curves = [with_curve[VISUAL_SIMILARITY] for (with_curve, _), _, _ in results]
    assert all(curve == curves[0] for curve in curves), "the same on all ranks"
    return torch.tensor(curves[0])


@pytest.mark.parametrize("layout", [FOUR, Layout(pp=2, vpp_layers=1), Layout(tp=2, sp=True, dp=2)], ids=str)
def test_the_curve_is_that_of_one_process(inspected, layout):
    found, expected = (curve_of(inspected(it)[0]) for it in (layout, ONE_PROCESS))
    assert expected.shape == (4,) and expected.diff().abs().min() > 100 * TOLERANCE, "layers differ"
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("layout", [ONE_PROCESS, FOUR], ids=str)
@torch.no_grad()
def test_the_curve_and_the_visual_logits_are_those_of_the_export(inspected, layout):
    results, run_dir = inspected(layout)
    (source,) = find_sources([run_dir])
    assert (source.step, source.mask_ratio) == (1, 0.4)
    assert source.directory == latest_checkpoint(run_dir / "checkpoints")
    with exported(source) as directory:
        model = InspectedModel(directory, source.model_type, "cpu", "float32")
        whole, masked = Reconstruction(model, directory, 0.0), Reconstruction(model, directory, 1.0)
        cosines, logits = [], []
        for number in range(SETTINGS["eval_iters"] * PACKS_PER_STEP):
            for sample in reader()._pack(number):
                if not sample.pixels:
                    continue
                inputs = {
                    "input_ids": sample.encoded.tokens_T[None],
                    **model.model.image_inputs(sample.pixels),
                }
                seen = model.observe(inputs, len(sample.encoded.tokens_T) - 2)
                cosines += [[mean_pairwise_cosine(it[own.places_N]) for it in seen.hidden] for own in seen.images]
                if number < PACKS_PER_STEP:
                    first_NH = [seen.hidden[0][own.places_N] for own in seen.images]
                    logits += [whole.logits(own, it, 0) for own, it in zip(first_NH, seen.images, strict=True)]
        image = SeenImage((GRID, GRID), torch.arange(GRID**2))
        hidden_student, hidden_teacher = masked.logits(first_of(model), image, 0)
        other_student, other_teacher = masked.logits(-first_of(model), image, 0)
    assert model.model.config.image_token_id == IMAGE_TOKEN
    expected = torch.tensor(cosines).mean(0)[1:]  # without the decoder's input
    torch.testing.assert_close(curve_of(results), expected, rtol=0, atol=TOLERANCE)

    outputs = next(output for _, _, output in results if output is not None)
    for ours, theirs in zip(
        zip(*logits, strict=True), (outputs.student_logits_NK, outputs.teacher_logits_NK), strict=True
    ):
        assert theirs.std() > 0.1, "too small for the tolerance to mean anything"
        torch.testing.assert_close(torch.cat(ours), theirs, rtol=0, atol=1e-4)  # as in test_conversion.py
    torch.testing.assert_close(hidden_student, other_student)  # [MASK] alone
    assert (hidden_teacher - other_teacher).abs().max() > 0.01


def first_of(model: InspectedModel) -> torch.Tensor:
    """Some visual tokens."""
    width = model.model.config.text_config.hidden_size
    return torch.randn(GRID**2, width, generator=torch.Generator().manual_seed(3))


def test_validation_is_the_same_with_and_without_and_leaves_no_hook(inspected):
    for layout in (ONE_PROCESS, FOUR):
        for (with_curve, without), num_hooks, _ in inspected(layout)[0]:
            names = with_curve.keys() - {VISUAL_SIMILARITY, "elapsed_seconds"}
            assert {name: with_curve[name] for name in names} == {name: without[name] for name in names}
            assert VISUAL_SIMILARITY not in without and num_hooks == 0
