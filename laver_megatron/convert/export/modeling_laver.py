"""LaVer for transformers: a SigLIP encoder, a connector and a Qwen2.5 decoder that sees images as it was trained to.

This file travels inside an exported checkpoint and needs torch, transformers (5.5 or newer) and Pillow only:

    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True)

Encoder and decoder are transformers' own modules. What is LaVer's: with `attention: mixed` the tokens of an image
see all of their own image (a later image sees earlier ones, never the reverse), and with `positions: 2d` or `mrope`
they are rotated by row and column.

Letters: B sequences of a batch, L tokens that a call of the model is given, K keys (those in the cache, then the L),
I images of a batch, N visual tokens of an image, E and H widths of encoder and decoder, F frequency pairs and D
width of an attention head.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    BatchFeature,
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
from transformers.image_utils import load_image
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

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


class LaverConfig(PreTrainedConfig):
    """Sizes of decoder (`text_config`) and encoder (`vision_config`), and how images enter the decoder.

    vision_feature_layer: index into the encoder's hidden states (0 is the embedding, -2 the last but one layer).
    attention: `mixed`, or `causal` for all tokens alike. positions: `1d`; `2d`, where even frequency pairs turn with
    the row and odd ones with the column; `mrope`, Qwen2.5-VL's contiguous sections. image_token_id: the token that
    stands for one visual token.

    Raises:
        ValueError: an unknown attention or positions, or rotary scaling or a sliding window in the decoder.
    """

    model_type = "laver"
    sub_configs = {"text_config": Qwen2Config, "vision_config": SiglipVisionConfig}

    def __init__(
        self,
        text_config: dict | Qwen2Config | None = None,
        vision_config: dict | SiglipVisionConfig | None = None,
        vision_feature_layer: int = -2,
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
        self.vision_config = (
            vision_config
            if isinstance(vision_config, SiglipVisionConfig)
            else SiglipVisionConfig(**(vision_config or {}))
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

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the visual tokens of an image: whole patches, in raster order."""
        side = self.vision_config.image_size // self.vision_config.patch_size
        return side, side


# --- where the images are, and what follows from it ------------------------------------------------------


def locate_images(input_ids_BL: Tensor, image_token_id: int, tokens_per_image: int) -> tuple[Tensor, Tensor]:
    """For every token the number of its image within the sequence (-1 for text) and its place in that image, int64
    `[B, L]` both. Images may touch.

    Raises:
        ValueError: image tokens that are not whole images, each in one piece.
    """
    visual_BL = input_ids_BL == image_token_id
    count_BL = visual_BL.long().cumsum(1) - 1
    image_BL = torch.where(visual_BL, count_BL // tokens_per_image, -1)
    place_BL = torch.where(visual_BL, count_BL % tokens_per_image, 0)
    counts = visual_BL.sum(1).tolist()
    for row, count in enumerate(counts):
        if count % tokens_per_image:
            raise ValueError(
                f"sequence {row} of the batch holds {count} image tokens, which is no multiple of the "
                f"{tokens_per_image} of an image; let the processor write them, and do not truncate"
            )
    follows_BL = nn.functional.pad(visual_BL[:, :-1], (1, 0), value=False)
    torn_B = ((place_BL > 0) & ~follows_BL).any(1)
    if torn_B.any():
        raise ValueError(
            f"sequence {int(torn_B.nonzero()[0])} of the batch has other tokens between the {tokens_per_image} image "
            "tokens of one image; let the processor write them"
        )
    return image_BL, place_BL


def count_positions(
    image_BL: Tensor, place_BL: Tensor, real_BL: Tensor, start_B: Tensor, grid: tuple[int, int], positions: str
) -> tuple[Tensor, Tensor]:
    """Position indices (t, row, column), int64 `[3, B, L]`, and the next free index `[B]`.

    Text carries three equal indices. An image's tokens stand at the index where it starts plus row and column;
    text goes on at the largest index used + 1. Padding (real_BL is False) takes no index. start_B: the first index.
    """
    visual_BL, (rows, columns) = image_BL >= 0, grid
    advance_BL = real_BL.long()
    if positions != "1d":
        # An image moves the count on by its longer side, at its last token.
        last_BL = visual_BL & (place_BL == rows * columns - 1)
        advance_BL = torch.where(visual_BL, last_BL * max(rows, columns), advance_BL)
    counted_BL = advance_BL.cumsum(1)
    base_BL = start_B[:, None] + counted_BL - advance_BL
    next_B = start_B + counted_BL[:, -1]
    if positions == "1d":
        return base_BL.expand(3, -1, -1), next_B
    row_BL, column_BL = place_BL // columns * visual_BL, place_BL % columns * visual_BL
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
    """Two linear layers with GELU from the encoder's features to the decoder's width: `[I, N, E] -> [I, N, H]`."""

    def __init__(self, config: LaverConfig) -> None:
        super().__init__()
        hidden_size = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features_INE: Tensor) -> Tensor:
        return self.linear_2(nn.functional.gelu(self.linear_1(features_INE)))


class LaverForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Text and images to text. `forward` is that of transformers' decoders with `pixel_values` beside the tokens:
    the images of all sequences of the batch, one after the other, `[I, 3, height, width]`.

    Raises:
        ValueError: an attention kernel that cannot compute this model.
    """

    config_class = LaverConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Qwen2DecoderLayer", "SiglipEncoderLayer", "SiglipMultiheadAttentionPoolingHead"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = _supports_flex_attn = _supports_flash_attn = _supports_attention_backend = True

    def __init__(self, config: LaverConfig) -> None:
        super().__init__(config)
        self.vision_tower = SiglipVisionModel(config.vision_config)
        self.multi_modal_projector = LaverConnector(config)
        self.language_model = Qwen2ForCausalLM(config.text_config)
        self.language_model.model.rotary_emb = LaverRotaryEmbedding(config.text_config, config.positions)
        self._refuse_kernel()
        self.post_init()

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

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Visual tokens `[I, N, H]` of normalised pixels `[I, 3, height, width]`.

        Raises:
            ValueError: pixels of another size than the encoder's.
        """
        size = self.config.vision_config.image_size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[-2:]) != (size, size):
            raise ValueError(
                f"pixel_values are of shape {tuple(pixel_values.shape)}, but the encoder takes [images, 3, "
                f"{size}, {size}]; let the processor prepare them"
            )
        pixels = pixel_values.to(self.vision_tower.device, self.vision_tower.dtype)
        hidden_states = self.vision_tower(pixels, output_hidden_states=True).hidden_states
        return self.multi_modal_projector(hidden_states[self.config.vision_feature_layer])

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
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """attention_mask: int or bool `[B, K]`, 0 for padding on either side; a mask of four dimensions (or a dict
        of them) is used as it is. position_ids: `[3, B, L]`, or `[B, L]` for text; counted where not given. labels:
        the tokens, -100 where there is nothing to learn; they are shifted here.

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
        embeds_BLH, image_BL, place_BL = self._embed(input_ids, inputs_embeds, pixel_values, num_past)
        position_ids = self._positions(image_BL, place_BL, attention_mask, position_ids, past_key_values, num_past)
        outputs = self.language_model.model(
            inputs_embeds=embeds_BLH,
            attention_mask=self._mask(image_BL, embeds_BLH, attention_mask, past_key_values, num_past),
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
        self, input_ids_BL: Tensor | None, embeds_BLH: Tensor | None, pixel_values: Tensor | None, num_past: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What goes into the decoder, words and visual tokens, and where the images are (see `locate_images`)."""
        if (input_ids_BL is None) == (embeds_BLH is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if embeds_BLH is None:
            embeds_BLH = self.get_input_embeddings()(input_ids_BL)
        image_BL, place_BL = self._images(input_ids_BL, embeds_BLH, pixel_values, num_past)
        if pixel_values is not None:
            visual_INH = self.get_image_features(pixel_values).to(embeds_BLH.device, embeds_BLH.dtype)
            embeds_BLH = embeds_BLH.masked_scatter((image_BL >= 0).unsqueeze(-1), visual_INH)
        return embeds_BLH, image_BL, place_BL

    def _images(
        self, input_ids_BL: Tensor | None, embeds_BLH: Tensor, pixel_values: Tensor | None, num_past: int
    ) -> tuple[Tensor, Tensor]:
        """Images and places of the tokens (see `locate_images`), held against the number of pictures."""
        none_BL = torch.full(embeds_BLH.shape[:2], -1, device=embeds_BLH.device)
        nothing = none_BL, torch.zeros_like(none_BL)
        num_images = 0 if pixel_values is None else pixel_values.shape[0]
        if input_ids_BL is None:
            if num_images:
                raise ValueError(f"{num_images} pixel_values with inputs_embeds: images need input_ids")
            return nothing
        if num_past and pixel_values is None and input_ids_BL.shape[1] == 1:
            return nothing  # one step of decoding: an image was never cut in two, so this is a word
        rows, columns = self.config.grid
        num_tokens = int((input_ids_BL == self.config.image_token_id).sum())
        if num_tokens != num_images * rows * columns:
            raise ValueError(
                f"the text holds {num_tokens} image tokens, but pixel_values holds {num_images} images of "
                f"{rows * columns} tokens each ({rows} x {columns} patches); let the processor prepare both"
            )
        return locate_images(input_ids_BL, self.config.image_token_id, rows * columns)

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
        image_BL: Tensor,
        place_BL: Tensor,
        attention_mask: Any,
        position_ids: Tensor | None,
        past_key_values: Any,
        num_past: int,
    ) -> Tensor:
        """Positions of the tokens; `[B, L]` with `1d`, which every kernel understands.

        Behind an image of 2D positions, a token's index is not the number of tokens before it. The difference,
        one number a sequence, is kept with the cache, to which it belongs.
        """
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
            position_3BL, next_B = count_positions(
                image_BL, place_BL, real_BK[:, num_past:], num_before_B + offset_B, self.config.grid,
                self.config.positions,
            )  # fmt: skip
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
            inputs["pixel_values"] = None
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
        pixel_values = kwargs.pop("pixel_values", None)
        if pixel_values is not None and expand_size > 1 and input_ids is not None:
            rows, columns = self.config.grid
            counts = (input_ids == self.config.image_token_id).sum(1).tolist()
            own = pixel_values.split([count // (rows * columns) for count in counts])
            pixel_values = torch.cat([pictures for pictures in own for _ in range(expand_size)])
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        if pixel_values is not None:
            kwargs["pixel_values"] = pixel_values
        return input_ids, kwargs


# --- the processor ---------------------------------------------------------------------------------------

Picture = Image.Image | np.ndarray | Tensor | str | Path


class LaverProcessor(ProcessorMixin):
    """Texts and pictures to what the model takes, exactly as in training.

    In a text, `<image>` or `<|vision_start|><|image_pad|><|vision_end|>` stands for one picture. patch_size: side in
    pixels of what becomes one visual token.
    """

    # Where files come from; for the image processor, which is loaded once more.
    _FILE_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        patch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        if patch_size is None:
            raise ValueError("processor_config.json names no patch_size; export the checkpoint again")
        self.patch_size = patch_size
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
        """input_ids and attention_mask `[B, L]`, and pixel_values float32 `[I, 3, height, width]` if there are images.

        images: pictures (PIL, uint8 arrays, paths, addresses) of all texts in order, or a list of them for each
        text. All further arguments go to the tokenizer (`return_tensors`, `padding`, ...); batches are padded on the
        left unless they say otherwise.

        Raises:
            ValueError: no text, more or fewer pictures than places for them, image tokens spelt out, videos or
                audio, options for pictures.
        """
        if videos is not None or audio is not None:
            raise ValueError("this model reads text and pictures; it takes no videos and no audio")
        if images_kwargs:
            raise ValueError(f"pictures are prepared as in training; {', '.join(images_kwargs)} cannot be chosen")
        if text is None:
            raise ValueError(f"text is missing; a picture is used where the text says {_PLACEHOLDER}")
        texts = [text] if isinstance(text, str) else list(text)
        texts = [words.replace(_PLACEHOLDER, _ONE_PICTURE) for words in texts]
        pictures = _in_order(images, [_count_places(words) for words in texts])
        data: dict[str, Any] = {}
        counts: list[int] = []
        if pictures:
            prepared = self.image_processor(images=[_upright(picture) for picture in pictures], return_tensors="np")
            data["pixel_values"] = np.asarray(prepared["pixel_values"], dtype=np.float32)
            _, _, height, width = data["pixel_values"].shape
            counts = len(pictures) * [(height // self.patch_size) * (width // self.patch_size)]
        options = {"padding_side": "left", **(common_kwargs or {}), **(text_kwargs or {}), **kwargs}
        return_tensors = options.pop("return_tensors", None)
        tokens = self.tokenizer(_write_out(texts, counts), **options)
        return BatchFeature({**tokens, **data}, tensor_type=return_tensors)


def _count_places(text: str) -> int:
    """Places for pictures in a text without `<image>`; every image token must belong to one."""
    places, pads = text.count(_ONE_PICTURE), text.count(_IMAGE_PAD)
    if places != pads:
        raise ValueError(
            f"a text holds {pads} times {_IMAGE_PAD}, but {places} times {_ONE_PICTURE}; write {_PLACEHOLDER} for a "
            f"picture, and {_IMAGE_PAD} never alone"
        )
    return places


def _in_order(images: Any, places: list[int]) -> list[Picture]:
    """All pictures in one list; given for each text, they are held against the places in that text."""
    if images is None:
        images = []
    elif isinstance(images, (Image.Image, np.ndarray, Tensor, str, Path)):
        images = [images]
    if any(isinstance(own, (list, tuple)) for own in images):
        found = [len(own) for own in images]
        if found != places:
            raise ValueError(f"the texts have {places} places for pictures ({_PLACEHOLDER}), but {found} were given")
        return [picture for own in images for picture in own]
    if len(images) != sum(places):
        raise ValueError(
            f"the texts have {sum(places)} places for pictures ({_PLACEHOLDER}), but {len(images)} were given"
        )
    return list(images)


def _write_out(texts: list[str], counts: list[int]) -> list[str]:
    """The texts with every picture's image token as many times as it has visual tokens."""
    remaining = iter(counts)
    written = []
    for text in texts:
        first, *others = text.split(_IMAGE_PAD)
        written.append(first + "".join(_IMAGE_PAD * next(remaining) + other for other in others))
    return written


def _upright(picture: Picture) -> Image.Image:
    """A picture in RGB, turned upright as its EXIF tag says."""
    if isinstance(picture, Image.Image):
        image = picture
    elif isinstance(picture, (str, Path)):
        image = load_image(str(picture))
    else:
        image = Image.fromarray(np.asarray(picture))
    return ImageOps.exif_transpose(image).convert("RGB")
