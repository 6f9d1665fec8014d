"""The image encoders as modules: pixels to features. The families beside this file, which describe encoders, import it
only when one is built.

Letters: I images of one size, H W their pixels, P patches of all images, N visual tokens of an image, T those of all,
E feature width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from laver_megatron.encoders.interface import EncoderShape

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PreTrainedModel


class ImageEncoder(nn.Module, ABC):
    """Pixels to features. It computes the same in training as in use: a dropout of its own would make the numbers of a
    run depend on how the images are divided over the ranks."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.feature_size, self.token_size = shape.feature_size, shape.token_size

    @abstractmethod
    def forward(self, images: Sequence[Tensor]) -> Tensor:
        """images: `[3, H, W]` each, of any sizes. Returns the features of all visual tokens `[T, E]`, image after
        image, each in raster order, in the type of the weights (without weights, of the pixels).

        Raises:
            ValueError: pixels of a size that the encoder cannot take.
        """

    def train(self, mode: bool = True) -> ImageEncoder:
        return super().train(False)


class HiddenStateEncoder(ImageEncoder):
    """transformers' vision model, of which one of `hidden_states` becomes the features: 0 is the input of the first
    layer, n the output of layer n, -1 that of the last, before any final norm. Class and register tokens are dropped.
    """

    def __init__(self, model: PreTrainedModel, shape: EncoderShape, feature_layer: int) -> None:
        super().__init__(shape)
        self.model, self.shape, self.feature_layer = model, shape, feature_layer
        self.eval()

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        if self.shape.is_native:
            check_sizes(images, self.shape.token_size)
        return encode_by_size(images, self._features)

    def _features(self, pixels_I3HW: Tensor) -> Tensor:
        states = self.model(pixels_I3HW.to(self.model.dtype), output_hidden_states=True).hidden_states
        return states[self.feature_layer][:, self.shape.num_prefix_tokens :]


class PatchEncoder(ImageEncoder):
    """Has no weights; the features are of the pixels' type."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__(shape)

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        check_sizes(images, self.token_size)
        return torch.cat([token_pixels(pixels_3HW, self.token_size) for pixels_3HW in images])


class Qwen25VLEncoder(ImageEncoder):
    """transformers' vision model of Qwen2.5-VL; features are what its merger gives."""

    def __init__(self, model: PreTrainedModel, shape: EncoderShape) -> None:
        super().__init__(shape)
        self.model, self.shape = model, shape
        self.eval()

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        check_sizes(images, self.shape.token_size)
        size = self.shape.patch_size
        grids = [[1, pixels_3HW.shape[1] // size, pixels_3HW.shape[2] // size] for pixels_3HW in images]
        patches = torch.cat([image_patches(pixels_3HW, self.shape) for pixels_3HW in images])
        return self.model(patches, grid_thw=torch.tensor(grids, device=patches.device)).pooler_output


def image_patches(pixels_3HW: Tensor, shape: EncoderShape) -> Tensor:
    """The patches as Qwen's image processor lays them out: the squares that become one visual token in raster order,
    in each its patches in raster order, a patch as `[colour, time, row, column]`: `[P, 3 x time x patch x patch]`."""
    patch, merge, time = shape.patch_size, shape.merge_size, shape.temporal_patch_size
    colours, height, width = pixels_3HW.shape
    rows, columns = height // shape.token_size, width // shape.token_size
    squares = pixels_3HW.reshape(colours, rows, merge, patch, columns, merge, patch).permute(1, 4, 2, 5, 0, 3, 6)
    repeated = squares.unsqueeze(5).expand(rows, columns, merge, merge, colours, time, patch, patch)
    return repeated.reshape(rows * columns * merge**2, colours * time * patch**2)


def token_pixels(pixels_3HW: Tensor, token_size: int) -> Tensor:
    """The pixels of every visual token in raster order, each as `[colour, row, column]`: `[N, 3 x size x size]`. A
    border narrower than a token has none."""
    return unfold(pixels_3HW[None], token_size, stride=token_size)[0].t()


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


def check_sizes(images: Sequence[Tensor], token_size: int) -> None:
    """Whether pixels `[3, H, W]` divide into visual tokens.

    Raises:
        ValueError: the first that do not.
    """
    for number, pixels_3HW in enumerate(images):
        height, width = pixels_3HW.shape[1:]
        if height % token_size or width % token_size:
            raise ValueError(
                f"image {number} has {height} x {width} pixels, which visual tokens of {token_size} x {token_size} "
                "pixels do not divide; prepare it with the encoder's own preprocessor"
            )
