"""Small models of every kind that can be inspected, with random weights, in the form of published ones."""

import json
import shutil
from pathlib import Path

import torch
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from laver_megatron.convert.export import description
from laver_megatron.demo.encoders import save_encoder
from tests.conversions import image_token, write_laver
from tests.unit.convert.encoders import write_family_export

TEXT = {
    "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024,
}  # fmt: skip
TOWERS = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}


def write_model(kind: str, directory: Path, demo_dir: Path) -> Path:
    """kind: laver (with its training state), laver-ENCODER, llava-clip, llava-siglip or qwen2_5_vl."""
    if kind == "laver":
        return write_laver(directory, demo_dir)
    if kind.startswith("laver-"):
        return write_family_export(kind.removeprefix("laver-"), directory, demo_dir / "model")
    directory.mkdir(parents=True)
    if kind == "qwen2_5_vl":
        return _write_qwen(directory, demo_dir)
    return _write_llava(directory, demo_dir, kind.removeprefix("llava-"))


def _save(model: torch.nn.Module, directory: Path, demo_dir: Path) -> None:
    """With weights large enough that layers differ, and the demo's tokenizer with a template for pictures."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 1.5 * parameter[0].numel() ** -0.5)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_dir / "model" / name, directory)
    template = (demo_dir / "model/chat_template.jinja").read_text()
    (directory / "chat_template.jinja").write_text(description.chat_template(template))


def _write_llava(directory: Path, demo_dir: Path, kind: str) -> Path:
    torch.manual_seed(5)
    encoder = directory / "encoder"
    save_encoder(encoder, kind)
    with_class = kind == "clip"
    settings = json.loads((encoder / "config.json").read_text())
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=Qwen2Config(**TEXT),
            vision_config=TOWERS[kind](**{k: v for k, v in settings.items() if k not in ("model_type", "dtype")}),
            vision_feature_layer=-2,
            vision_feature_select_strategy="default" if with_class else "full",
            image_token_id=image_token(demo_dir / "model"),
        )
    )
    _save(model, directory, demo_dir)
    LlavaProcessor(
        AutoImageProcessor.from_pretrained(encoder, backend="pil"),
        AutoTokenizer.from_pretrained(directory),
        patch_size=8,
        vision_feature_select_strategy="default" if with_class else "full",
        num_additional_image_tokens=int(with_class),
        image_token="<|image_pad|>",
        chat_template=(directory / "chat_template.jinja").read_text(),
    ).save_pretrained(directory)
    shutil.rmtree(encoder)
    return directory


def _write_qwen(directory: Path, demo_dir: Path) -> Path:
    torch.manual_seed(6)
    token = image_token(demo_dir / "model")
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64, "patch_size": 8,
        "window_size": 32, "fullatt_block_indexes": [1], "spatial_merge_size": 2,
    }  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                **TEXT,
                "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
            },
            vision_config=vision,
            image_token_id=token,
            vision_start_token_id=token - 3,
            vision_end_token_id=token - 2,
            video_token_id=token + 1,
        )
    )
    _save(model, directory, demo_dir)
    save_encoder(directory / "encoder", "qwen2_5_vl")
    shutil.move(directory / "encoder/preprocessor_config.json", directory)
    shutil.rmtree(directory / "encoder")
    return directory
