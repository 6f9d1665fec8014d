"""DINOv2, with and without registers.

Its table of positions (made for 518 pixels) is interpolated to any fixed size that the patches divide; the image
processor decides which, mostly 224 pixels cropped from the middle. A class token and the registers stand before the
patches. Features are by default those of the last layer; `hidden_states` never include the final norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laver_megatron.encoders.interface import EncoderShape, read_sizes
from laver_megatron.encoders.transformer import TransformerFamily, transformer_shape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "image_size", "patch_size")
_WITH_REGISTERS = "dinov2_with_registers"


class Dinov2(TransformerFamily):
    model_types = ("dinov2", _WITH_REGISTERS)
    processors = ("BitImageProcessor",)
    behind_layers = ("layernorm.", "embeddings.mask_token")

    def classes(self, vision: Mapping[str, Any]) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
        from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

        if vision.get("model_type") == _WITH_REGISTERS:
            return Dinov2WithRegistersConfig, Dinov2WithRegistersModel
        return Dinov2Config, Dinov2Model

    def shape(self, vision: dict[str, Any], path: Path) -> EncoderShape:
        has_registers = vision.get("model_type") == _WITH_REGISTERS
        registers = ("num_register_tokens",) if has_registers else ()
        sizes = read_sizes(vision, (*_SIZES, *registers), path)
        gated = bool(vision.get("use_swiglu_ffn", False))
        intermediate_size = sizes["hidden_size"] * sizes["mlp_ratio"]
        if gated:  # two thirds, in whole eights
            intermediate_size = (intermediate_size * 2 // 3 + 7) // 8 * 8
        return transformer_shape(
            _WITH_REGISTERS if has_registers else "dinov2",
            {**sizes, "intermediate_size": intermediate_size},
            num_mlp_matrices=3 if gated else 2,
            interpolates_positions=True,
            num_prefix_tokens=1 + sizes.get("num_register_tokens", 0),
            default_feature_layer=-1,
        )
