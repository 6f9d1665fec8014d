"""Forward FLOPs of an image encoder, exactly, from its shape and what a batch holds; the convention is that of `flops`.

A visual token is the connector's; the encoder itself computes on patches (of which a visual token has one or, merged,
several) and on class and register tokens. Areas are numbers of (query, key) pairs, of visual tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from laver_megatron.encoders.interface import EncoderShape


@dataclass(frozen=True)
class EncoderWork:
    """What a batch holds for an encoder. area: sum over images of the square of their visual tokens; window_area: the
    same over the windows of images, 0 where the encoder has none."""

    num_images: int
    num_visual_tokens: int
    area: int
    window_area: int = 0

    @classmethod
    def of_grids(cls, grids: Iterable[tuple[int, int]], shape: EncoderShape) -> EncoderWork:
        """grids: (rows, columns) of visual tokens of each image."""
        grids = list(grids)
        sizes = [rows * columns for rows, columns in grids]
        return cls(len(grids), sum(sizes), sum(size**2 for size in sizes), window_area(grids, shape.window_tokens))


@dataclass(frozen=True)
class EncoderFlops:
    """Forward FLOPs per unit of work, all layers that run together. A token is a patch, a class or a register token."""

    embedding_per_patch: int = 0
    layers_per_token: int = 0
    attention_per_pair: int = 0
    attention_per_window_pair: int = 0
    merger_per_visual_token: int = 0
    patches_per_visual_token: int = 1
    num_prefix_tokens: int = 0

    def forward(self, work: EncoderWork) -> tuple[int, int]:
        """(embedding, all behind it) of a batch."""
        merged, prefix = self.patches_per_visual_token, self.num_prefix_tokens
        num_patches = merged * work.num_visual_tokens
        num_tokens = num_patches + prefix * work.num_images
        # Each image's (patches + prefix) squared.
        area = merged**2 * work.area + 2 * prefix * num_patches + prefix**2 * work.num_images
        behind = (
            num_tokens * self.layers_per_token
            + area * self.attention_per_pair
            + merged**2 * work.window_area * self.attention_per_window_pair
            + work.num_visual_tokens * self.merger_per_visual_token
        )
        return num_patches * self.embedding_per_patch, behind


def encoder_flops(shape: EncoderShape, num_layers: int | None = None) -> EncoderFlops:
    """num_layers: how many of its layers run, where the features are taken before the last; None: all. Norms, pooling
    heads and what runs behind the features do not count."""
    num_layers = shape.num_layers if num_layers is None else num_layers
    hidden, merged = shape.hidden_size, shape.merge_size**2
    num_full = num_layers
    if shape.window_size is not None:
        num_full = sum(layer < num_layers for layer in shape.full_attention_layers)
    merger = 0
    if shape.merge_size > 1:  # two linear layers on the patches of a visual token side by side
        merger = 2 * (merged * hidden) ** 2 + 2 * merged * hidden * shape.feature_size
    linear = 8 * hidden**2 + 2 * shape.num_mlp_matrices * hidden * shape.intermediate_size
    return EncoderFlops(
        embedding_per_patch=2 * hidden * shape.num_channels * shape.temporal_patch_size * shape.patch_size**2,
        layers_per_token=num_layers * linear,
        attention_per_pair=4 * num_full * hidden,
        attention_per_window_pair=4 * (num_layers - num_full) * hidden,
        merger_per_visual_token=merger,
        patches_per_visual_token=merged,
        num_prefix_tokens=shape.num_prefix_tokens,
    )


@dataclass(frozen=True)
class ImageCost:
    """What an image costs an encoder, by its visual tokens, up to a factor: in proportion to them, and, for attention
    over whole images, to their pairs."""

    per_token: int = 1
    per_pair: int = 0

    def __call__(self, num_tokens: int) -> int:
        return num_tokens * self.per_token + num_tokens**2 * self.per_pair


BY_TOKENS = ImageCost()


def image_cost(shape: EncoderShape, num_layers: int | None = None) -> ImageCost:
    """What dividing images over ranks needs of it: FLOPs of an image by its visual tokens, windows taken as full."""
    flops = encoder_flops(shape, num_layers)
    merged = flops.patches_per_visual_token
    per_patch = flops.embedding_per_patch + flops.layers_per_token
    window_tokens = (shape.window_tokens or 0) ** 2
    return ImageCost(
        per_token=merged * per_patch
        + merged**2 * window_tokens * flops.attention_per_window_pair
        + flops.merger_per_visual_token
        or 1,
        per_pair=merged**2 * flops.attention_per_pair,
    )


def window_area(grids: Iterable[tuple[int, int]], window_tokens: int | None) -> int:
    """Pairs of visual tokens that share a window of an image; windows begin at its upper left, those at its right and
    lower border are smaller. window_tokens: side of a window, None: there are none."""
    if window_tokens is None:
        return 0

    def squares(side: int) -> int:
        whole, rest = divmod(side, window_tokens)
        return whole * window_tokens**2 + rest**2

    return sum(squares(rows) * squares(columns) for rows, columns in grids)
