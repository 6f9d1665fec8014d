"""The stage module: who may influence whom, what it refuses, and that nothing is left unwritten."""

import dataclasses

import pytest
import torch

from laver_megatron.model.streams import StreamSettings, build_micro_batch
from tests.packs import pack, padding, stack
from tests.parity import (
    IMAGE_SIZE,
    SEQ_LENGTH,
    build_model,
    parity_config,
    write_checkpoints,
)

pytestmark = pytest.mark.usefixtures("single_process")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return write_checkpoints(tmp_path_factory.mktemp("checkpoints"), tied=True, num_layers=2)


@pytest.fixture(scope="module")
def stage(single_process, checkpoints):
    (stage,) = build_model(parity_config(checkpoints), checkpoints)
    return stage


@pytest.mark.parametrize("is_frozen", [True, False])
def test_a_frozen_encoder_keeps_no_activations(stage, is_frozen):
    packs = two_packs()
    packs.pixels[0][:] = [image.to(torch.cuda.current_device()) for image in packs.pixels[0]]
    seen = []
    hook = stage.encoder.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    stage.encoder.requires_grad_(not is_frozen)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        features_tE = stage._encode(packs.pixels[0], [16, 16, 16])
    hook.remove()
    stage.encoder.requires_grad_(True)
    assert seen == [not is_frozen] and features_tE.requires_grad == (not is_frozen)
    assert (not kept) == is_frozen


def two_packs():
    """Two images of one document, one of another document in the same pack, and one in another pack."""
    common = {"seq_length": SEQ_LENGTH, "image_size": IMAGE_SIZE}
    return stack(
        pack([2, (4, 4), 2, (4, 4), 3], padding(1), [1, (2, 8), 1], **common), pack([4, (4, 4), 9], **common, seed=1)
    )


def run(stage, packs, masked_BS=None):
    """(language logits, student and teacher logits of each image) of a micro-batch."""
    if masked_BS is None:
        drawn_BS = torch.rand(packs.image_BS.shape, generator=torch.Generator().manual_seed(1)) < 0.4
        masked_BS = drawn_BS & (packs.image_BS >= 0)
    device = torch.device(torch.cuda.current_device())
    settings = StreamSettings.of(stage.run_config, stage.shape)
    batch = build_micro_batch(packs, masked_BS, settings, device, all_logits=True)
    with torch.no_grad():
        output = stage(batch, [image.to(device) for images in packs.pixels for image in images])
    return (
        output.language_logits_RW.unflatten(0, (-1, len(packs.tokens_BS))).transpose(0, 1),
        output.student_logits_TK.split(batch.image_num_tokens),
        output.teacher_logits_TK.split(batch.image_num_tokens),
    )


@pytest.mark.parametrize("swapped", [0, 1, 2, 3])
def test_swapping_one_image_leaves_the_others_outputs(stage, swapped):
    packs = two_packs()
    pixels = [list(images) for images in packs.pixels]
    pack_index, image = [(0, 0), (0, 1), (0, 2), (1, 0)][swapped]
    pixels[pack_index][image] = torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(9))
    _, student, teacher = run(stage, packs)
    _, student_after, teacher_after = run(stage, dataclasses.replace(packs, pixels=pixels))
    for number in range(4):
        for before, after in ((student[number], student_after[number]), (teacher[number], teacher_after[number])):
            if number == swapped:
                assert (before - after).abs().max() > 1e-2
            else:
                assert torch.equal(before, after), f"image {number} changed with image {swapped}"


def test_changing_text_leaves_the_visual_outputs(stage):
    packs = two_packs()
    text_BS = packs.image_BS < 0
    changed = dataclasses.replace(packs, tokens_BS=torch.where(text_BS, (packs.tokens_BS + 1) % 128, packs.tokens_BS))
    before, after = run(stage, packs), run(stage, changed)
    assert (before[0] - after[0])[text_BS].abs().max() > 1e-2
    for number in range(4):
        assert torch.equal(before[1][number], after[1][number])
        assert torch.equal(before[2][number], after[2][number])


def test_tokens_under_an_image_are_never_read(stage):
    packs = two_packs()
    changed = torch.where(packs.image_BS >= 0, (packs.tokens_BS + 1) % 128, packs.tokens_BS)
    before, after = run(stage, packs), run(stage, dataclasses.replace(packs, tokens_BS=changed))
    assert torch.equal(before[0], after[0])


def test_masks_reach_the_students_visual_logits_alone(stage):
    """The language stream and the teacher see the image whole."""
    packs = two_packs()
    none = run(stage, packs, torch.zeros_like(packs.image_BS, dtype=torch.bool))
    one_masked = torch.zeros_like(packs.image_BS, dtype=torch.bool)
    one_masked[0, 3] = True
    one = run(stage, packs, one_masked)
    assert torch.equal(none[0], one[0])
    for number in range(4):
        assert torch.equal(none[2][number], one[2][number])
        changed = (none[1][number] - one[1][number]).abs().amax(-1)
        # Attention carries one masked token to every token of its image.
        assert (changed > 1e-4).all() if number == 0 else (changed == 0).all()


def test_nothing_masked_and_a_fresh_teacher_agree(stage):
    _, student, teacher = run(stage, two_packs(), torch.zeros(2, SEQ_LENGTH, dtype=torch.bool))
    for one, other in zip(student, teacher, strict=True):
        # The same weights and input; the student's part is computed in a longer sequence.
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_images_and_places_must_match(stage):
    packs = two_packs()
    device = torch.device(torch.cuda.current_device())
    masked_BS = torch.zeros_like(packs.image_BS, dtype=torch.bool)
    batch = build_micro_batch(packs, masked_BS, StreamSettings.of(stage.run_config, stage.shape), device)
    pixels = [image.to(device) for images in packs.pixels for image in images]
    with pytest.raises(ValueError, match="got 3 images for 4 places"):
        stage(batch, pixels[:3])
    wrong = pack([(3, 4), 2], seq_length=SEQ_LENGTH)
    batch = build_micro_batch(wrong, masked_BS[:1], StreamSettings.of(stage.run_config, stage.shape), device)
    with pytest.raises(ValueError, match="16 visual tokens for 1 images, but the text holds 12"):
        stage(batch, pixels[:1])


def test_no_weight_is_left_unwritten(stage):
    for name, tensor in [*stage.named_parameters(), *stage.named_buffers()]:
        assert tensor.isfinite().all(), name


def test_new_parts_do_not_depend_on_what_was_drawn_before(checkpoints, stage):
    torch.manual_seed(12345)
    (other,) = build_model(parity_config(checkpoints), checkpoints)
    for (name, one), (_, two) in zip(stage.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(one, two), name
    (reseeded,) = build_model(parity_config(checkpoints, seed=8), checkpoints)
    changed = {
        name for (name, one), (_, two) in zip(stage.named_parameters(), reseeded.named_parameters(), strict=True)
        if not torch.equal(one, two)
    }  # fmt: skip
    weights = {f"linear_{i}.weight" for i in (1, 2, 3)}
    assert changed == {
        "mask_token", "connector.linear_1.weight", "connector.linear_2.weight",
        *(f"{prefix}vision_head.{name}" for prefix in ("", "teacher.") for name in weights),
    }  # fmt: skip


def test_without_laver_there_is_no_teacher_to_pay_for(checkpoints):
    (stage,) = build_model(parity_config(checkpoints, laver=False), checkpoints)
    assert stage.teacher is None
    assert not any(name.startswith(("teacher.", "vision_head.", "mask_token")) for name, _ in stage.named_parameters())


def test_the_teacher_never_trains(stage):
    stage.train()
    assert not stage.teacher.training and not any(m.training for m in stage.teacher.modules())
    assert not any(p.requires_grad for p in stage.teacher.parameters())
    stage.eval()


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_a_frozen_input_leaves_the_decoders_gradient(checkpoints, recompute):
    """With nothing trained before the first layer, recomputation must not lose the layers' gradients."""
    packs = two_packs()
    gradients = {}
    for granularity in (None, recompute):
        config = parity_config(
            checkpoints, laver=False, freeze=("encoder", "connector"), recompute_granularity=granularity
        )
        (stage,) = build_model(config, checkpoints)
        stage.embedding.requires_grad_(False)
        stage.train()
        device = torch.device(torch.cuda.current_device())
        masked_BS = torch.zeros_like(packs.image_BS, dtype=torch.bool)
        batch = build_micro_batch(packs, masked_BS, StreamSettings.of(config, stage.shape), device)
        output = stage(batch, [image.to(device) for images in packs.pixels for image in images])
        output.language_logits_RW.square().mean().backward()
        gradients[granularity] = stage.decoder.layers[0].self_attention.linear_qkv.weight.grad
    assert gradients[None].norm() > 1e-3
    torch.testing.assert_close(gradients[recompute], gradients[None], atol=1e-7, rtol=1e-5)
