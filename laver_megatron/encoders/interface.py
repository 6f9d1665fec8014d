"""What an image encoder is to the rest of the program: a shape for arithmetic, a preprocessor for the data, a module
for the model, and a family that makes all three from a Hugging Face directory.

Letters: 3 colours, H W pixels of one image, N its visual tokens, T those of several images, E feature width.

Pixels are `[3, H, W]` everywhere between the reader and the encoder, in the dtype of the run. A visual token is a
patch, or a square of `merge_size` by `merge_size` patches, in raster order; a border narrower than a patch has none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laver_megatron.config.fields import ConfigError
from laver_megatron.hf.shape import is_size

if TYPE_CHECKING:  # importing them takes seconds, and the planner, which reads shapes, needs none
    from PIL import Image
    from torch import Tensor
    from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel

    from laver_megatron.encoders.modules import ImageEncoder


@dataclass(frozen=True, kw_only=True)
class EncoderShape:
    """An image encoder's sizes, as far as its config.json says them.

    Attributes:
        model_type: of config.json.
        feature_size: E, the width of one visual token's feature.
        num_layers, hidden_size, intermediate_size: of its transformer; 0 where it has none.
        num_mlp_matrices: 2, or 3 where the MLP is gated; 0 without one.
        patch_size: side of a patch in pixels. merge_size: patches on the side of one visual token.
        image_size: (height, width) in pixels that its table of positions was made for; None: native resolution.
        interpolates_positions: whether it takes other fixed sizes than that.
        num_prefix_tokens: class and register tokens, which stand before the patches and are no features.
        default_feature_layer: the hidden state that the features are by default; None: there is no choice.
        temporal_patch_size: images that one patch spans in time (an image is repeated).
        window_size: side in pixels of the windows to which attention is limited, but for the layers numbered in
            full_attention_layers; None: every layer sees the whole image.
    """

    model_type: str
    feature_size: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    patch_size: int
    image_size: tuple[int, int] | None
    default_feature_layer: int | None
    num_mlp_matrices: int = 2
    merge_size: int = 1
    interpolates_positions: bool = False
    num_prefix_tokens: int = 0
    num_channels: int = 3
    temporal_patch_size: int = 1
    window_size: int | None = None
    full_attention_layers: tuple[int, ...] = ()

    @property
    def is_native(self) -> bool:
        """Whether larger pictures have more visual tokens."""
        return self.image_size is None

    @property
    def has_weights(self) -> bool:
        return self.num_layers > 0

    @property
    def token_size(self) -> int:
        """Side of one visual token in pixels."""
        return self.patch_size * self.merge_size

    def target_size(self, target: str) -> int | None:
        """Numbers of one visual token that `mim_target` has the vision head predict; None for latent, of any size."""
        sizes = {"latent": None, "features": self.feature_size, "pixels": self.num_channels * self.token_size**2}
        return sizes[target]

    @property
    def window_tokens(self) -> int | None:
        """Side of a window of attention in visual tokens."""
        return None if self.window_size is None else self.window_size // self.token_size

    @property
    def num_tokens(self) -> int | None:
        """Visual tokens of an image of `image_size`; None at native resolution, where it depends on the picture."""
        if self.image_size is None:
            return None
        height, width = self.image_size
        return (height // self.token_size) * (width // self.token_size)

    def num_layers_run(self, asked: int | None) -> int | None:
        """How many layers run before the features; None: all. Raises as `feature_layer`."""
        layer = self.feature_layer(asked)
        return None if layer is None else layer % (self.num_layers + 1)

    def feature_layer(self, asked: int | None) -> int | None:
        """Which hidden state the features are: what is asked for, or the family's default.

        Raises:
            ValueError: a layer that the encoder does not have, or one asked for where there is no choice.
        """
        if self.default_feature_layer is None:
            if asked is not None:
                raise ValueError(
                    f"encoder_feature_layer is {asked}, but an encoder of type {self.model_type} has one output and no "
                    "choice of layers; leave it out"
                )
            return None
        layer = self.default_feature_layer if asked is None else asked
        if not -self.num_layers - 1 <= layer <= self.num_layers:
            raise ValueError(
                f"encoder_feature_layer is {layer}, but the encoder has {self.num_layers} layers; "
                f"use {-self.num_layers - 1} to {self.num_layers}"
            )
        return layer


class ImagePreprocessor(ABC):
    """Pictures to pixels as the encoder's own image processor makes them, and what a picture costs in tokens.

    Attributes:
        processor: transformers' image processor (its PIL version), for its mean, deviation and the like.
        token_size: side of a visual token in pixels.
    """

    def __init__(self, processor: BaseImageProcessor, token_size: int) -> None:
        from laver_megatron.encoders.pixel_table import PixelTable

        self.processor, self.token_size = processor, token_size
        self._table = PixelTable(processor)

    @property
    @abstractmethod
    def settings(self) -> str:
        """All that the number of visual tokens of a picture depends on, as a name for caches of counts."""

    @property
    @abstractmethod
    def most_tokens(self) -> int:
        """Visual tokens that a picture has at most."""

    @abstractmethod
    def size(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) of the pixels that a picture of this width and height becomes."""

    @abstractmethod
    def fitted(self, image: Image.Image) -> Image.Image:
        """A picture resized, and cropped where the encoder wants that, to its `size`."""

    @property
    def pixels_per_token(self) -> int:
        """Pixels that stand behind one visual token, at most."""
        return self.token_size**2

    def __call__(self, image: Image.Image, memory: Tensor | None = None) -> Tensor:
        """Normalised pixels of an RGB picture, `[3, H, W]`, those of transformers' processor to the bit.
        memory: flat, float32 or bfloat16 (rounded); the pixels are put at its beginning, or into float32 memory of
        their own."""
        return self._table(self.fitted(image), memory)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(rows, columns) of the visual tokens of a picture of this size in pixels."""
        height, width = self.size(width, height)
        return height // self.token_size, width // self.token_size

    def num_tokens(self, width: int, height: int) -> int:
        """Visual tokens of a picture of this size in pixels."""
        rows, columns = self.grid(width, height)
        return rows * columns

    def num_features(self, pixels_3HW: Tensor) -> int:
        """Features the encoder makes of these pixels."""
        _, height, width = pixels_3HW.shape
        return (height // self.token_size) * (width // self.token_size)


class Family(ABC):
    """Encoders of one architecture.

    Attributes:
        model_types: in config.json, of the vision model alone or of a larger model that has it as vision_config.
        processors: the image processors that may come with one, without their backend.
    """

    model_types: tuple[str, ...]
    processors: tuple[str, ...]

    @abstractmethod
    def classes(self, vision: Mapping[str, Any]) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]] | None:
        """transformers' classes of the vision model's settings and of the model; None if the family has no weights."""

    def complete(self, vision: dict[str, Any], path: Path) -> dict[str, Any]:
        """The vision model's settings in config.json at `path`, with transformers' defaults for those that are missing:
        published files may have nothing but model_type.

        Raises:
            ConfigError: a file of another format.
        """
        classes = self.classes(vision)
        if classes is None:
            return vision
        config_class, _ = classes
        assumed = config_class().to_dict()
        return {**{name: assumed[name] for name in config_class.__annotations__ if name in assumed}, **vision}

    @abstractmethod
    def shape(self, vision: dict[str, Any], path: Path) -> EncoderShape:
        """The sizes by the vision model's settings, completed, of config.json at `path`.

        Raises:
            ConfigError: sizes that are missing or cannot be.
        """

    @abstractmethod
    def preprocessor(
        self, processor: BaseImageProcessor, shape: EncoderShape, file: Path, max_image_tokens: int | None
    ) -> ImagePreprocessor:
        """file: what the processor was made from.

        Raises:
            ValueError: a processor that does not fit the encoder, or more tokens than max_image_tokens.
        """

    def model(self, vision: dict[str, Any]) -> PreTrainedModel | None:
        """transformers' own model with random weights; None if the family has no weights."""
        classes = self.classes(vision)
        if classes is None:
            return None
        config_class, model_class = classes
        # The vision model's settings may have been written with the whole model's type.
        return model_class(config_class.from_dict({**vision, "model_type": config_class.model_type}))

    def is_idle(self, name: str, num_layers: int | None) -> bool:
        """Whether features that are taken behind so many layers (None: there is no choice) do not depend on the
        parameter of this name. Such a one does not train: it has no gradient, and weight decay would shrink it."""
        return False

    @abstractmethod
    def encoder(self, model: PreTrainedModel | None, shape: EncoderShape, feature_layer: int | None) -> ImageEncoder:
        """Around what `model` has built or the weights were loaded into."""


def read_sizes(vision: dict[str, Any], names: Sequence[str], path: Path) -> dict[str, int]:
    """Positive integers out of a vision model's settings; the colours, which may go without saying, are 3.

    Raises:
        ConfigError: all that are missing or no such numbers, heads that do not divide hidden_size, or a patch that is
            larger than the image.
    """
    found = {"num_channels": 3, **vision}
    faults = [name for name in (*names, "num_channels") if not is_size(found.get(name))]
    if faults:
        raise ConfigError(
            [f"{path}: {', '.join(faults)} missing from the vision model's settings, or not a positive integer"]
        )
    if found["num_channels"] != 3:
        raise ConfigError([f"{path}: num_channels is {found['num_channels']}, but pictures have 3 colours"])
    sizes = {name: found[name] for name in (*names, "num_channels")}
    problems = []
    for heads in ("num_attention_heads", "num_heads"):
        if heads in sizes and sizes["hidden_size"] % sizes[heads]:
            problems.append(f"{path}: hidden_size {sizes['hidden_size']} is not a multiple of {heads} {sizes[heads]}")
    if "image_size" in sizes and sizes["patch_size"] > sizes["image_size"]:
        problems.append(f"{path}: patch_size {sizes['patch_size']} is above image_size {sizes['image_size']}")
    if problems:
        raise ConfigError([f"{problem}; copy the file from the original model" for problem in problems])
    return sizes
