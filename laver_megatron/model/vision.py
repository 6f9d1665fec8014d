"""The image encoder: pixels in, one feature vector per visual token out, loaded from a Hugging Face directory.

Letters: I images, C height width of the pixels, N visual tokens of one image, E feature width.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, SiglipVisionConfig, SiglipVisionModel


class ImageEncoder(nn.Module):
    """A SigLIP-type vision transformer of fixed resolution: `[I, 3, height, width] -> [I, N, E]`.

    Features are the hidden states after the layer `feature_layer` counts to (-2: the last but one, as the
    official code takes them, before the final norm); SigLIP has no class token, so every feature is a patch.
    """

    def __init__(self, config: SiglipVisionConfig, feature_layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        num_layers = config.num_hidden_layers
        if not -num_layers - 1 <= feature_layer <= num_layers:
            raise ValueError(
                f"encoder_feature_layer is {feature_layer}, but the encoder has {num_layers} layers; "
                f"choose from {-num_layers - 1} to {num_layers}"
            )
        self.feature_layer = feature_layer
        self.feature_size = config.hidden_size
        self.model = SiglipVisionModel(config).to(dtype)

    @classmethod
    def from_directory(
        cls, directory: str | Path, feature_layer: int, dtype: torch.dtype, load_weights: bool
    ) -> "ImageEncoder":
        """Builds the encoder of a Hugging Face directory, with its weights or (to be loaded over) without."""
        config = AutoConfig.from_pretrained(directory)
        config = getattr(config, "vision_config", config)
        encoder = cls(config, feature_layer, dtype)
        if load_weights:
            encoder.model = SiglipVisionModel.from_pretrained(directory, dtype=dtype)
        return encoder

    def forward(self, pixels_ICHW: Tensor) -> Tensor:
        pixels_ICHW = pixels_ICHW.to(self.model.dtype)
        return self.model(pixels_ICHW, output_hidden_states=True).hidden_states[self.feature_layer]
