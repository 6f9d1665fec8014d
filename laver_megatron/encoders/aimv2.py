"""AIMv2's vision model, of native or fixed resolution (`is_native` in config.json), alone or as a part of AIMv2.

Native ones compute their positions for every grid. There is no class token. Features are by default those of the last
layer; `hidden_states` never include the final norm. The MLP is gated.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from laver_megatron.encoders.fixed import FixedFamily
from laver_megatron.encoders.hidden_states import HiddenStateEncoder
from laver_megatron.encoders.interface import EncoderShape, ImagePreprocessor, read_sizes
from laver_megatron.encoders.native import check_sizes, native_preprocessor

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "patch_size")


class NativeAimv2Encoder(HiddenStateEncoder):
    def forward(self, images: Sequence[Tensor]) -> Tensor:
        check_sizes(images, self.model.config.patch_size)
        return super().forward(images)


class Aimv2(FixedFamily):
    model_types = ("aimv2", "aimv2_vision_model")

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
        from transformers import Aimv2VisionConfig, Aimv2VisionModel

        return Aimv2VisionModel(Aimv2VisionConfig.from_dict(vision))

    def encoder(
        self, model: PreTrainedModel | None, shape: EncoderShape, feature_layer: int | None
    ) -> HiddenStateEncoder:
        assert model is not None and feature_layer is not None
        return (NativeAimv2Encoder if shape.is_native else HiddenStateEncoder)(model, shape, feature_layer)
