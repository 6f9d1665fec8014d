"""AIMv2's vision model, of native or fixed resolution (`is_native` in config.json), alone or as a part of AIMv2.

Native ones compute their positions for every grid. There is no class token. Features are by default those of the last
layer; `hidden_states` never include the final norm. The MLP is gated.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laver_megatron.config.fields import ConfigError
from laver_megatron.encoders.interface import EncoderShape, read_sizes
from laver_megatron.encoders.transformer import TRANSFORMER_SIZES, TransformerFamily, transformer_shape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Only in files of Apple's own format.
_APPLE_FIELDS = {"auto_map", "use_bias", "projection_dropout"}


class Aimv2(TransformerFamily):
    model_types = ("aimv2", "aimv2_vision_model")
    processors = ("CLIPImageProcessor", "Aimv2ImageProcessor")
    behind_layers = ("rms_norm.", "head.")

    def classes(self, vision: Mapping[str, Any]) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
        from transformers import Aimv2VisionConfig, Aimv2VisionModel

        return Aimv2VisionConfig, Aimv2VisionModel

    def complete(self, vision: dict[str, Any], path: Path) -> dict[str, Any]:
        # transformers' own type of the vision model alone is aimv2_vision_model; Apple's says aimv2.
        says_size = "is_native" in vision or "image_size" in vision
        of_apple = sorted(_APPLE_FIELDS & vision.keys())
        if vision.get("model_type") == "aimv2" and (of_apple or not says_size):
            why = f"{', '.join(of_apple)} in it" if of_apple else "neither is_native nor image_size in it"
            raise ConfigError(
                [
                    f"{path}: an AIMv2 in Apple's own format ({why}), whose code is not run; take a directory in "
                    "transformers' own format, with model_type aimv2_vision_model, or aimv2 with a vision_config"
                ]
            )
        return super().complete(vision, path)

    def shape(self, vision: dict[str, Any], path: Path) -> EncoderShape:
        names = [name for name in TRANSFORMER_SIZES if name != "image_size" or not vision.get("is_native")]
        sizes = read_sizes(vision, names, path)
        return transformer_shape("aimv2_vision_model", sizes, num_mlp_matrices=3, default_feature_layer=-1)
