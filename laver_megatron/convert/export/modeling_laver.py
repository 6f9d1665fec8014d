"""LaVer for transformers: an image encoder, a connector and a Qwen2.5 decoder that sees images as it was trained to.

This file travels inside an exported checkpoint and needs torch, transformers (5.5 or newer) and Pillow only:

    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True)

Encoder and decoder are transformers' own modules. What is LaVer's: with `attention: mixed` the tokens of an image
see all of their own image (a later image sees earlier ones, never the reverse), and with `positions: 2d` or `mrope`
they are rotated by row and column.

Images go to the model beside the tokens, those of all sequences of the batch one after the other. Which of two forms
depends on the encoder:

    of fixed resolution     pixel_values [I, 3, height, width]
    of native resolution    pixel_values [T, P]: for every visual token, image after image and in raster order, the
                            pixels that become it, as [3, side, side]; image_grids [I, 2]: rows and columns of each
                            image's visual tokens

Letters: B sequences of a batch, L tokens that a call of the model is given, K keys (those in the cache, then the L),
I images of a batch, T visual tokens of all these images, P pixels of a visual token, E and H widths of encoder and
decoder, F frequency pairs and D width of an attention head.
"""

import base64
import io
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import torch
from PIL import Image, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor, nn
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    AutoImageProcessor,
    BatchFeature,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    SuppressTokensLogitsProcessor,
)
from transformers import __version__ as transformers_version
from transformers.image_transforms import normalize, rescale
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

ATTENTION = ("mixed", "causal")
POSITIONS = ("1d", "2d", "mrope")

# Kernels that take any mask, and angles apart from positions. A flash-attention kernel takes neither: it would be
# causal over images, and it reads positions that do not rise by one as several packed documents.
_KERNELS = ("eager", "sdpa", "flex_attention")

# Share of the frequency pairs that `mrope` gives to t, row and column: 16, 24 and 24 of 64.
_MROPE_SHARES = (16, 24, 24)

_VISION_START, _IMAGE_PAD, _VISION_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
_ONE_PICTURE = _VISION_START + _IMAGE_PAD + _VISION_END
_PLACEHOLDER = "<image>"
# As in training: at the start or end of a line (and of what someone says), unless that is in a code block.
_PLACED = re.compile(r"^[ \t]*<image>|<image>[ \t]*(?:<\|im_end\|>|$)", re.MULTILINE)
_CODE = re.compile(r"```.*?(?:```|(?=<\|im_end\|>)|\Z)", re.DOTALL)
_PATIENCE_SECONDS = 60  # with the server of a picture
_ADDRESS = re.compile(r"https?://|data:|file:/", re.IGNORECASE)
# What files named like pictures often are instead, by how they begin (lower case, without leading space).
_OTHER_KINDS = {
    b"<!doctype html": "an HTML page", b"<html": "an HTML page", b"version https://git-lfs": "a Git LFS pointer",
}  # fmt: skip

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# --- the image encoders ----------------------------------------------------------------------------------


class LaverPatchesConfig(PreTrainedConfig):
    """No encoder: a visual token is a square of the picture, `patch_size` pixels wide."""

    model_type = "laver_patches"

    def __init__(self, patch_size: int = 28, num_channels: int = 3, **kwargs: Any) -> None:
        self.patch_size, self.num_channels = patch_size, num_channels
        super().__init__(**kwargs)


class LaverPatches(nn.Module):
    """The model of a `LaverPatchesConfig`: the feature of a visual token is its pixels."""

    def __init__(self, config: LaverPatchesConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, pixels_TP: Tensor) -> Tensor:
        return pixels_TP


_SIGLIP, _CLIP, _AIMV2 = "siglip_vision_model", "clip_vision_model", "aimv2_vision_model"
_DINOV2, _DINOV2_WITH_REGISTERS = "dinov2", "dinov2_with_registers"
_QWEN, _PATCHES = "qwen2_5_vl_vision", "laver_patches"

_ENCODERS: dict[str, tuple[type[PreTrainedConfig], type[nn.Module]]] = {
    _SIGLIP: (SiglipVisionConfig, SiglipVisionModel),
    _CLIP: (CLIPVisionConfig, CLIPVisionModel),
    _DINOV2: (Dinov2Config, Dinov2Model),
    _DINOV2_WITH_REGISTERS: (Dinov2WithRegistersConfig, Dinov2WithRegistersModel),
    _AIMV2: (Aimv2VisionConfig, Aimv2VisionModel),
    _QWEN: (Qwen2_5_VLVisionConfig, Qwen2_5_VisionTransformerPretrainedModel),
    _PATCHES: (LaverPatchesConfig, LaverPatches),
}


def _family(vision_config: PreTrainedConfig | dict[str, Any]) -> str:
    """The encoder's type. Versions of transformers call the vision part of Qwen2.5-VL by two names.

    Raises:
        ValueError: an unknown one.
    """
    if isinstance(vision_config, dict):
        model_type = vision_config.get("model_type", _SIGLIP)
    else:
        model_type = vision_config.model_type
    family = _QWEN if model_type == "qwen2_5_vl" else model_type
    if family not in _ENCODERS:
        raise ValueError(f"vision_config is of type {model_type!r}, but must be one of {', '.join(_ENCODERS)}")
    return family


def is_native(vision_config: PreTrainedConfig) -> bool:
    """Whether an encoder takes pictures of any size, and so makes of each as many visual tokens as it has room for."""
    return _family(vision_config) in (_QWEN, _PATCHES) or bool(getattr(vision_config, "is_native", False))


def num_prefix_tokens(vision_config: PreTrainedConfig) -> int:
    """Hidden states that stand before the patches and are no visual tokens: class token and registers."""
    family = _family(vision_config)
    if family == _DINOV2_WITH_REGISTERS:
        return 1 + vision_config.num_register_tokens
    return 1 if family in (_CLIP, _DINOV2) else 0


def has_feature_layers(vision_config: PreTrainedConfig) -> bool:
    """Whether a feature is one of the encoder's hidden states. Qwen2.5-VL has its merger's output, patches pixels."""
    return _family(vision_config) not in (_QWEN, _PATCHES)


def feature_size(vision_config: PreTrainedConfig) -> int:
    """Width of a feature: what the connector takes in."""
    family = _family(vision_config)
    if family == _PATCHES:
        return vision_config.num_channels * vision_config.patch_size**2
    return vision_config.out_hidden_size if family == _QWEN else vision_config.hidden_size


def token_side(vision_config: PreTrainedConfig) -> int:
    """Side in pixels of the square that becomes one visual token."""
    return vision_config.patch_size * getattr(vision_config, "spatial_merge_size", 1)


def cut_into_tokens(image: Tensor, side: int) -> Tensor:
    """Pixels `[3, height, width]` as those of visual tokens in raster order, `[rows * columns, 3 * side * side]`."""
    num_channels, height, width = image.shape
    blocks = image.reshape(num_channels, height // side, side, width // side, side)
    return blocks.permute(1, 3, 0, 2, 4).reshape(-1, num_channels * side * side)


def join_tokens(pixels_NP: Tensor, rows: int, columns: int, side: int) -> Tensor:
    """The inverse of `cut_into_tokens`."""
    blocks = pixels_NP.view(rows, columns, -1, side, side)
    return blocks.permute(2, 0, 3, 1, 4).reshape(-1, rows * side, columns * side)


class LaverConfig(PreTrainedConfig):
    """Sizes of decoder (`text_config`) and encoder (`vision_config`), and how images enter the decoder.

    vision_feature_layer: index into the encoder's hidden states (0 is the embedding, -1 the last layer, before the
    final norm); None for an encoder whose features are none of them. attention: `mixed`, or `causal` for all tokens
    alike. positions: `1d`; `2d`, where even frequency pairs turn with the row and odd ones with the column; `mrope`,
    Qwen2.5-VL's contiguous sections. image_token_id: the token that stands for one visual token.

    Raises:
        ValueError: an unknown encoder, attention or positions, a feature layer where there is none to choose or
            none where there is, or rotary scaling or a sliding window in the decoder.
    """

    model_type = "laver"
    sub_configs = {"text_config": Qwen2Config, "vision_config": PreTrainedConfig}

    def __init__(
        self,
        text_config: dict | Qwen2Config | None = None,
        vision_config: dict | PreTrainedConfig | None = None,
        vision_feature_layer: int | None = -2,
        attention: str = "mixed",
        positions: str = "2d",
        image_token_id: int = 151655,
        **kwargs: Any,
    ) -> None:
        if attention not in ATTENTION:
            raise ValueError(f"attention is {attention!r} in config.json; choose from {', '.join(ATTENTION)}")
        if positions not in POSITIONS:
            raise ValueError(f"positions is {positions!r} in config.json; choose from {', '.join(POSITIONS)}")
        self.text_config = text_config if isinstance(text_config, Qwen2Config) else Qwen2Config(**(text_config or {}))
        vision_config = vision_config or {}
        family = _family(vision_config)
        if isinstance(vision_config, dict):
            vision_config = _ENCODERS[family][0](**{k: v for k, v in vision_config.items() if k != "model_type"})
        self.vision_config = vision_config
        if (vision_feature_layer is not None) != has_feature_layers(vision_config):
            raise ValueError(
                f"vision_feature_layer is {vision_feature_layer} in config.json, but an encoder of type {family} has "
                f"{'hidden states to choose from' if vision_feature_layer is None else 'none to choose; write null'}"
            )
        self.vision_feature_layer = vision_feature_layer
        self.attention, self.positions = attention, positions
        self.image_token_id = image_token_id
        self._refuse_other_decoders()
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        super().__init__(**kwargs)

    def _refuse_other_decoders(self) -> None:
        """A rotary embedding and a mask of our own would silently ignore these."""
        rope_type = self.text_config.rope_parameters.get("rope_type", "default")
        if rope_type != "default":
            raise ValueError(f"text_config asks for rotary scaling of type {rope_type!r}; LaVer is trained without it")
        if set(self.text_config.layer_types) != {"full_attention"}:
            raise ValueError("text_config asks for sliding-window attention; LaVer is trained without it")


# --- where the images are, and what follows from it ------------------------------------------------------


def locate_images(
    input_ids_BL: Tensor, image_token_id: int, grids: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """For every token the number of its image within the batch (-1 for text), and its row and column in that image
    (0 for text), int64 `[B, L]` each. Images may touch.

    grids: rows and columns of the images of all sequences, in order.

    Raises:
        ValueError: image tokens that are not these images, each in one piece.
    """
    visual_BL = input_ids_BL == image_token_id
    num_tokens, sizes = int(visual_BL.sum()), [rows * columns for rows, columns in grids]
    if num_tokens != sum(sizes):
        named = ", ".join(f"{rows} x {columns}" for rows, columns in grids[:8]) + (", ..." if len(grids) > 8 else "")
        raise ValueError(
            f"the text holds {num_tokens} image tokens, but there are {len(grids)} images of {sum(sizes)} tokens"
            f"{f' ({named})' if grids else ''}; let the processor prepare both, and do not truncate"
        )
    device = input_ids_BL.device
    sizes_I = torch.tensor(sizes, dtype=torch.long, device=device)
    image_T = torch.arange(len(sizes), device=device).repeat_interleave(sizes_I)
    place_T = torch.arange(num_tokens, device=device) - (sizes_I.cumsum(0) - sizes_I)[image_T]
    columns_T = torch.tensor([columns for _, columns in grids], dtype=torch.long, device=device)[image_T]
    image_BL = torch.full_like(input_ids_BL, -1, dtype=torch.long).masked_scatter(visual_BL, image_T)
    row_BL, column_BL = (
        torch.zeros_like(image_BL).masked_scatter(visual_BL, index_T)
        for index_T in (place_T // columns_T, place_T % columns_T)
    )
    first_BL = torch.zeros_like(visual_BL).masked_scatter(visual_BL, place_T == 0)
    before_BL = nn.functional.pad(image_BL[:, :-1], (1, 0), value=-1)
    torn_BL = visual_BL & ~first_BL & (before_BL != image_BL)
    if torn_BL.any():
        sequence, index = torn_BL.nonzero()[0].tolist()
        rows, columns = grids[int(image_BL[sequence, index])]
        raise ValueError(
            f"sequence {sequence} of the batch does not hold the {rows * columns} image tokens ({rows} x {columns}) of "
            "an image in one piece; let the processor write them, and give the images in the order of the text"
        )
    return image_BL, row_BL, column_BL


def count_positions(
    image_BL: Tensor, row_BL: Tensor, column_BL: Tensor, real_BL: Tensor, start_B: Tensor, positions: str
) -> tuple[Tensor, Tensor]:
    """Position indices (t, row, column), int64 `[3, B, L]`, and the next free index `[B]`.

    Text carries three equal indices. An image's tokens stand at the index where it starts plus row and column;
    text goes on at the largest index used + 1. Padding (real_BL is False) takes no index. start_B: the first index.
    """
    advance_BL = real_BL.long()
    if positions != "1d":
        # An image moves the count on by its longer side, at its last token, which is its last row and column.
        last_BL = image_BL != nn.functional.pad(image_BL[:, 1:], (0, 1), value=-1)
        longer_BL = torch.maximum(row_BL, column_BL) + 1
        advance_BL = torch.where(image_BL >= 0, last_BL * longer_BL, advance_BL)
    counted_BL = advance_BL.cumsum(1)
    base_BL = start_B[:, None] + counted_BL - advance_BL
    next_B = start_B + counted_BL[:, -1]
    if positions == "1d":
        return base_BL.expand(3, -1, -1), next_B
    return torch.stack([base_BL, base_BL + row_BL, base_BL + column_BL]), next_B


def same_image(image_BK: Tensor) -> Callable:
    """A mask function for transformers: whether query and key are of one image."""

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        image = image_BK[batch, query]
        return (image >= 0) & (image == image_BK[batch, key])

    return allowed


class LaverRotaryEmbedding(nn.Module):
    """In place of Qwen2's: every frequency pair turns with one of t, row and column.

    Cosines and sines `[B, L, D]` in the dtype of the hidden states; angles are fp32 always. There is no buffer, so
    that no cast of the model can round the frequencies and no loader has to restore them.
    """

    def __init__(self, config: Qwen2Config, positions: str) -> None:
        super().__init__()
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.theta = config.rope_parameters["rope_theta"]
        self.positions = positions

    def axes(self) -> Tensor:
        """Which of (0: t, 1: row, 2: column) each frequency pair turns with, int64 `[F]`."""
        num_pairs = self.head_dim // 2
        pair_F = torch.arange(num_pairs)
        if self.positions == "mrope":
            t_end = num_pairs * _MROPE_SHARES[0] // sum(_MROPE_SHARES)
            row_end = t_end + (num_pairs - t_end) // 2
            return (pair_F >= t_end).long() + (pair_F >= row_end).long()
        return 1 + pair_F % 2

    @torch.no_grad()
    def forward(self, hidden_BLH: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids: `[3, B, L]`, or `[B, L]` where the three are equal."""
        device = hidden_BLH.device
        position_3BL = position_ids if position_ids.ndim == 3 else position_ids.expand(3, -1, -1)
        exponent_F = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device) / self.head_dim
        inverse_frequency_F = 1.0 / self.theta**exponent_F
        position_FBL = position_3BL.to(device)[self.axes().to(device)].float()
        angles_BLF = position_FBL.permute(1, 2, 0) * inverse_frequency_F
        angles_BLD = torch.cat([angles_BLF, angles_BLF], dim=-1)
        return angles_BLD.cos().to(hidden_BLH.dtype), angles_BLD.sin().to(hidden_BLH.dtype)


# --- the model -------------------------------------------------------------------------------------------


class LaverConnector(nn.Module):
    """Two linear layers with GELU from the encoder's features to the decoder's width: `[T, E] -> [T, H]`."""

    def __init__(self, config: LaverConfig) -> None:
        super().__init__()
        hidden_size = config.text_config.hidden_size
        self.linear_1 = nn.Linear(feature_size(config.vision_config), hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features_TE: Tensor) -> Tensor:
        return self.linear_2(nn.functional.gelu(self.linear_1(features_TE)))


class LaverForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Text and images to text. `forward` is that of transformers' decoders with the images of all sequences of the
    batch beside the tokens: `pixel_values` and, for an encoder of native resolution, `image_grids` (see above).

    Raises:
        ValueError: an attention kernel that cannot compute this model.
    """

    config_class = LaverConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "Qwen2DecoderLayer", "SiglipEncoderLayer", "SiglipMultiheadAttentionPoolingHead", "CLIPEncoderLayer",
        "Dinov2Embeddings", "Dinov2Layer", "Dinov2WithRegistersEmbeddings", "Dinov2WithRegistersLayer",
        "Aimv2VisionEmbeddings", "Aimv2EncoderLayer", "Aimv2AttentionPoolingHead", "Qwen2_5_VLVisionBlock",
    ]  # fmt: skip
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = _supports_flex_attn = _supports_flash_attn = _supports_attention_backend = True

    def __init__(self, config: LaverConfig) -> None:
        super().__init__(config)
        self.vision_tower = _ENCODERS[_family(config.vision_config)][1](config.vision_config)
        self.multi_modal_projector = LaverConnector(config)
        self.language_model = Qwen2ForCausalLM(config.text_config)
        self.language_model.model.rotary_emb = LaverRotaryEmbedding(config.text_config, config.positions)
        self._refuse_kernel()
        self._refuse_older_names()
        self.post_init()

    def _refuse_older_names(self) -> None:
        """Older versions have gate and up projection of a gated DINOv2 in one tensor; they would not find the weights,
        and go on with random ones."""
        names = [name for name, _ in self.vision_tower.named_parameters()]
        if getattr(self.config.vision_config, "use_swiglu_ffn", False) and not any("gate_proj" in n for n in names):
            raise ValueError(
                f"transformers {transformers_version} is too old for the gated MLP of this encoder "
                f"({self.config.vision_config.model_type}, use_swiglu_ffn); install a newer one, such as 5.23"
            )

    def _refuse_kernel(self) -> None:
        """Checked at every call too: a kernel can be changed after loading."""
        kernel = self.language_model.config._attn_implementation
        plain = self.config.attention == "causal" and self.config.positions == "1d"
        if not plain and kernel not in _KERNELS:
            raise ValueError(
                f"attn_implementation={kernel!r} cannot compute this model (attention {self.config.attention}, "
                f"positions {self.config.positions}): it would be causal over images or take them for packed "
                f"documents; load it with one of {', '.join(_KERNELS)} (for the encoder alone, pass "
                f'attn_implementation={{"vision_config": {kernel!r}, "text_config": "sdpa"}})'
            )

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def get_image_features(self, pixel_values: Tensor, image_grids: Tensor | None = None) -> Tensor:
        """Visual tokens `[T, H]` of all images, one after the other, each in raster order.

        Raises:
            ValueError: pixels of a size that the encoder does not take, or that are not those of the grids.
        """
        grids = self._grids(pixel_values, image_grids)
        anchor = next(self.vision_tower.parameters(), self.multi_modal_projector.linear_1.weight)
        pixels = pixel_values.to(anchor.device, anchor.dtype)
        features_TE = self._native_features(pixels, grids) if image_grids is not None else self._fixed_features(pixels)
        return self.multi_modal_projector(features_TE)

    def image_inputs(self, images: Sequence[Tensor]) -> dict[str, Tensor]:
        """pixel_values and, where they are needed, image_grids of normalised pixels `[3, height, width]` of images."""
        vision = self.config.vision_config
        if not is_native(vision):
            return {"pixel_values": torch.stack(list(images))}
        side = token_side(vision)
        grids = [(image.shape[1] // side, image.shape[2] // side) for image in images]
        pixels_TP = torch.cat([cut_into_tokens(image, side) for image in images])
        return {"pixel_values": pixels_TP, "image_grids": torch.tensor(grids)}

    def _grids(self, pixel_values: Tensor, image_grids: Tensor | None) -> list[tuple[int, int]]:
        """Rows and columns of the visual tokens of each image; checks that the pixels are such images."""
        vision, shape = self.config.vision_config, tuple(pixel_values.shape)
        if is_native(vision):
            side = token_side(vision)
            width = 3 * side**2
            if image_grids is None or image_grids.ndim != 2 or image_grids.shape[1] != 2:
                raise ValueError(
                    f"image_grids must be [images, 2], rows and columns of each, beside pixel_values of shape {shape}, "
                    f"but are {'missing' if image_grids is None else f'of shape {tuple(image_grids.shape)}'}; "
                    "let the processor prepare both"
                )
            grids = [(rows, columns) for rows, columns in image_grids.tolist()]
            num_tokens = sum(rows * columns for rows, columns in grids)
            if shape != (num_tokens, width) or any(min(grid) < 1 for grid in grids):
                raise ValueError(
                    f"pixel_values are of shape {shape}, but {len(grids)} images of {num_tokens} visual tokens of "
                    f"{side} x {side} pixels need [{num_tokens}, {width}]; let the processor prepare them"
                )
            return grids
        if image_grids is not None:
            raise ValueError(f"image_grids are given, but an encoder of type {vision.model_type} has one resolution")
        patch, size = vision.patch_size, vision.image_size
        interpolates = _family(vision) in (_DINOV2, _DINOV2_WITH_REGISTERS)
        fits = len(shape) == 4 and (
            min(shape[2:]) > 0 and shape[2] % patch == shape[3] % patch == 0
            if interpolates
            else shape[2:] == (size, size)
        )
        if not fits:
            taken = f"multiples of {patch}" if interpolates else f"{size}, {size}"
            raise ValueError(
                f"pixel_values are of shape {shape}, but the encoder takes [images, 3, {taken}]; "
                "let the processor prepare them"
            )
        return shape[0] * [(shape[2] // patch, shape[3] // patch)]

    def _fixed_features(self, pixels_I3HW: Tensor) -> Tensor:
        return self._patch_states(pixels_I3HW).flatten(0, 1)

    def _native_features(self, pixels_TP: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        vision = self.config.vision_config
        family, side = _family(vision), token_side(vision)
        if family == _PATCHES:
            return self.vision_tower(pixels_TP)
        if family == _QWEN:
            merge, patch = vision.spatial_merge_size, vision.patch_size
            blocks = pixels_TP.view(len(pixels_TP), -1, merge, patch, merge, patch).permute(0, 2, 4, 1, 3, 5)
            # Qwen sees a picture as a film in which nothing moves.
            frames = blocks.unsqueeze(4).expand(-1, -1, -1, -1, vision.temporal_patch_size, -1, -1)
            grid_I3 = torch.tensor([(1, rows * merge, columns * merge) for rows, columns in grids])
            patches = frames.reshape(len(pixels_TP) * merge**2, -1)
            return self.vision_tower(patches, grid_I3.to(pixels_TP.device)).pooler_output
        images = pixels_TP.split([rows * columns for rows, columns in grids])
        return torch.cat(
            [
                self._patch_states(join_tokens(own, *grid, side)[None])[0]
                for own, grid in zip(images, grids, strict=True)
            ]
        )

    def _patch_states(self, pixels_I3HW: Tensor) -> Tensor:
        """The hidden states that are features, `[I, patches, E]`: of the feature layer, without class token and
        registers."""
        assert self.config.vision_feature_layer is not None
        hidden_states = self.vision_tower(pixels_I3HW, output_hidden_states=True).hidden_states
        return hidden_states[self.config.vision_feature_layer][:, num_prefix_tokens(self.config.vision_config) :]

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        image_grids: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """pixel_values, image_grids: the images, in one of the forms at the head of this file. attention_mask: int or
        bool `[B, K]`, 0 for padding on either side; a mask of four dimensions (or a dict of them) is used as it is.
        position_ids: `[3, B, L]`, or `[B, L]` for text; counted where not given. labels: the tokens, -100 where there
        is nothing to learn; they are shifted here.

        Raises:
            ValueError: image tokens and pixel_values that do not fit together, a mask that does not cover the
                cache, a cache that something else filled, positions without rows and columns for images.
        """
        self._refuse_kernel()
        text_config = self.config.text_config
        use_cache = text_config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=text_config)
        num_past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        embeds_BLH, places = self._embed(input_ids, inputs_embeds, pixel_values, image_grids, num_past)
        position_ids = self._positions(places, attention_mask, position_ids, past_key_values, num_past)
        outputs = self.language_model.model(
            inputs_embeds=embeds_BLH,
            attention_mask=self._mask(places[0], embeds_BLH, attention_mask, past_key_values, num_past),
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        hidden_BLH = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.language_model.lm_head(hidden_BLH[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=text_config.vocab_size, **kwargs)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return result if return_dict is not False else result.to_tuple()

    def _embed(
        self,
        input_ids_BL: Tensor | None,
        embeds_BLH: Tensor | None,
        pixel_values: Tensor | None,
        image_grids: Tensor | None,
        num_past: int,
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """What goes into the decoder, words and visual tokens, and where the images are (see `locate_images`)."""
        if (input_ids_BL is None) == (embeds_BLH is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if embeds_BLH is None:
            embeds_BLH = self.get_input_embeddings()(input_ids_BL)
        grids = [] if pixel_values is None else self._grids(pixel_values, image_grids)
        places = self._locate(input_ids_BL, embeds_BLH, grids, num_past)
        if pixel_values is not None:
            visual_TH = self.get_image_features(pixel_values, image_grids).to(embeds_BLH.device, embeds_BLH.dtype)
            embeds_BLH = embeds_BLH.masked_scatter((places[0] >= 0).unsqueeze(-1), visual_TH)
        return embeds_BLH, places

    def _locate(
        self, input_ids_BL: Tensor | None, embeds_BLH: Tensor, grids: list[tuple[int, int]], num_past: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Image, row and column of the tokens (see `locate_images`)."""
        none_BL = torch.full(embeds_BLH.shape[:2], -1, device=embeds_BLH.device)
        nothing = none_BL, torch.zeros_like(none_BL), torch.zeros_like(none_BL)
        if input_ids_BL is None:
            if grids:
                raise ValueError(f"{len(grids)} pixel_values with inputs_embeds: images need input_ids")
            return nothing
        if num_past and not grids and input_ids_BL.shape[1] == 1:
            return nothing  # one step of decoding: an image was never cut in two, so this is a word
        return locate_images(input_ids_BL, self.config.image_token_id, grids)

    def _mask(
        self, image_BL: Tensor, embeds_BLH: Tensor, attention_mask: Any, past_key_values: Any, num_past: int
    ) -> dict[str, Any]:
        """The mask in the form that the kernel wants, from transformers' own builder. It is not given the positions:
        it would take a jump in them for the start of another document."""
        if isinstance(attention_mask, dict):
            return attention_mask
        visible = None
        if self.config.attention == "mixed" and (image_BL >= 0).any():
            # Keys of the cache lie before these tokens, and the free ones of a static cache behind them.
            length = image_BL.shape[1]
            num_keys = length if past_key_values is None else past_key_values.get_mask_sizes(length, 0)[0]
            after = num_keys - num_past - length
            visible = same_image(nn.functional.pad(image_BL, (num_past, after), value=-1))
        mask = create_causal_mask(
            config=self.config.text_config,
            inputs_embeds=embeds_BLH,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            or_mask_function=visible,
        )
        return {"full_attention": mask}

    def _positions(
        self,
        places: tuple[Tensor, Tensor, Tensor],
        attention_mask: Any,
        position_ids: Tensor | None,
        past_key_values: Any,
        num_past: int,
    ) -> Tensor:
        """Positions of the tokens; `[B, L]` with `1d`, which every kernel understands.

        Behind an image of 2D positions, a token's index is not the number of tokens before it. The difference,
        one number a sequence, is kept with the cache, to which it belongs.
        """
        image_BL = places[0]
        length = image_BL.shape[1]
        real_BK = torch.ones(image_BL.shape[0], num_past + length, dtype=torch.bool, device=image_BL.device)
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            if attention_mask.shape[1] < num_past + length:
                raise ValueError(
                    f"attention_mask is {attention_mask.shape[1]} tokens long, but there are {num_past} in the cache "
                    f"and {length} new ones; pass the mask of all of them"
                )
            real_BK = attention_mask[:, : num_past + length].to(image_BL.device).bool()
        num_before_B, num_real_B = real_BK[:, :num_past].sum(1), real_BK.sum(1)
        if position_ids is not None:
            if position_ids.ndim == 2 and self.config.positions != "1d" and (image_BL >= 0).any():
                raise ValueError(
                    f"position_ids of shape {tuple(position_ids.shape)} do not say where the tokens of images stand "
                    "in their grid; leave them out, or pass [3, batch, tokens]"
                )
            position_3BL = position_ids.expand(3, *image_BL.shape)
            next_B = position_3BL.amax(dim=(0, 2)) + 1
        else:
            offset_B = self._offset(past_key_values, num_before_B)
            start_B = num_before_B + offset_B
            position_3BL, next_B = count_positions(*places, real_BK[:, num_past:], start_B, self.config.positions)
        if past_key_values is not None:
            past_key_values.laver_offset_B = next_B - num_real_B
        return position_3BL[0] if self.config.positions == "1d" else position_3BL

    @staticmethod
    def _offset(past_key_values: Any, num_before_B: Tensor) -> Tensor:
        """The next free index less the number of tokens so far."""
        if past_key_values is None or past_key_values.get_seq_length() == 0:
            return torch.zeros_like(num_before_B)
        offset_B = getattr(past_key_values, "laver_offset_B", None)
        if offset_B is None:
            raise ValueError("past_key_values was not filled by this model; start without it, or pass position_ids")
        return offset_B.to(num_before_B.device)

    # --- generation ---

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`, which never answers with an image token: it stands for a picture, and there is
        none."""
        suppress = SuppressTokensLogitsProcessor([self.config.image_token_id], device=str(self.device))
        processors = LogitsProcessorList([*(logits_processor or ()), suppress])
        return super().generate(inputs, generation_config, logits_processor=processors, **kwargs)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Without the position_ids that `generate` makes up, which count every token as one; and without pictures
        that are in the cache already (newer versions of transformers leave them out themselves)."""
        inputs = {**super().prepare_inputs_for_generation(input_ids, **kwargs), "position_ids": None}
        if not kwargs.get("is_first_iteration", False) and kwargs.get("use_cache", True):
            inputs["pixel_values"] = inputs["image_grids"] = None
        return inputs

    @staticmethod
    def create_masks_for_generate(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """Leaves the mask to `forward`, which knows where the images are."""
        return attention_mask

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Beams and several answers: the pictures of a sequence are repeated together. Repeating each one alone, as
        for tensors with one row a sequence, would hand a sequence its neighbour's."""
        pictures = {name: kwargs.pop(name, None) for name in ("pixel_values", "image_grids")}
        if pictures["pixel_values"] is not None and expand_size > 1 and input_ids is not None:
            pictures = self._repeat_pictures(input_ids, **pictures, times=expand_size)
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return input_ids, {**kwargs, **{name: value for name, value in pictures.items() if value is not None}}

    def _repeat_pictures(
        self, input_ids_BL: Tensor, pixel_values: Tensor, image_grids: Tensor | None, times: int
    ) -> dict[str, Tensor | None]:
        """The pictures of every sequence `times` over."""
        grids = self._grids(pixel_values, image_grids)
        image_BL, row_BL, column_BL = locate_images(input_ids_BL, self.config.image_token_id, grids)
        num_images = ((image_BL >= 0) & (row_BL == 0) & (column_BL == 0)).sum(1).tolist()
        num_tokens = (image_BL >= 0).sum(1).tolist()

        def repeated(tensor: Tensor, counts: list[int]) -> Tensor:
            return torch.cat([own for own in tensor.split(counts) for _ in range(times)])

        if image_grids is None:
            return {"pixel_values": repeated(pixel_values, num_images), "image_grids": None}
        return {
            "pixel_values": repeated(pixel_values, num_tokens),
            "image_grids": repeated(image_grids, num_images),
        }


# --- the processor ---------------------------------------------------------------------------------------

Picture = Image.Image | np.ndarray | Tensor | bytes | str | Path


class LaverProcessor(ProcessorMixin):
    """Texts and pictures to what the model takes, exactly as in training.

    In a text, `<image>` or `<|vision_start|><|image_pad|><|vision_end|>` stands for one picture. The chat template
    writes the second for a part that is an image; where it places all pictures, `<image>` is a word. Texts without
    pictures may speak of `<image>` inside a line or in a code block; elsewhere it stands for a picture that is missing,
    unless `images` is an empty list, which says that there is none. patch_size: side in pixels of what becomes one
    visual token. min_pixels, max_pixels: bounds of a picture's area for an encoder of native resolution, whose pictures
    keep their proportions.
    """

    # Where files come from; for the image processor, which is loaded once more.
    _FILE_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        patch_size: int | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        **kwargs: Any,
    ) -> None:
        if patch_size is None:
            raise ValueError("processor_config.json names no patch_size; export the checkpoint again")
        if (min_pixels is None) != (max_pixels is None):
            raise ValueError(
                f"processor_config.json says min_pixels {min_pixels} and max_pixels {max_pixels}; an encoder of native "
                "resolution needs both, another neither; export the checkpoint again"
            )
        self.patch_size = patch_size
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.image_token = _IMAGE_PAD
        self.image_token_id = tokenizer.convert_tokens_to_ids(_IMAGE_PAD)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "LaverProcessor":
        """As in transformers, but the image processor is always its PIL class: the torchvision one, which is the
        default wherever torchvision is installed, resizes a little differently from training."""
        options = {name: kwargs[name] for name in cls._FILE_OPTIONS if name in kwargs}
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        processor.image_processor = AutoImageProcessor.from_pretrained(
            pretrained_model_name_or_path, backend="pil", **options
        )
        return processor

    def __call__(
        self,
        images: Picture | Sequence[Picture] | Sequence[Sequence[Picture]] | None = None,
        text: str | Sequence[str] | None = None,
        videos: None = None,
        audio: None = None,
        *,
        text_kwargs: dict[str, Any] | None = None,
        images_kwargs: dict[str, Any] | None = None,
        common_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """input_ids and attention_mask `[B, L]`; if there are images, pixel_values (float32) and for an encoder of
        native resolution image_grids (int64), as at the head of this file.

        images: pictures (PIL, uint8 arrays, paths, addresses, bytes or base64 of a file) of all texts in order, or a
        list of them for each text. All further arguments go to the tokenizer (`return_tensors`, `padding`, ...);
        batches are padded on the left unless they say otherwise.

        Raises:
            ValueError: no text, more or fewer pictures than places for them, what is no picture, image tokens spelt
                out, videos or audio, options for pictures.
        """
        if videos is not None or audio is not None:
            raise ValueError("this model reads text and pictures; it takes no videos and no audio")
        if images_kwargs:
            raise ValueError(f"pictures are prepared as in training; {', '.join(images_kwargs)} cannot be chosen")
        if text is None:
            raise ValueError(f"text is missing; a picture is used where the text says {_PLACEHOLDER}")
        texts = [text] if isinstance(text, str) else list(text)
        if not _are_placed(texts, images):
            texts = [words.replace(_PLACEHOLDER, _ONE_PICTURE) for words in texts]
        pictures = _in_order(images, [_count_places(words) for words in texts])
        data: dict[str, Any] = {}
        counts: list[int] = []
        if pictures:
            data = self._prepare([upright_rgb(_opened(picture)) for picture in pictures])
            counts = self._count_tokens(data)
        options = {"padding_side": "left", **(common_kwargs or {}), **(text_kwargs or {}), **kwargs}
        return_tensors = options.pop("return_tensors", None)
        tokens = self.tokenizer(_write_out(texts, counts), **options)
        return BatchFeature({**tokens, **data}, tensor_type=return_tensors)

    def _prepare(self, pictures: list[Image.Image]) -> dict[str, np.ndarray]:
        """pixel_values, and image_grids where pictures differ in size."""
        if self.max_pixels is None:
            prepared = self.image_processor(images=pictures, return_tensors="np")
            return {"pixel_values": np.asarray(prepared["pixel_values"], dtype=np.float32)}
        images = [self._keeping_proportions(picture) for picture in pictures]
        grids = [tuple(side // self.patch_size for side in image.shape[1:]) for image in images]
        tokens = [cut_into_tokens(torch.from_numpy(image), self.patch_size).numpy() for image in images]
        return {"pixel_values": np.concatenate(tokens), "image_grids": np.array(grids, dtype=np.int64)}

    def _keeping_proportions(self, picture: Image.Image) -> np.ndarray:
        """Normalised pixels, float32 `[3, height, width]`, of a size that `native_size` gives."""
        assert self.min_pixels is not None and self.max_pixels is not None
        processor = self.image_processor
        height, width = native_size(picture.width, picture.height, self.patch_size, self.min_pixels, self.max_pixels)
        image = np.moveaxis(np.asarray(picture.resize((width, height), processor.resample)), -1, 0)
        layout = {"data_format": "channels_first", "input_data_format": "channels_first"}
        if processor.do_rescale:
            image = rescale(image, processor.rescale_factor, **layout)
        if processor.do_normalize:
            image = normalize(image, processor.image_mean, processor.image_std, **layout)
        return np.ascontiguousarray(image, dtype=np.float32)

    def _count_tokens(self, data: dict[str, np.ndarray]) -> list[int]:
        """Visual tokens of each picture."""
        if "image_grids" in data:
            return data["image_grids"].prod(axis=1).tolist()
        num_pictures, _, height, width = data["pixel_values"].shape
        return num_pictures * [(height // self.patch_size) * (width // self.patch_size)]


def native_size(width: int, height: int, side: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) to which a picture is resized: multiples of `side`, the picture's proportions as nearly as that
    allows, and an area from min_pixels to max_pixels. It is Qwen2.5-VL's own size wherever that keeps to max_pixels."""
    rows, columns = round(height / side), round(width / side)
    if rows * columns * side**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (math.floor(length / shrink / side) for length in (height, width))
    elif rows * columns * side**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(length * grow / side) for length in (height, width))
    rows, columns = max(1, rows), max(1, columns)
    # A picture may be so long that one token on its short side is already too many: the long side is cut down.
    max_tokens = max_pixels // side**2
    if rows * columns > max_tokens:
        rows = min(rows, max_tokens if rows >= columns else max(1, max_tokens // columns))
        columns = min(columns, max_tokens // rows)
    return rows * side, columns * side


def _count_places(text: str) -> int:
    """Places for pictures in a text without `<image>`; every image token must belong to one."""
    places, pads = text.count(_ONE_PICTURE), text.count(_IMAGE_PAD)
    if places != pads:
        raise ValueError(
            f"a text holds {pads} times {_IMAGE_PAD}, but {places} times {_ONE_PICTURE}; write {_PLACEHOLDER} for a "
            f"picture, and {_IMAGE_PAD} never alone"
        )
    return places


def _listed(images: Any) -> list[Any]:
    if images is None:
        return []
    return [images] if isinstance(images, (Image.Image, np.ndarray, Tensor, bytes, str, Path)) else list(images)


def _are_placed(texts: list[str], images: Any) -> bool:
    """Whether the texts already hold the place of every picture, so that a `<image>` in them is nothing but a word."""
    if images is None:
        return not any(_PLACED.search(_CODE.sub("", words)) for words in texts)
    num_pictures = sum(len(own) if isinstance(own, (list, tuple)) else 1 for own in _listed(images))
    return num_pictures == sum(words.count(_ONE_PICTURE) for words in texts)


def _in_order(images: Any, places: list[int]) -> list[Picture]:
    """All pictures in one list; given for each text, they are held against the places in that text."""
    images = _listed(images)
    if any(isinstance(own, (list, tuple)) for own in images):
        found = [len(own) for own in images]
        if found != places:
            raise ValueError(f"the texts have {places} places for pictures ({_PLACEHOLDER}), but {found} were given")
        return [picture for own in images for picture in own]
    if len(images) != sum(places):
        raise ValueError(
            f"the texts have {sum(places)} places for pictures ({_PLACEHOLDER}), but {len(images)} were given"
        )
    return images


def _write_out(texts: list[str], counts: list[int]) -> list[str]:
    """The texts with every picture's image token as many times as it has visual tokens."""
    remaining = iter(counts)
    written = []
    for text in texts:
        first, *others = text.split(_IMAGE_PAD)
        written.append(first + "".join(_IMAGE_PAD * next(remaining) + other for other in others))
    return written


def _opened(picture: Picture) -> Image.Image:
    """A picture wherever it comes from, not decoded yet. transformers' own `load_image` drops what is transparent and
    the upper bits of 16."""
    if isinstance(picture, TiffImagePlugin.TiffImageFile) and picture.filename and picture.tile:
        frame, picture = picture.tell(), _opened(Path(os.fsdecode(picture.filename)))
        picture.seek(frame)
    if isinstance(picture, Image.Image):
        return picture
    if not isinstance(picture, (bytes, str, Path)):
        return Image.fromarray(np.asarray(picture))
    content, name = _content(picture)
    try:
        # Not by its name: Pillow would map the file into memory, and garble a turned TIFF.
        return Image.open(io.BytesIO(content))
    except UnidentifiedImageError:  # its message names an object in memory
        raise ValueError(f"{name} is {_kind(content)}, but no picture that Pillow can read") from None


def _content(picture: bytes | str | Path) -> tuple[bytes, str]:
    """The bytes of a picture's file, and what messages call it."""
    if isinstance(picture, bytes):
        return picture, f"a picture of {len(picture)} bytes"
    name = str(picture) if len(str(picture)) <= 200 else f"{str(picture)[:60]}..."
    if isinstance(picture, str) and _ADDRESS.match(picture):
        with urlopen(picture, timeout=_PATIENCE_SECONDS) as answer:
            return answer.read(), name
    if isinstance(picture, Path) or os.path.isfile(picture):
        return Path(picture).read_bytes(), name
    try:
        content = base64.b64decode("".join(picture.split()), validate=True)
    except ValueError:
        content = b""
    if not content:
        raise ValueError(
            f"{name!r} is no file that exists, no address (http, https, data, file) and no base64 of a picture"
        )
    return content, f"{name!r}, read as base64 since there is no such file,"


def _kind(content: bytes) -> str:
    """What a file is that is no picture, as far as its first bytes say."""
    start = content[:256].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    found = next((kind for mark, kind in _OTHER_KINDS.items() if start.startswith(mark)), None)
    return found or (f"a file that begins {content[:8]!r}" if content else "empty")


# The same as in training, whose laver_megatron/data/read/images.py has these two functions, too.


def upright_rgb(image: Image.Image) -> Image.Image:
    """A picture in 8-bit RGB, turned upright as its EXIF or XMP tag says.

    What is transparent is laid over white; 16-bit grey is scaled to 8 bits.

    Raises:
        ValueError: floating-point pixels, which have no agreed range.
    """
    image.load()  # a PNG may say behind its pixels how it is to be turned; a TIFF is turned here, by Pillow
    turn = _UPRIGHT.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    picture = _opaque_rgb(image)
    return picture if turn is None else picture.transpose(turn)


def _opaque_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.mode.startswith("I"):  # I;16 and its kin, and I, which holds 16 bits too
        grey_HW = np.asarray(image.convert("I")).clip(0, 65535)
        grey_HW = np.where(grey_HW == image.info.get("transparency", -1), 65535, grey_HW) >> 8
        return Image.fromarray(grey_HW.astype(np.uint8), "L").convert("RGB")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
