"""Small random image encoders of every family, in the files that published ones have.

encoder = save_encoder("clip", directory)     # config.json, weights, preprocessor_config.json
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.exports import add_processor, write_export

_VIT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8}
_DINO = {"hidden_size": 32, "mlp_ratio": 2, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8}


def _siglip() -> PreTrainedModel:
    return SiglipVisionModel(SiglipVisionConfig(**_VIT, image_size=32))


def _clip() -> PreTrainedModel:
    """Whole: with its text tower and projections."""
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return CLIPModel(CLIPConfig(text_config={**text, "vocab_size": 40}, vision_config={**_VIT, "image_size": 32}))


def _dinov2() -> PreTrainedModel:
    return Dinov2Model(Dinov2Config(**_DINO, image_size=48))


def _dinov2_giant() -> PreTrainedModel:
    return Dinov2Model(Dinov2Config(**_DINO, image_size=32, use_swiglu_ffn=True))


def _dinov2_with_registers() -> PreTrainedModel:
    return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**_DINO, image_size=48, num_register_tokens=3))


def _aimv2() -> PreTrainedModel:
    return Aimv2VisionModel(Aimv2VisionConfig(**_VIT, image_size=32))


def _aimv2_native() -> PreTrainedModel:
    return Aimv2VisionModel(Aimv2VisionConfig(**_VIT, image_size=32, is_native=True, use_head=False))


def _qwen2_5_vl() -> PreTrainedModel:
    """Whole: with its decoder. Windows are 2 x 2 visual tokens."""
    text = {
        "vocab_size": 40, "hidden_size": 40, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "rope_scaling": {"type": "mrope", "mrope_section": [2, 4, 4]},
    }  # fmt: skip
    vision = {
        "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 8, "window_size": 32,
        "out_hidden_size": 40, "fullatt_block_indexes": [1],
    }  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def _crop(processor_type: str, edge: int) -> dict:
    return {
        "image_processor_type": processor_type, "do_resize": True, "size": {"shortest_edge": edge},
        "do_center_crop": True, "crop_size": {"height": 32, "width": 32},
    }  # fmt: skip


_AS_IT_IS = {"do_resize": False, "do_center_crop": False, "max_pixels": 24 * 64}
_QWEN = {"image_processor_type": "Qwen2VLImageProcessor", "temporal_patch_size": 2, "min_pixels": 1024}

_KINDS: dict[str, tuple[Callable[[], PreTrainedModel] | None, dict]] = {
    "siglip": (_siglip, {"image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}}),
    "clip": (_clip, _crop("CLIPImageProcessor", 32)),
    "dinov2": (_dinov2, _crop("BitImageProcessor", 36)),
    "dinov2 giant": (_dinov2_giant, _crop("BitImageProcessor", 36)),
    "dinov2 with registers": (_dinov2_with_registers, _crop("BitImageProcessor", 36)),
    "aimv2": (_aimv2, _crop("CLIPImageProcessor", 32)),
    "aimv2 native": (_aimv2_native, {**_AS_IT_IS, "image_processor_type": "CLIPImageProcessor"}),
    "qwen2_5_vl": (_qwen2_5_vl, {**_QWEN, "max_pixels": 24 * 256, "patch_size": 8, "merge_size": 2}),
    "patches": (None, {**_AS_IT_IS, "image_processor_type": "CLIPImageProcessor", "patch_size": 8}),
}
KINDS = tuple(_KINDS)
_FEATURE_SIZES = {"qwen2_5_vl": 40, "patches": 3 * 8 * 8}  # the others: 32
# Which hidden state is the feature, and how many tokens stand before the patches there.
FEATURE_LAYERS = {
    "siglip": -2, "clip": -2, "dinov2": -1, "dinov2 giant": -1, "dinov2 with registers": -1, "aimv2": -1,
    "aimv2 native": -1, "qwen2_5_vl": None, "patches": None,
}  # fmt: skip
NUM_PREFIX_TOKENS = {"clip": 1, "dinov2": 1, "dinov2 giant": 1, "dinov2 with registers": 4}
# What an export says of a picture's size.
NATIVE = {
    "aimv2 native": {"min_pixels": 0, "max_pixels": 24 * 64},
    "qwen2_5_vl": {"min_pixels": 1024, "max_pixels": 24 * 256},
    "patches": {"min_pixels": 0, "max_pixels": 24 * 64},
}


def save_encoder(kind: str, directory: Path) -> Path:
    """Weights are so large that a wrong mask, layer, token or position shows in every output."""
    build, processor = _KINDS[kind]
    directory.mkdir(parents=True, exist_ok=True)
    if build is None:
        (directory / "config.json").write_text('{"model_type": "laver_patches", "patch_size": 8, "num_channels": 3}\n')
    else:
        torch.manual_seed(len(kind))
        model = build()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(0.0, 1.2 * parameter[0].numel() ** -0.5)
                else:
                    gain = "norm" in name and name.endswith("weight")
                    parameter.normal_(float(gain or "lambda" in name), 0.3)
        model.save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    return directory


def vision_config(directory: Path) -> dict:
    """The vision model's settings out of an encoder's config.json, with its type."""
    content = json.loads((directory / "config.json").read_text())
    return content.get("vision_config", content)


def load_vision_model(kind: str, directory: Path) -> PreTrainedModel | None:
    """transformers' vision model alone, with the weights of an encoder's directory."""
    if kind == "patches":
        return None
    if kind == "qwen2_5_vl":
        return Qwen2_5_VLForConditionalGeneration.from_pretrained(directory).model.visual.eval()
    model_class = CLIPVisionModel if kind == "clip" else type(_KINDS[kind][0]())
    return model_class.from_pretrained(directory).eval()


def write_family_export(kind: str, directory: Path, model_dir: Path, *, attention="mixed", positions="2d") -> Path:
    """An export with an encoder of this kind, and the encoder's own directory beside it as `encoder`. The connector and
    the decoder are random, too."""
    encoder_dir = save_encoder(kind, directory / "encoder")
    model = load_vision_model(kind, encoder_dir)
    language = Qwen2ForCausalLM.from_pretrained(model_dir)
    torch.manual_seed(1)
    hidden = language.config.hidden_size
    connector = nn.Sequential(nn.Linear(_FEATURE_SIZES.get(kind, 32), hidden), nn.GELU(), nn.Linear(hidden, hidden))
    with torch.no_grad():
        for weight in (*language.parameters(), *connector.parameters()):
            if weight.ndim == 2:
                weight.normal_(0.0, 1.5 * weight.shape[1] ** -0.5)
    added = json.loads((model_dir / "tokenizer.json").read_text())["added_tokens"]
    export = write_export(
        directory / "export",
        language,
        model,
        connector,
        text_config=json.loads((model_dir / "config.json").read_text()),
        vision_config=vision_config(encoder_dir),
        attention=attention,
        positions=positions,
        image_token_id=next(token["id"] for token in added if token["content"] == "<|image_pad|>"),
        feature_layer=FEATURE_LAYERS[kind],
        native=NATIVE.get(kind),
    )
    return add_processor(export, model_dir, encoder_dir)
