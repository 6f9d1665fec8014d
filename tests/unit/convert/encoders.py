"""Small random image encoders of every kind and exports with them, written by hand.

encoder = save_encoder("clip", directory)     # config.json, weights, preprocessor_config.json
export = write_family_export("clip", directory, model_dir)
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2ForCausalLM,
)

from laver_megatron.demo import encoders as demo
from tests.exports import add_processor, write_export

KINDS = tuple(demo.KINDS)
_FEATURE_SIZES = {"qwen2_5_vl": 96, "patches": 3 * 16 * 16}  # the others: 64
# Which hidden state is the feature, and how many tokens stand before the patches there.
FEATURE_LAYERS = {
    "siglip": -2, "clip": -2, "dinov2": -1, "dinov2_with_registers": -1, "aimv2": -1, "aimv2_fixed": -1,
    "qwen2_5_vl": None, "patches": None,
}  # fmt: skip
NUM_PREFIX_TOKENS = {"clip": 1, "dinov2": 1, "dinov2_with_registers": 5}
# What an export says of a picture's size.
NATIVE = {
    "aimv2": {"min_pixels": 0, "max_pixels": 64 * 8**2},
    "qwen2_5_vl": {"min_pixels": 4 * 16**2, "max_pixels": 64 * 16**2},
    "patches": {"min_pixels": 0, "max_pixels": 64 * 16**2},
}


def save_encoder(kind: str, directory: Path) -> Path:
    """The demo's, with weights so large that a wrong mask, layer, token or position shows in every output; CLIP and
    Qwen2.5-VL whole, with their language models."""
    demo.save_encoder(directory, kind)
    file = directory / "model.safetensors"
    vision = json.loads((directory / "config.json").read_text())
    if kind == "clip":
        text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        CLIPModel(CLIPConfig(text_config={**text, "vocab_size": 40}, vision_config=vision)).save_pretrained(directory)
    elif kind == "qwen2_5_vl":
        text = {
            "vocab_size": 40, "hidden_size": 96, "intermediate_size": 24, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1,
            "rope_scaling": {"type": "mrope", "mrope_section": [8, 8, 8]},
        }  # fmt: skip
        whole = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
        Qwen2_5_VLForConditionalGeneration(whole).save_pretrained(directory)
    if file.is_file():
        generator = torch.Generator().manual_seed(len(kind))
        tensors = {name: _large(name, tensor, generator) for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return directory


def _large(name: str, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(tensor.shape, generator=generator)
    if tensor.ndim >= 2:
        return 1.2 * tensor[0].numel() ** -0.5 * noise
    is_gain = ("norm" in name or "ln_q" in name) and name.endswith("weight") or "lambda" in name
    return float(is_gain) + 0.3 * noise


def vision_config(directory: Path) -> dict:
    """The vision model's settings out of an encoder's config.json, with its type."""
    content = json.loads((directory / "config.json").read_text())
    return content.get("vision_config", content)


def load_vision_model(kind: str, directory: Path) -> PreTrainedModel | None:
    """transformers' vision model alone, with the weights of an encoder's directory."""
    if kind == "patches":
        return None
    model = AutoModel.from_pretrained(directory).eval()
    return {"clip": lambda: model.vision_model, "qwen2_5_vl": lambda: model.visual}.get(kind, lambda: model)()


def write_family_export(kind: str, directory: Path, model_dir: Path, *, attention="mixed", positions="2d") -> Path:
    """An export with an encoder of this kind, and the encoder's own directory beside it as `encoder`. The connector and
    the decoder are random, too."""
    encoder_dir = save_encoder(kind, directory / "encoder")
    model = load_vision_model(kind, encoder_dir)
    language = Qwen2ForCausalLM.from_pretrained(model_dir)
    torch.manual_seed(1)
    hidden = language.config.hidden_size
    connector = nn.Sequential(nn.Linear(_FEATURE_SIZES.get(kind, 64), hidden), nn.GELU(), nn.Linear(hidden, hidden))
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
