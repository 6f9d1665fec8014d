"""Small random encoders of every kind whose visual tokens are 8 pixels on a side, for the packs of `build`."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedModel,
)
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from tests.distributed.build import IMAGE_SIZE, PATCH_SIZE

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
    "initializer_range": 0.05,
}


def _qwen() -> PreTrainedModel:
    config = Qwen2_5_VLVisionConfig(
        depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=40, patch_size=PATCH_SIZE // 2,
        window_size=2 * PATCH_SIZE, fullatt_block_indexes=[1], initializer_range=0.05,
    )  # fmt: skip
    return Qwen2_5_VisionTransformerPretrainedModel(config)


_MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**_SIZES, initializer_factor=3.0)),
    # Positions for other pixels than are used.
    "dinov2_with_registers": lambda: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**{**_SIZES, "image_size": 40}, mlp_ratio=2)
    ),
    "aimv2": lambda: Aimv2VisionModel(Aimv2VisionConfig(**_SIZES, is_native=True, use_head=False)),
    "qwen2_5_vl": _qwen,
}
KINDS = (*_MODELS, "patches")
NATIVE = ("aimv2", "qwen2_5_vl", "patches")


def save_encoder(directory: Path, kind: str) -> None:
    """config.json and weights; nothing that prepares pictures."""
    if kind == "patches":
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps({"model_type": "laver_patches", "patch_size": PATCH_SIZE}))
        return
    torch.manual_seed(13)
    _MODELS[kind]().save_pretrained(directory)
