"""CLIP's vision model, alone or as a part of CLIP.

Its table of positions has one size; pictures are resized and cropped in their middle. A class token stands before the
patches. Features are by default those of the last layer but one, as in LLaVA; `hidden_states` begin behind CLIP's norm
before the first layer and never include the final norm, which is the class token's alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laver_megatron.encoders.fixed import FixedFamily
from laver_megatron.encoders.interface import EncoderShape, read_sizes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")


class Clip(FixedFamily):
    model_types = ("clip", "clip_vision_model")
    processors = ("CLIPImageProcessor",)
    behind_layers = ("post_layernorm.",)

    def config_class(self, vision: Mapping[str, Any]) -> type[PreTrainedConfig]:
        from transformers import CLIPVisionConfig

        return CLIPVisionConfig

    def shape(self, vision: dict[str, Any], path: Path) -> EncoderShape:
        sizes = read_sizes(vision, _SIZES, path)
        return EncoderShape(
            model_type="clip_vision_model",
            feature_size=sizes["hidden_size"],
            num_layers=sizes["num_hidden_layers"],
            hidden_size=sizes["hidden_size"],
            intermediate_size=sizes["intermediate_size"],
            patch_size=sizes["patch_size"],
            image_size=(sizes["image_size"], sizes["image_size"]),
            num_prefix_tokens=1,
            default_feature_layer=-2,
        )

    def model(self, vision: dict[str, Any]) -> PreTrainedModel:
        from transformers import CLIPVisionModel

        return CLIPVisionModel(self.config_class(vision).from_dict(vision))
