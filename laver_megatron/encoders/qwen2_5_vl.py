"""Qwen2.5-VL's vision transformer: of native resolution, alone or as a part of Qwen2.5-VL.

A visual token is a square of 2 x 2 patches, which the merger at its end makes one feature as wide as the language model
it was trained with: there is one output and no choice of layers, and no class token. Most layers see windows, a few the
whole image. An image is a video of one frame that is shown twice, a patch two frames deep.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laver_megatron.config.fields import ConfigError
from laver_megatron.encoders.interface import EncoderShape, Family, ImagePreprocessor, read_sizes
from laver_megatron.encoders.native import native_preprocessor
from laver_megatron.hf.shape import is_size

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel

    from laver_megatron.encoders.modules import Qwen25VLEncoder

_SIZES = (
    "depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size", "patch_size", "spatial_merge_size",
    "window_size", "temporal_patch_size",
)  # fmt: skip


class Qwen25VL(Family):
    model_types = ("qwen2_5_vl", "qwen2_5_vl_vision")
    processors = ("Qwen2VLImageProcessor",)

    def classes(self, vision: Mapping[str, Any]) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
        from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

        return Qwen2_5_VLVisionConfig, Qwen2_5_VisionTransformerPretrainedModel

    def shape(self, vision: dict[str, Any], path: Path) -> EncoderShape:
        sizes = read_sizes({**vision, "num_channels": vision["in_channels"]}, _SIZES, path)
        whole = vision.get("fullatt_block_indexes")
        if not isinstance(whole, list) or not all(type(number) is int for number in whole):
            raise ConfigError([f"{path}: fullatt_block_indexes is {whole!r}, but must be a list of layer numbers"])
        token_size = sizes["patch_size"] * sizes["spatial_merge_size"]
        if sizes["window_size"] < token_size:
            raise ConfigError(
                [f"{path}: window_size {sizes['window_size']} does not hold one visual token of {token_size} pixels"]
            )
        return EncoderShape(
            model_type="qwen2_5_vl_vision",
            feature_size=sizes["out_hidden_size"],
            num_layers=sizes["depth"],
            hidden_size=sizes["hidden_size"],
            intermediate_size=sizes["intermediate_size"],
            num_mlp_matrices=3,
            patch_size=sizes["patch_size"],
            merge_size=sizes["spatial_merge_size"],
            temporal_patch_size=sizes["temporal_patch_size"],
            image_size=None,
            window_size=sizes["window_size"],
            full_attention_layers=tuple(sorted(set(whole) & set(range(sizes["depth"])))),
            default_feature_layer=None,
        )

    def preprocessor(
        self, processor: BaseImageProcessor, shape: EncoderShape, file: Path, max_image_tokens: int | None
    ) -> ImagePreprocessor:
        try:
            min_pixels, max_pixels = processor.size["shortest_edge"], processor.size["longest_edge"]
        except (AttributeError, KeyError, TypeError):
            raise ValueError(
                f"{file}: {type(processor).__name__} has no min_pixels and max_pixels; copy the file of a Qwen2.5-VL"
            ) from None
        for name, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
            if not is_size(value):
                raise ValueError(f"{file}: {name} is {value!r}, but must be a positive integer")
        return native_preprocessor(
            processor, shape, file, max_image_tokens, min_pixels=min_pixels, max_pixels=max_pixels
        )

    def encoder(self, model: PreTrainedModel | None, shape: EncoderShape, feature_layer: int | None) -> Qwen25VLEncoder:
        from laver_megatron.encoders.modules import Qwen25VLEncoder

        assert model is not None and feature_layer is None
        return Qwen25VLEncoder(model, shape)
