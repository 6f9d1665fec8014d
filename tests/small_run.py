"""One small model with everything in it, and a micro-batch of full packs, for tests that measure what a step takes."""

import json

import torch

from laver_megatron.config.fields import Config
from laver_megatron.data.batch.batches import GlobalCounts
from laver_megatron.encoders import read_encoder
from laver_megatron.hf.shape import ModelShape
from laver_megatron.model.build import build_stages
from laver_megatron.model.streams import StreamSettings, build_micro_batch
from laver_megatron.objective.micro_batch import micro_batch_losses
from laver_megatron.planning.workload import workload_of
from tests.packs import pack, stack

ENCODER = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 128,
    "patch_size": 8,
}
SIDE, SEQ_LENGTH = 16, 768
SHAPE = ModelShape(
    num_layers=3,
    hidden_size=128,
    ffn_hidden_size=320,
    num_attention_heads=8,
    num_query_groups=2,
    kv_channels=16,
    vocab_size=512,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    tie_word_embeddings=False,
    max_position_embeddings=4096,
)


def write_encoder(directory):
    (directory / "config.json").write_text(json.dumps(ENCODER))
    return directory


def settings(num_images, **changes):
    defaults = {"data_path": ("none",), "train_iters": 1, "run_dir": "none", "vision_head_hidden_size": 64}
    lengths = {"seq_length": SEQ_LENGTH, "visual_seq_length": max(num_images, 1) * SIDE**2, "mask_ratio": 0.3}
    return Config.of(**{**defaults, **lengths, "mask_sampling": "fixed", **changes})


def workload(num_images, encoder_dir):
    return workload_of(
        seq_length=SEQ_LENGTH,
        visual_share=num_images * SIDE**2 / SEQ_LENGTH,
        image_tokens=SIDE**2,
        num_documents=1,
        attention="mixed",
        encoder=read_encoder(encoder_dir),
    )


def build_stage(config, encoder_dir):
    """The one stage of a process of its own, in training."""
    (stage,) = build_stages(config, SHAPE, encoder_dir)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.normal_(0, 0.02)
    return stage.train()


def make_micro_batch(config, num_images):
    """Packs of one document each, without padding, and their pixels."""
    document = [5]
    for _ in range(num_images):
        document += [(SIDE, SIDE), 3]
    document.append(SEQ_LENGTH - 5 - num_images * (SIDE**2 + 3))
    packs = stack(
        *[
            pack(document, seq_length=SEQ_LENGTH, image_size=SIDE * 8, vocab_size=500, seed=seed)
            for seed in range(config.data.micro_batch_size)
        ]
    )
    place_BS = torch.arange(SEQ_LENGTH).expand_as(packs.image_BS)
    masked_BS = (packs.image_BS >= 0) & (place_BS % 10 < 3)
    micro_batch = build_micro_batch(packs, masked_BS, StreamSettings.of(config, SHAPE), torch.device("cpu"))
    dtype = torch.bfloat16 if config.training.bf16 else torch.float32
    return micro_batch, [image.to(dtype) for images in packs.pixels for image in images]


def loss_of(config, micro_batch, output):
    counts = GlobalCounts(1, 1, 1, 1, 1, 1, 0, 1, 1, 1)
    loss, _ = micro_batch_losses(output, micro_batch, counts, config.objective, None, None)
    return loss
