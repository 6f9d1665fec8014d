"""Small image encoders with random weights, one of each kind, with processor files in the form of the published ones.

None makes more than 64 visual tokens of a picture of the demo.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from laver_megatron.demo.models import seeded
from laver_megatron.hf.files import CONFIG_FILE, PREPROCESSOR_FILE
from laver_megatron.runtime.files import read_object, write_json
from laver_megatron.runtime.terminal import quiet_transformers

IMAGE_SIZE, PATCH_SIZE = 64, 8
_MOST_TOKENS = 64
_SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE,
}  # fmt: skip
_DINOV2_SIZES = _SIZES | {"image_size": 104}  # its positions are made for more pixels than are used
_CLIP_COLOURS = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
_IMAGENET_COLOURS = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_GREY = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_STEPS = {
    "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "resample": 3,
    "rescale_factor": 1 / 255,
}  # fmt: skip
_CROP = {"do_center_crop": True, "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
_FIXED_CLIP_PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor", **_CLIP_COLOURS, **_CROP, **_STEPS,
    "size": {"shortest_edge": IMAGE_SIZE},
}  # fmt: skip
_DINOV2_PROCESSOR = {
    "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": IMAGE_SIZE + 8},
    **_IMAGENET_COLOURS, **_CROP, **_STEPS,
}  # fmt: skip
_NATIVE_PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor", "do_center_crop": False, "max_pixels": _MOST_TOKENS * PATCH_SIZE**2,
    **_CLIP_COLOURS, **_STEPS,
}  # fmt: skip
_QWEN_PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 4 * (2 * PATCH_SIZE) ** 2,
    "max_pixels": _MOST_TOKENS * (2 * PATCH_SIZE) ** 2, "patch_size": PATCH_SIZE, "temporal_patch_size": 2,
    "merge_size": 2, **_CLIP_COLOURS,
}  # fmt: skip
_PATCHES_PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor", "do_center_crop": False, "patch_size": 16,
    "max_pixels": _MOST_TOKENS * 16**2, **_GREY, **_STEPS,
}  # fmt: skip
# By kind, all but SigLIP and the encoder that is none: the model, its settings, its image processor.
_MODELS: dict[str, tuple[type[PreTrainedModel], PreTrainedConfig, dict[str, Any]]] = {
    "clip": (transformers.CLIPVisionModel, transformers.CLIPVisionConfig(**_SIZES), _FIXED_CLIP_PROCESSOR),
    "dinov2": (transformers.Dinov2Model, transformers.Dinov2Config(**_DINOV2_SIZES, mlp_ratio=3), _DINOV2_PROCESSOR),
    "dinov2_with_registers": (
        transformers.Dinov2WithRegistersModel,
        transformers.Dinov2WithRegistersConfig(
            **_DINOV2_SIZES, mlp_ratio=4, use_swiglu_ffn=True, num_register_tokens=4
        ),
        _DINOV2_PROCESSOR,
    ),
    "aimv2": (
        transformers.Aimv2VisionModel,
        transformers.Aimv2VisionConfig(**_SIZES, is_native=True, use_head=False),
        _NATIVE_PROCESSOR,
    ),
    "aimv2_fixed": (
        transformers.Aimv2VisionModel,
        transformers.Aimv2VisionConfig(**_SIZES, use_head=False),
        _FIXED_CLIP_PROCESSOR,
    ),
    "qwen2_5_vl": (
        Qwen2_5_VisionTransformerPretrainedModel,
        Qwen2_5_VLVisionConfig(
            depth=3,
            hidden_size=_SIZES["hidden_size"],
            intermediate_size=_SIZES["intermediate_size"],
            num_heads=_SIZES["num_attention_heads"],
            out_hidden_size=96,
            patch_size=PATCH_SIZE,
            window_size=4 * PATCH_SIZE,  # of 2 x 2 visual tokens
            fullatt_block_indexes=[1],
            initializer_range=0.1,  # at less all visual tokens are alike
        ),
        _QWEN_PROCESSOR,
    ),
}
KINDS = ("siglip", *_MODELS, "patches")


def save_encoder(directory: Path, kind: str = "siglip") -> None:
    """An encoder of one of KINDS with random weights and its image processor's settings, in a directory that may exist.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"there is no demo encoder of kind {kind!r}; choose from {', '.join(KINDS)}")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if kind == "siglip":
        with seeded(2):
            model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**_SIZES))
        with quiet_transformers():
            save_siglip(directory, model)
        return
    if kind == "patches":
        write_json(directory / CONFIG_FILE, {"model_type": "laver_patches", "patch_size": 16, "num_channels": 3})
        processor = _PATCHES_PROCESSOR
    else:
        model_class, config, processor = _MODELS[kind]
        _save_model(directory, model_class, config)
    write_json(directory / PREPROCESSOR_FILE, processor)


def save_siglip(directory: Path, model: transformers.SiglipVisionModel) -> None:
    """Weights, settings and the image processor for pictures of the model's size."""
    model.save_pretrained(directory)
    side = model.config.image_size
    SiglipImageProcessorPil(size={"height": side, "width": side}, **_GREY).save_pretrained(directory)
    # Checkpoints name the processor without the backend.
    processor = read_object(directory / PREPROCESSOR_FILE) | {"image_processor_type": "SiglipImageProcessor"}
    write_json(directory / PREPROCESSOR_FILE, processor)


def _save_model(directory: Path, model_class: type[PreTrainedModel], config: PreTrainedConfig) -> None:
    with seeded(2), torch.no_grad():
        model = model_class(deepcopy(config))  # models write into theirs
        for parameter in model.parameters():
            # Norms of 1, biases and registers of 0 would not show whether they are read.
            if (parameter == parameter.flatten()[0]).all():
                parameter.add_(0.1 * torch.randn_like(parameter))
    with quiet_transformers():
        model.save_pretrained(directory)
