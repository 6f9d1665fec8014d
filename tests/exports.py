"""Exported checkpoints written by hand from random weights, under the names that an export has on disk.

    export = write_export(directory, reference, attention="mixed", positions="2d")

The writer shares nothing with the converter: tests of the exported model's code hold whatever the converter does.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, Qwen2ForCausalLM, SiglipVisionModel

from laver_megatron.convert.export import description
from laver_megatron.demo.encoders import save_encoder
from laver_megatron.demo.models import save_language_model


def write_export(
    directory: Path,
    language: Qwen2ForCausalLM,
    encoder: PreTrainedModel | None,
    connector: nn.Sequential,
    *,
    text_config: dict,
    vision_config: dict,
    attention: str,
    positions: str,
    image_token_id: int,
    format: str = "laver",
    feature_layer: int | None = -2,
    native: dict[str, int] | None = None,
) -> Path:
    """Weights, config.json, processor_config.json and, for laver, the code. encoder: transformers' model, None without
    weights; connector: linear, GELU, linear; native: for an encoder of native resolution, min_pixels and max_pixels."""
    directory.mkdir(parents=True)
    tied = text_config["tie_word_embeddings"]
    tensors = {f"language_model.{name}": tensor for name, tensor in language.state_dict().items()}
    if tied:
        del tensors["language_model.lm_head.weight"]
    for name, tensor in encoder.state_dict().items() if encoder is not None else ():
        tensors[f"vision_tower.{published_name(name, encoder.config.model_type)}"] = tensor
    for number, layer in ((1, connector[0]), (2, connector[2])):
        for name, tensor in layer.state_dict().items():
            tensors[f"multi_modal_projector.linear_{number}.{name}"] = tensor
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    config = description.export_config(
        format,
        text_config,
        vision_config,
        attention=attention,
        positions=positions,
        feature_layer=feature_layer,
        image_token_id=image_token_id,
        dtype="float32",
    )
    _write_json(directory / "config.json", config)
    side = vision_config["patch_size"] * vision_config.get("spatial_merge_size", 1)
    processor = description.processor_config(format, vision_config, patch_size=side, native=native)
    _write_json(directory / "processor_config.json", processor)
    if format == "laver":
        shutil.copy(description.REMOTE_CODE, directory)
    return directory


def published_name(name: str, model_type: str) -> str:
    """What published checkpoints call a tensor of a vision model."""
    if model_type in ("siglip_vision_model", "clip_vision_model"):
        return f"vision_model.{name}"
    if model_type.startswith("dinov2"):
        for letter, word in (("q", "query"), ("k", "key"), ("v", "value")):
            name = name.replace(f"attention.{letter}_proj", f"attention.attention.{word}")
        name = name.replace("attention.o_proj", "attention.output.dense")
    return name


def add_processor(export: Path, model_dir: Path, encoder_dir: Path) -> Path:
    """The files of the tokenizer, with the chat template that also takes pictures, and of the image processor."""
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(model_dir / name, export)
    template = (model_dir / "chat_template.jinja").read_text()
    (export / "chat_template.jinja").write_text(description.chat_template(template))
    shutil.copy(encoder_dir / "preprocessor_config.json", export)
    return export


def random_export(directory: Path) -> Path:
    """An export below a directory, of the demo's sizes, with mixed attention and 2d positions, in laver format, with
    tokenizer and processor."""
    model_dir, encoder_dir = directory / "model", directory / "encoder"
    save_language_model(model_dir, [])
    save_encoder(encoder_dir)
    language, encoder = Qwen2ForCausalLM.from_pretrained(model_dir), SiglipVisionModel.from_pretrained(encoder_dir)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in (p for module in (language, encoder) for p in module.parameters() if p.ndim > 1):
            parameter.normal_(0.0, 1.5 * parameter[0].numel() ** -0.5)
    connector = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128))
    added = json.loads((model_dir / "tokenizer.json").read_text())["added_tokens"]
    written = write_export(
        directory / "export",
        language,
        encoder,
        connector,
        text_config=json.loads((model_dir / "config.json").read_text()),
        vision_config=json.loads((encoder_dir / "config.json").read_text()),
        attention="mixed",
        positions="2d",
        image_token_id=next(token["id"] for token in added if token["content"] == "<|image_pad|>"),
    )
    return add_processor(written, model_dir, encoder_dir)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
