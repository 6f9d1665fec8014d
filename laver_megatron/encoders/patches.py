"""Encoder-free: the features are the patches themselves, and the connector learns to read them.

A directory of it holds no weights, only the size of a patch (config.json, `"model_type": "laver_patches"`) and how the
pixels are normalised (its image processor); examples/encoder_free is one. Resolution is native, a patch is a
visual token, its feature the normalised pixels as `[colour, row, column]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laver_megatron.encoders.interface import EncoderShape, Family, ImagePreprocessor, read_sizes
from laver_megatron.encoders.native import native_preprocessor

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel

    from laver_megatron.encoders.modules import PatchEncoder


class Patches(Family):
    model_types = ("laver_patches",)
    processors = ("CLIPImageProcessor",)

    def classes(self, vision: Mapping[str, Any]) -> None:
        return None

    def shape(self, vision: dict[str, Any], path: Path) -> EncoderShape:
        sizes = read_sizes(vision, ("patch_size",), path)
        return EncoderShape(
            model_type="laver_patches",
            feature_size=sizes["num_channels"] * sizes["patch_size"] ** 2,
            num_layers=0,
            hidden_size=0,
            intermediate_size=0,
            num_mlp_matrices=0,
            patch_size=sizes["patch_size"],
            image_size=None,
            default_feature_layer=None,
        )

    def preprocessor(
        self, processor: BaseImageProcessor, shape: EncoderShape, file: Path, max_image_tokens: int | None
    ) -> ImagePreprocessor:
        return native_preprocessor(processor, shape, file, max_image_tokens)

    def encoder(self, model: PreTrainedModel | None, shape: EncoderShape, feature_layer: int | None) -> PatchEncoder:
        from laver_megatron.encoders.modules import PatchEncoder

        assert model is None and feature_layer is None
        return PatchEncoder(shape)
