"""DINOv2, with and without registers.

Its table of positions (made for 518 pixels) is interpolated to any fixed size that the patches divide; the image
processor decides which, mostly 224 pixels cropped from the middle. A class token and the registers stand before the
patches. Features are by default those of the last layer; `hidden_states` never include the final norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laver_megatron.encoders.fixed import FixedFamily
from laver_megatron.encoders.interface import EncoderShape, read_sizes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "image_size", "patch_size")
_WITH_REGISTERS = "dinov2_with_registers"


class Dinov2(FixedFamily):
    model_types = ("dinov2", _WITH_REGISTERS)
    processors = ("BitImageProcessor",)
    behind_layers = ("layernorm.", "embeddings.mask_token")

    def config_class(self, vision: Mapping[str, Any]) -> type[PreTrainedConfig]:
        from transformers import Dinov2Config, Dinov2WithRegistersConfig

        return Dinov2WithRegistersConfig if _has_registers(vision) else Dinov2Config

    def shape(self, vision: dict[str, Any], path: Path) -> EncoderShape:
        model_type = _WITH_REGISTERS if _has_registers(vision) else "dinov2"
        registers = ("num_register_tokens",) if model_type == _WITH_REGISTERS else ()
        sizes = read_sizes(vision, (*_SIZES, *registers), path)
        gated = bool(vision.get("use_swiglu_ffn", False))
        intermediate_size = sizes["hidden_size"] * sizes["mlp_ratio"]
        if gated:  # two thirds, in whole eights
            intermediate_size = (intermediate_size * 2 // 3 + 7) // 8 * 8
        return EncoderShape(
            model_type=model_type,
            feature_size=sizes["hidden_size"],
            num_layers=sizes["num_hidden_layers"],
            hidden_size=sizes["hidden_size"],
            intermediate_size=intermediate_size,
            num_mlp_matrices=3 if gated else 2,
            patch_size=sizes["patch_size"],
            image_size=(sizes["image_size"], sizes["image_size"]),
            interpolates_positions=True,
            num_prefix_tokens=1 + sizes.get("num_register_tokens", 0),
            default_feature_layer=-1,
        )

    def model(self, vision: dict[str, Any]) -> PreTrainedModel:
        from transformers import Dinov2Model, Dinov2WithRegistersModel

        model_class = Dinov2WithRegistersModel if _has_registers(vision) else Dinov2Model
        return model_class(self.config_class(vision).from_dict(vision))


def _has_registers(vision: Mapping[str, Any]) -> bool:
    return vision.get("model_type") == _WITH_REGISTERS
