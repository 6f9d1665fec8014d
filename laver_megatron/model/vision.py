"""The image encoder: pixels in, one feature vector per visual token out, loaded from a Hugging Face directory.

Letters: I images, C height width of the pixels, N visual tokens of one image, E feature width.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from laver_megatron.model.shape import VISION_PART, read_part


def vision_config(directory: str | Path) -> SiglipVisionConfig:
    """transformers' settings of the image encoder in a Hugging Face directory, a LaVer export included."""
    content = read_part(directory, VISION_PART)[1]
    return SiglipVisionConfig.from_dict(content.get("vision_config", content))


def encoder_tensor_sizes(directory: str | Path) -> dict[str, tuple[int, ...]]:
    """Name and size of every tensor of the image encoder, as transformers builds it; nothing is allocated.

    Raises:
        ValueError: settings from which transformers builds none.
    """
    try:
        with torch.device("meta"):
            model = SiglipVisionModel(vision_config(directory))
    except Exception as error:  # transformers raises what it likes on settings of other types
        message = f"{directory}/config.json: transformers builds no image encoder from it: {error}"
        raise ValueError(message) from error
    return {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}


def _load_checked(directory: Path, dtype: torch.dtype) -> SiglipVisionModel:
    """The encoder with its weights; transformers would fill what is missing with random numbers, which differ
    from rank to rank.

    Raises:
        ValueError: unreadable files, and missing, misshapen or not finite tensors, by name.
    """
    try:
        model, info = SiglipVisionModel.from_pretrained(
            directory, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, use_safetensors=True
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the encoder of {directory} cannot be read: {error}; download or copy it again") from error
    missing = sorted(info["missing_keys"])
    misshapen = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"])
    not_finite = sorted(name for name, weight in model.named_parameters() if not weight.isfinite().all())
    for problem, names in (
        ("lacks", missing),
        ("has, in another size than its config.json says,", misshapen),
        ("has NaN or infinite values in", not_finite),
    ):
        if names:
            raise ValueError(
                f"the encoder of {directory} {problem} {len(names)} tensors, such as {', '.join(names[:3])}; "
                "download or copy it again"
            )
    return model


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
        encoder = cls(vision_config(directory), feature_layer, dtype)
        if load_weights:
            encoder.model = _load_checked(Path(directory), dtype)
        return encoder

    def forward(self, pixels_ICHW: Tensor) -> Tensor:
        pixels_ICHW = pixels_ICHW.to(self.model.dtype)
        return self.model(pixels_ICHW, output_hidden_states=True).hidden_states[self.feature_layer]
