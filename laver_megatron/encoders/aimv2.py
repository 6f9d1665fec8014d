"""AIMv2's vision model, of native or fixed resolution (`is_native` in config.json), alone or as a part of AIMv2.

Native ones compute their positions for every grid. There is no class token. Features are by default those of the last
layer; `hidden_states` never include the final norm. The MLP is gated.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laver_megatron.config.fields import ConfigError
from laver_megatron.encoders.fixed import FixedFamily
from laver_megatron.encoders.interface import EncoderShape, ImagePreprocessor, read_sizes
from laver_megatron.encoders.native import native_preprocessor

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel

    from laver_megatron.encoders.modules import HiddenStateEncoder

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size")
# Only in files of Apple's own format.
_OF_REMOTE_CODE = {"auto_map", "use_bias", "projection_dropout"}


class Aimv2(FixedFamily):
    model_types = ("aimv2", "aimv2_vision_model")
    processors = ("CLIPImageProcessor", "Aimv2ImageProcessor")
    behind_layers = ("rms_norm.", "head.")

    def config_class(self, vision: Mapping[str, Any]) -> type[PreTrainedConfig]:
        from transformers import Aimv2VisionConfig

        return Aimv2VisionConfig

    def complete(self, vision: dict[str, Any], path: Path) -> dict[str, Any]:
        # transformers' own type of the vision model alone is aimv2_vision_model; Apple's says aimv2.
        says_size = "is_native" in vision or "image_size" in vision
        of_apple = sorted(_OF_REMOTE_CODE & vision.keys())
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
        is_native = bool(vision.get("is_native", False))
        sizes = read_sizes(vision, _SIZES if is_native else (*_SIZES, "image_size"), path)
        return EncoderShape(
            model_type="aimv2_vision_model",
            feature_size=sizes["hidden_size"],
            num_layers=sizes["num_hidden_layers"],
            hidden_size=sizes["hidden_size"],
            intermediate_size=sizes["intermediate_size"],
            num_mlp_matrices=3,
            patch_size=sizes["patch_size"],
            image_size=None if is_native else (sizes["image_size"], sizes["image_size"]),
            default_feature_layer=-1,
        )

    def preprocessor(
        self, processor: BaseImageProcessor, shape: EncoderShape, file: Path, max_image_tokens: int | None
    ) -> ImagePreprocessor:
        make = native_preprocessor if shape.is_native else super().preprocessor
        return make(processor, shape, file, max_image_tokens)

    def model(self, vision: dict[str, Any]) -> PreTrainedModel:
        from transformers import Aimv2VisionModel

        return Aimv2VisionModel(self.config_class(vision).from_dict(vision))

    def encoder(
        self, model: PreTrainedModel | None, shape: EncoderShape, feature_layer: int | None
    ) -> HiddenStateEncoder:
        from laver_megatron.encoders.modules import HiddenStateEncoder, NativeAimv2Encoder

        assert model is not None and feature_layer is not None
        return (NativeAimv2Encoder if shape.is_native else HiddenStateEncoder)(model, shape, feature_layer)
