"""Exported checkpoints written by hand from random weights, under the names that an export has on disk.

    export = write_export(directory, reference, attention="mixed", positions="2d")

The writer shares nothing with the converter: tests of the exported model's code hold whatever the converter does.
"""

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import nn
from transformers import Qwen2ForCausalLM, SiglipVisionModel

from laver_megatron.convert.export import description


def write_export(
    directory: Path,
    language: Qwen2ForCausalLM,
    encoder: SiglipVisionModel,
    connector: nn.Sequential,
    *,
    text_config: dict,
    vision_config: dict,
    attention: str,
    positions: str,
    image_token_id: int,
    format: str = "laver",
    feature_layer: int = -2,
) -> Path:
    """Weights, config.json, processor_config.json and, for laver, the code; connector: linear, GELU, linear."""
    directory.mkdir(parents=True)
    tied = text_config["tie_word_embeddings"]
    tensors = {f"language_model.{name}": tensor for name, tensor in language.state_dict().items()}
    if tied:
        del tensors["language_model.lm_head.weight"]
    for name, tensor in encoder.state_dict().items():  # older versions of transformers have the level at run time too
        tensors[f"vision_tower.vision_model.{name.removeprefix('vision_model.')}"] = tensor
    for number, layer in ((1, connector[0]), (2, connector[2])):
        for name, tensor in layer.state_dict().items():
            tensors[f"multi_modal_projector.linear_{number}.{name}"] = tensor
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    write_config = {"laver": description.laver_config, "llava": description.llava_config}[format]
    config = write_config(
        text_config,
        vision_config,
        attention=attention,
        positions=positions,
        feature_layer=feature_layer,
        image_token_id=image_token_id,
        dtype="float32",
    )
    _write_json(directory / "config.json", config)
    processor = description.processor_config(format, patch_size=vision_config["patch_size"])
    _write_json(directory / "processor_config.json", processor)
    if format == "laver":
        shutil.copy(description.REMOTE_CODE, directory)
    return directory


def add_processor(export: Path, model_dir: Path, encoder_dir: Path) -> Path:
    """The files of the tokenizer, with the chat template that also takes pictures, and of the image processor."""
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(model_dir / name, export)
    template = (model_dir / "chat_template.jinja").read_text()
    (export / "chat_template.jinja").write_text(description.chat_template(template))
    shutil.copy(encoder_dir / "preprocessor_config.json", export)
    return export


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
