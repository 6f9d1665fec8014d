"""Features that are a hidden state of a vision transformer.

Letters: I images of one size, H W their pixels, N visual tokens of an image, T those of all, E feature width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from laver_megatron.encoders.interface import EncoderShape, Family, ImageEncoder

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PreTrainedModel

_LAYER = re.compile(r"(?:^|\.)layers?\.(\d+)\.")  # in the name of a parameter, the number of its layer


class HiddenStateEncoder(ImageEncoder):
    """transformers' vision model, of which one of `hidden_states` becomes the features: 0 is the input of the first
    layer, n the output of layer n, -1 that of the last, before any final norm. Class and register tokens are dropped.
    """

    def __init__(self, model: PreTrainedModel, shape: EncoderShape, feature_layer: int) -> None:
        super().__init__(shape.feature_size)
        self.model, self.feature_layer, self.num_prefix_tokens = model, feature_layer, shape.num_prefix_tokens
        self.eval()

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        return encode_by_size(images, self._features)

    def _features(self, pixels_I3HW: Tensor) -> Tensor:
        states = self.model(pixels_I3HW.to(self.model.dtype), output_hidden_states=True).hidden_states
        return states[self.feature_layer][:, self.num_prefix_tokens :]


class HiddenStateFamily(Family):
    """Families whose features are a hidden state. behind_layers: beginnings of the names of parameters that no hidden
    state depends on, such as those of the final norm and of a pooling head."""

    behind_layers: tuple[str, ...]

    def is_idle(self, name: str, num_layers: int | None) -> bool:
        assert num_layers is not None
        layer = _LAYER.search(name)
        # Some versions of transformers have another module around the vision model.
        behind = name.removeprefix("vision_model.").startswith(self.behind_layers)
        return behind or (layer is not None and int(layer[1]) >= num_layers)

    def encoder(
        self, model: PreTrainedModel | None, shape: EncoderShape, feature_layer: int | None
    ) -> HiddenStateEncoder:
        assert model is not None and feature_layer is not None
        return HiddenStateEncoder(model, shape, feature_layer)


def encode_by_size(images: Sequence[Tensor], encode: Callable[[Tensor], Tensor]) -> Tensor:
    """The features of images of any sizes `[T, E]`, in their order; `encode` gets those of one size together:
    `[I, 3, H, W] -> [I, N, E]`."""
    numbers_of: dict[torch.Size, list[int]] = {}
    for number, pixels_3HW in enumerate(images):
        numbers_of.setdefault(pixels_3HW.shape, []).append(number)
    features: dict[int, Tensor] = {}
    for numbers in numbers_of.values():
        features_INE = encode(torch.stack([images[number] for number in numbers]))
        features.update(zip(numbers, features_INE, strict=True))
    return torch.cat([features[number] for number in range(len(images))])
