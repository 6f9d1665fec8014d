"""Small image encoders with random weights, one of each kind, with processor files in the form of the published ones.

Of a picture of the demo none makes more than 64 visual tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from laver_megatron.demo.models import quiet, seeded, write_json

IMAGE_SIZE, PATCH_SIZE = 64, 8
_MOST_TOKENS = 64
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
}
_TABLE_SIZE = 104  # DINOv2's positions are made for more pixels than are used
_CLIP_COLOURS = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_IMAGENET_COLOURS = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_STEPS = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "resample": 3,
    "rescale_factor": 1 / 255,
}
_CROP = {"do_center_crop": True, "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}


def save_encoder(directory: Path, kind: str = "siglip") -> None:
    """An encoder of one of KINDS with random weights and its image processor's settings, in a directory that may exist.

    Raises:
        ValueError: another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"there is no demo encoder of kind {kind!r}; choose from {', '.join(KINDS)}")
    KINDS[kind](Path(directory))


def _siglip(directory: Path) -> None:
    with seeded(2):
        model = SiglipVisionModel(SiglipVisionConfig(**_SIZES))
    with quiet():
        model.save_pretrained(directory)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    SiglipImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(directory)
    settings = json.loads((directory / "preprocessor_config.json").read_text())
    # Checkpoints name the processor without the backend.
    write_json(directory / "preprocessor_config.json", {**settings, "image_processor_type": "SiglipImageProcessor"})


def _clip(directory: Path) -> None:
    processor = {"image_processor_type": "CLIPImageProcessor", **_CLIP_COLOURS, **_CROP, **_STEPS}
    config = CLIPVisionConfig(**_SIZES)
    _save(directory, lambda: CLIPVisionModel(config), {**processor, "size": {"shortest_edge": IMAGE_SIZE}})


_DINOV2_PROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "size": {"shortest_edge": IMAGE_SIZE + 8},
    **_IMAGENET_COLOURS,
    **_CROP,
    **_STEPS,
}


def _dinov2(directory: Path) -> None:
    config = Dinov2Config(**{**_SIZES, "image_size": _TABLE_SIZE}, mlp_ratio=3)
    _save(directory, lambda: Dinov2Model(config), _DINOV2_PROCESSOR)


def _dinov2_with_registers(directory: Path) -> None:
    sizes = {**_SIZES, "image_size": _TABLE_SIZE}
    config = Dinov2WithRegistersConfig(**sizes, mlp_ratio=4, use_swiglu_ffn=True, num_register_tokens=4)
    _save(directory, lambda: Dinov2WithRegistersModel(config), _DINOV2_PROCESSOR)


def _aimv2(directory: Path) -> None:
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_center_crop": False,
        "max_pixels": _MOST_TOKENS * PATCH_SIZE**2,
        **_CLIP_COLOURS,
        **_STEPS,
    }
    config = Aimv2VisionConfig(**_SIZES, is_native=True, use_head=False)
    _save(directory, lambda: Aimv2VisionModel(config), processor)


def _aimv2_fixed(directory: Path) -> None:
    processor = {"image_processor_type": "CLIPImageProcessor", **_CLIP_COLOURS, **_CROP, **_STEPS}
    config = Aimv2VisionConfig(**_SIZES, use_head=False)
    _save(directory, lambda: Aimv2VisionModel(config), {**processor, "size": {"shortest_edge": IMAGE_SIZE}})


def _qwen2_5_vl(directory: Path) -> None:
    config = Qwen2_5_VLVisionConfig(
        depth=3,
        hidden_size=_SIZES["hidden_size"],
        intermediate_size=_SIZES["intermediate_size"],
        num_heads=_SIZES["num_attention_heads"],
        out_hidden_size=96,
        patch_size=PATCH_SIZE,
        window_size=4 * PATCH_SIZE,  # of 2 x 2 visual tokens
        fullatt_block_indexes=[1],
        initializer_range=0.1,  # at less all visual tokens are alike
    )
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": 4 * (2 * PATCH_SIZE) ** 2,
        "max_pixels": _MOST_TOKENS * (2 * PATCH_SIZE) ** 2,
        "patch_size": PATCH_SIZE,
        "temporal_patch_size": 2,
        "merge_size": 2,
        **_CLIP_COLOURS,
    }
    _save(directory, lambda: Qwen2_5_VisionTransformerPretrainedModel(config), processor)


def _patches(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", {"model_type": "laver_patches", "patch_size": 16, "num_channels": 3})
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_center_crop": False,
        "patch_size": 16,
        "max_pixels": _MOST_TOKENS * 16**2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        **_STEPS,
    }
    write_json(directory / "preprocessor_config.json", processor)


def _save(directory: Path, build: Callable[[], PreTrainedModel], processor: dict[str, Any]) -> None:
    with seeded(2), torch.no_grad():
        model = build()
        for parameter in model.parameters():
            # Norms of 1, biases and registers of 0 would not show whether they are read.
            if (parameter == parameter.flatten()[0]).all():
                parameter.add_(0.1 * torch.randn_like(parameter))
    with quiet():
        model.save_pretrained(directory)
    write_json(directory / "preprocessor_config.json", processor)


KINDS: dict[str, Callable[[Path], None]] = {
    "siglip": _siglip,
    "clip": _clip,
    "dinov2": _dinov2,
    "dinov2_with_registers": _dinov2_with_registers,
    "aimv2": _aimv2,
    "aimv2_fixed": _aimv2_fixed,
    "qwen2_5_vl": _qwen2_5_vl,
    "patches": _patches,
}
