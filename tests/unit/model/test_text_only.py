"""A stage without an image encoder: the same language model, no part for images, and none accepted."""

import pytest
import torch

from laver_megatron.config.fields import Config
from laver_megatron.hf.shape import ModelShape
from laver_megatron.model.build import build_stages
from laver_megatron.model.heads import seeded_normal
from laver_megatron.model.streams import StreamSettings, build_micro_batch
from tests.packs import pack, padding

pytestmark = pytest.mark.usefixtures("single_process")

SEQ_LENGTH = 24
SHAPE = ModelShape(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, kv_channels=8,
    vocab_size=128, rms_norm_eps=1e-6, rope_theta=1e4, tie_word_embeddings=True, max_position_embeddings=64,
)  # fmt: skip
CONFIG = Config.of(
    data_path=(), run_dir="", train_iters=1, seq_length=SEQ_LENGTH, visual_seq_length=8, attention_kernel="dense",
    laver=False,
)  # fmt: skip


def build(encoder_dir=None):
    """A stage whose weights depend on their names alone."""
    (stage,) = build_stages(CONFIG, SHAPE, encoder_dir)
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            std = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 1.0
            parameter.copy_(seeded_normal(name, tuple(parameter.shape), std, 1))
    return stage


def run(stage, packs, pixels=None):
    device = torch.device(torch.cuda.current_device())
    masked_BS = torch.zeros_like(packs.image_BS, dtype=torch.bool)
    batch = build_micro_batch(packs, masked_BS, StreamSettings.of(CONFIG, SHAPE), device, all_logits=True)
    return stage(batch, pixels).language_logits_RW


@pytest.fixture(scope="module")
def encoder_dir(tmp_path_factory):
    from laver_megatron.demo.encoders import save_encoder

    directory = tmp_path_factory.mktemp("encoder")
    save_encoder(directory)
    return directory


def test_it_has_no_part_for_images(encoder_dir):
    text_only = {name for name, _ in build().named_parameters()}
    images = {name for name, _ in build(encoder_dir).named_parameters() if name.startswith(("encoder.", "connector."))}
    assert text_only and images
    assert not any(name.startswith(("encoder.", "connector.", "mask_token", "vision_head.")) for name in text_only)


def test_text_is_computed_as_with_an_encoder(encoder_dir):
    packs = pack([9], padding(2), [10], seq_length=SEQ_LENGTH)
    logits = run(build(), packs)
    # Two models' weights need not lie alike in memory: fp32 rounding of a few layers.
    torch.testing.assert_close(logits, run(build(encoder_dir), packs), atol=1e-5, rtol=1e-5)
    assert logits.std() > 0.1


def test_it_trains_and_is_initialised_without_images():
    stage = build().train()
    stage.initialise_new_parts(1)
    run(stage, pack([SEQ_LENGTH])).square().mean().backward()
    gradients = [parameter.grad for parameter in stage.parameters()]
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("with_pixels", [True, False])
def test_images_are_refused(with_pixels):
    pixels = [torch.zeros(3, 64, 64)] if with_pixels else None
    with pytest.raises(ValueError, match="no image encoder, but the micro-batch holds 1 images"):
        run(build(), pack([3, (2, 2), 4], seq_length=SEQ_LENGTH), pixels)


def test_pixels_without_a_place_are_refused():
    with pytest.raises(ValueError, match="holds 1 images"):
        run(build(), pack([SEQ_LENGTH]), [torch.zeros(3, 64, 64)])
