"""CLIP's and SigLIP's vision models, alone or as a part of the whole model.

Their tables of positions have one size. Features are by default those of the last layer but one, as in LLaVA and in the
published LaVer code; `hidden_states` never include the final norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laver_megatron.encoders.interface import EncoderShape, read_sizes
from laver_megatron.encoders.transformer import TRANSFORMER_SIZES, TransformerFamily, transformer_shape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class Clip(TransformerFamily):
    """Pictures are cropped in their middle. A class token stands before the patches. `hidden_states` begin behind the
    norm before the first layer; the final norm is the class token's alone."""

    model_types = ("clip", "clip_vision_model")
    processors = ("CLIPImageProcessor",)
    behind_layers = ("post_layernorm.",)

    def classes(self, vision: Mapping[str, Any]) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        return CLIPVisionConfig, CLIPVisionModel

    def shape(self, vision: dict[str, Any], path: Path) -> EncoderShape:
        sizes = read_sizes(vision, TRANSFORMER_SIZES, path)
        return transformer_shape("clip_vision_model", sizes, num_prefix_tokens=1, default_feature_layer=-2)


class Siglip(TransformerFamily):
    """SigLIP, and SigLIP2 of fixed resolution, which has the same architecture and `model_type`. (SigLIP2 "naflex",
    `siglip2`, is another architecture.) There is no class token: all tokens are patches."""

    model_types = ("siglip", "siglip_vision_model")
    processors = ("SiglipImageProcessor",)
    behind_layers = ("post_layernorm.", "head.")

    def classes(self, vision: Mapping[str, Any]) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
        from transformers import SiglipVisionConfig, SiglipVisionModel

        return SiglipVisionConfig, SiglipVisionModel

    def shape(self, vision: dict[str, Any], path: Path) -> EncoderShape:
        sizes = read_sizes(vision, TRANSFORMER_SIZES, path)
        return transformer_shape("siglip_vision_model", sizes, default_feature_layer=-2)
