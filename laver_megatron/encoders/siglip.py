"""SigLIP, and SigLIP2 of fixed resolution, which has the same architecture and `model_type`.

Its table of positions has one size. There is no class token: all tokens are patches. Features are by default those of
the last layer but one, as the published LaVer code takes them; `hidden_states` never include the final norm. (SigLIP2
"naflex", `siglip2`, is another architecture.)
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


class Siglip(FixedFamily):
    model_types = ("siglip", "siglip_vision_model")
    processors = ("SiglipImageProcessor",)
    behind_layers = ("post_layernorm.", "head.")

    def config_class(self, vision: Mapping[str, Any]) -> type[PreTrainedConfig]:
        from transformers import SiglipVisionConfig

        return SiglipVisionConfig

    def shape(self, vision: dict[str, Any], path: Path) -> EncoderShape:
        sizes = read_sizes(vision, _SIZES, path)
        return EncoderShape(
            model_type="siglip_vision_model",
            feature_size=sizes["hidden_size"],
            num_layers=sizes["num_hidden_layers"],
            hidden_size=sizes["hidden_size"],
            intermediate_size=sizes["intermediate_size"],
            patch_size=sizes["patch_size"],
            image_size=(sizes["image_size"], sizes["image_size"]),
            default_feature_layer=-2,
        )

    def model(self, vision: dict[str, Any]) -> PreTrainedModel:
        from transformers import SiglipVisionModel

        return SiglipVisionModel(self.config_class(vision).from_dict(vision))
