"""Visual contrastive decoding (Leng et al., CVPR 2024): words that a picture makes likelier.

Needs torch and transformers alone; examples/chat.py uses it, too.

Letters: B sequences, L tokens so far, W words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessor

CUTOFF = 0.1  # of the paper: beta
_GREY = (128, 128, 128)


def contrast_logits(right_BW: Tensor, blank_BW: Tensor, alpha: float, cutoff: float = CUTOFF) -> Tensor:
    """(1 + alpha) right - alpha blank, and -inf for words that are implausible with the picture: those with less than
    `cutoff` times the probability of the likeliest.

    Args:
        right_BW, blank_BW: logits with the picture, and with a blank one in its place.
    """
    implausible_BW = right_BW < right_BW.amax(-1, keepdim=True) + math.log(cutoff)
    return ((1 + alpha) * right_BW - alpha * blank_BW).masked_fill(implausible_BW, -math.inf)


def blank_like(picture: Image.Image) -> Image.Image:
    """A picture of the same size in mean grey, which has as many tokens and shows nothing."""
    return Image.new("RGB", picture.size, _GREY)


class Contrast(LogitsProcessor):
    """`contrast_logits` for one call of `generate` with one sequence.

    Args:
        blank_inputs: what the model takes, as for `generate`, with a blank picture in the place of each.
    """

    def __init__(self, model: Any, blank_inputs: Mapping[str, Tensor], alpha: float) -> None:
        self._model, self._alpha = model, alpha
        self._inputs = dict(blank_inputs)
        self._cache: Any = None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids `[B, L]`, scores `[B, W]` with the picture."""
        assert len(input_ids) == 1, "one sequence at a time"
        if self._cache is not None:
            mask_BL = self._inputs["attention_mask"]
            mask_BL = torch.cat([mask_BL, mask_BL.new_ones(1, 1)], dim=1)
            self._inputs = {"input_ids": input_ids[:, -1:], "attention_mask": mask_BL}
        outputs = self._model(**self._inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = outputs.past_key_values
        return contrast_logits(scores, outputs.logits[:, -1].to(scores), self._alpha)
