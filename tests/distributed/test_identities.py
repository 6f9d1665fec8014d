"""What must hold exactly, whatever the weights: identities of the objective in the running trainer."""

import pytest
import torch

from laver_megatron.train import run_schedule, train_step
from tests.distributed.build import (
    GRID,
    make_config,
    make_trainer,
    relative_distance,
    snapshot,
    student_shards,
    whole_tensors,
)
from tests.distributed.harness import Layout

ALL_FOUR = Layout(tp=2, pp=2, sp=True)
NUM_TOKENS = GRID * GRID


def train_steps(layout, config, num_steps):
    """Job: the records of some steps and the student after them."""
    trainer = make_trainer(config)
    return [train_step(trainer) for _ in range(num_steps)], student_shards(trainer)


@pytest.mark.parametrize("layout", [Layout(), ALL_FOUR], ids=str)
def test_without_masks_a_fresh_teacher_is_the_student(pool, assets, tmp_path, layout):
    config = make_config(assets, tmp_path, layout, mask_ratio=0.0, gram_loss="ga")
    (record,), _ = pool.run(train_steps, layout, config, 1)[0]
    assert record["num_masked_tokens"] == 0 and record["mim_loss"] == 0.0
    # Cosines of the two passes differ by some 1e-7; their mean square is what remains.
    assert 0 <= record["gram_loss"] < 1e-11
    assert record["student_visual_similarity"] == pytest.approx(record["teacher_visual_similarity"], abs=1e-6)
    assert record["loss"] == pytest.approx(record["lm_loss"], abs=1e-9)


@pytest.mark.parametrize("layout", [Layout(), ALL_FOUR], ids=str)
def test_weights_of_zero_follow_the_run_without_laver(pool, assets, tmp_path, layout):
    with_zeros, without = (
        pool.run(train_steps, layout, make_config(assets, tmp_path, layout, freeze=(), weight_decay=0.1, **settings), 4)
        for settings in ({"mim_weight": 0.0, "gram_weight": 0.0}, {"laver": False})
    )
    for record, wanted in zip(with_zeros[0][0], without[0][0], strict=True):
        for name in ("loss", "lm_loss", "grad_norm"):
            # Without the visual stream products have fewer rows, and sums another order; Adam carries that from step
            # to step, as between layouts.
            assert record[name] == pytest.approx(wanted[name], rel=1e-5), (name, record["iteration"])
        assert record["mim_loss"] > 0 and wanted["mim_loss"] is None
    student, wanted = (whole_tensors([shards for _, shards in results]) for results in (with_zeros, without))
    assert student.keys() - wanted.keys() == {key for key in student if key.startswith(("vision_head.", "mask_token"))}
    for key, tensor in wanted.items():
        # The encoder's key biases have gradients of rounding alone, which Adam makes large.
        assert "k_proj.bias" in key or relative_distance(student[key], tensor) <= 1e-5, key


def test_answers_do_not_reach_the_reconstruction(pool, assets, tmp_path):
    """The reconstruction stream holds no text: another text leaves it as it was, to the last bit."""
    (record,), _ = pool.run(train_steps, Layout(), make_config(assets, tmp_path), 1)[0]
    config = make_config(assets, tmp_path, data_path=("other-answers",))
    (other,), _ = pool.run(train_steps, Layout(), config, 1)[0]
    assert other["lm_loss"] != pytest.approx(record["lm_loss"], rel=1e-3)
    for name in ("mim_loss", "gram_loss", "student_visual_similarity", "teacher_visual_similarity", "teacher_entropy"):
        assert other[name] == record[name], name


def visual_logits(layout, config):
    """Job: student's and teacher's logits of the first pack, [T, K] each."""
    trainer = make_trainer(config)
    stage, logits = trainer.stages[-1], {}

    def keep_first(name):
        def hook(module, args, output):
            logits.setdefault(name, output[: 3 * NUM_TOKENS].detach().clone())

        return hook

    stage.vision_head.register_forward_hook(keep_first("student"))
    stage.teacher.vision_head.register_forward_hook(keep_first("teacher"))
    run_schedule(trainer, trainer.training_data.at(0, mask_ratio=0.4, step=0), forward_only=True)
    return logits


def test_images_do_not_see_one_another(pool, assets, tmp_path):
    """Three images in two documents of a pack: another second one changes its own logits alone."""
    logits, other = (
        pool.run(visual_logits, Layout(), make_config(assets, tmp_path, data_path=(kind,)))[0]
        for kind in ("packs", "other-image")
    )
    for name in ("student", "teacher"):
        of_images = logits[name].split(NUM_TOKENS), other[name].split(NUM_TOKENS)
        same = [torch.equal(image, changed) for image, changed in zip(*of_images, strict=True)]
        assert same == [True, False, True], name


def parts_of_a_trainer(layout, config):
    """Job: what there is of LaVer."""
    trainer = make_trainer(config)
    names = [name for stage in trainer.stages for name, _ in stage.named_parameters()]
    for_laver = [name for name in names if name.startswith(("teacher.", "vision_head.", "mask_token"))]
    train_step(trainer)
    return trainer.teacher, trainer.centre, for_laver, [name for name in snapshot(trainer) if "accumulator" in name]


@pytest.mark.parametrize("layout", [Layout(), ALL_FOUR], ids=str)
def test_without_laver_nothing_of_it_is_allocated(pool, assets, tmp_path, layout):
    config = make_config(assets, tmp_path, layout, laver=False)
    for parts in pool.run(parts_of_a_trainer, layout, config):
        assert parts == (None, None, [], [])
