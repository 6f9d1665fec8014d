"""The image encoders: one table of families, and what the program asks of an encoder's Hugging Face directory.

A new family is one file like its neighbours, one line in the table, and its place in the export; docs/encoders.md says
how.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laver_megatron.config.fields import Config, ConfigError
from laver_megatron.encoders.aimv2 import Aimv2
from laver_megatron.encoders.clip import Clip, Siglip
from laver_megatron.encoders.dinov2 import Dinov2
from laver_megatron.encoders.interface import EncoderShape, Family, ImagePreprocessor
from laver_megatron.encoders.patches import Patches
from laver_megatron.encoders.processor_values import check_processor
from laver_megatron.encoders.qwen2_5_vl import Qwen25VL
from laver_megatron.hf.files import read_image_processor
from laver_megatron.hf.shape import VISION_PART, read_part

if TYPE_CHECKING:  # imported where an encoder is built: the planner, which reads shapes, needs no torch
    import torch
    from transformers import PreTrainedModel

    from laver_megatron.encoders.modules import ImageEncoder

FAMILIES: tuple[Family, ...] = (Siglip(), Clip(), Dinov2(), Aimv2(), Qwen25VL(), Patches())
FAMILY_OF = {model_type: family for family in FAMILIES for model_type in family.model_types}

__all__ = [
    "FAMILIES", "EncoderShape", "ImagePreprocessor", "build_encoder", "check_encoder",
    "encoder_facts", "encoder_settings", "encoder_tensor_sizes", "idle_parameters", "open_preprocessor", "read_encoder",
    "with_target_size",
]  # fmt: skip


def read_encoder(directory: str | Path) -> EncoderShape:
    """The image encoder described by `directory`/config.json: a vision model, alone or as a part of a larger one, or
    that of a LaVer export.

    Raises:
        ConfigError: a missing file or size, or an encoder of no family that is known.
    """
    path, family, vision = _find(directory)
    return family.shape(vision, path)


def encoder_settings(directory: str | Path) -> dict[str, Any]:
    """config.json of an encoder's directory, cut down to the vision model, with its own model_type and with what
    transformers assumes where the file is silent.

    Raises:
        ConfigError: as `read_encoder`.
    """
    path, family, vision = _find(directory)
    return vision | {"model_type": family.shape(vision, path).model_type}


def open_preprocessor(directory: str | Path, max_image_tokens: int | None = None) -> ImagePreprocessor:
    """The image processor of an encoder's directory. max_image_tokens: visual tokens of one image at most; None: as the
    processor says.

    It is always transformers' PIL class: the torchvision one resizes a little differently, and training and use of a
    model must not depend on what happens to be installed.

    Raises:
        ValueError: a file that is missing or cannot be read, a processor that does not fit the encoder, or images of
            more tokens than allowed that cannot be shrunk.
    """
    from transformers import AutoImageProcessor  # here, because importing it takes seconds

    path, family, vision = _find(directory)
    shape = family.shape(vision, path)
    file, _ = read_image_processor(Path(directory))
    try:
        processor = AutoImageProcessor.from_pretrained(file.parent, backend="pil", local_files_only=True)
    except Exception as error:  # transformers raises what it likes on files of other kinds
        raise ValueError(f"{file}: cannot be read ({error})") from error
    if getattr(processor, "backend", "pil") != "pil":
        raise ValueError(f"{file}: {type(processor).__name__} has no PIL version in transformers")
    check_processor(processor, family, shape, file)
    return family.preprocessor(processor, shape, file, max_image_tokens)


def build_encoder(
    directory: str | Path, feature_layer: int | None, dtype: torch.dtype, *, load_weights: bool
) -> ImageEncoder:
    """The encoder of a Hugging Face directory, with its weights or (to be loaded over) without. feature_layer: None for
    the family's default. Its idle parameters do not train.

    Raises:
        ValueError: a layer that it does not have; with weights, files that are damaged.
    """
    from laver_megatron.encoders.loading import cast_weights, load_checked

    path, family, vision = _find(directory)
    shape = family.shape(vision, path)
    layer = shape.feature_layer(feature_layer)
    model = _model_without_memory(directory) if load_weights else family.model(vision)
    if model is not None:
        if load_weights:
            model = load_checked(model, Path(directory), dtype)
        else:
            cast_weights(model, dtype)
        parameters = dict(model.named_parameters())
        for name in idle_parameters(shape, parameters, layer):
            parameters[name].requires_grad_(False)
    return family.encoder(model, shape, layer)


def with_target_size(config: Config, shape: EncoderShape | None) -> Config:
    """The configuration with the vision head's output size set where the target decides it. shape: None if unknown."""
    size = None if shape is None else shape.target_size(config.objective.mim_target)
    return config if size is None else config.replace(vision_head_output_size=size)


def idle_parameters(shape: EncoderShape, names: Iterable[str], feature_layer: int | None) -> list[str]:
    """Those of an encoder's parameters that its features do not depend on: layers behind the one they are taken from,
    final norm, pooling head. feature_layer: None for the family's default.

    Raises:
        ValueError: a layer that the encoder does not have.
    """
    family, num_layers = FAMILY_OF[shape.model_type], shape.num_layers_run(feature_layer)
    return [name for name in names if family.is_idle(name, num_layers)]


def encoder_tensor_sizes(directory: str | Path) -> dict[str, tuple[int, ...]]:
    """Name and size of every tensor of the image encoder, as transformers builds it; nothing is allocated.

    Raises:
        ValueError: settings from which transformers builds none.
    """
    model = _model_without_memory(directory)
    return {} if model is None else {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}


def _model_without_memory(directory: str | Path) -> PreTrainedModel | None:
    import torch

    path, family, vision = _find(directory)
    try:
        with torch.device("meta"):
            return family.model(vision)
    except Exception as error:  # transformers raises what it likes on settings of other types
        raise ValueError(f"{path}: transformers builds no image encoder from it: {error}") from error


def check_encoder(directory: str | Path, *, with_weights: bool) -> None:
    """Checks that transformers builds the encoder, and with_weights by their headers that the safetensors are its own.

    Raises:
        ValueError: settings of which no encoder can be built; missing, misshapen or too many tensors.
    """
    from laver_megatron.encoders.loading import check_headers

    model = _model_without_memory(directory)
    if with_weights and model is not None:
        check_headers(model, Path(directory))


def encoder_facts(directory: str | Path) -> dict[str, Any]:
    """All that an encoder's features and number of tokens depend on, its weights excepted: the settings that
    transformers' class of them has, and how the image processor makes pixels.

    Raises:
        ValueError: as `read_encoder` and `open_preprocessor`.
    """
    path, family, vision = _find(directory)
    classes = family.classes(vision)
    names = vision if classes is None else classes[0].__annotations__
    facts = {name: vision.get(name) for name in names if not name.startswith("_") and name != "model_type"}
    preprocessor = open_preprocessor(directory)
    steps = ["resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"]
    if not family.shape(vision, path).is_native:
        steps += ["do_resize", "size", "do_center_crop", "crop_size"]
    of_processor = {name: getattr(preprocessor.processor, name, None) for name in steps}
    facts |= {name: list(value) if isinstance(value, tuple) else value for name, value in of_processor.items()}
    return facts | {"images": preprocessor.settings}


def _find(directory: str | Path) -> tuple[Path, Family, dict[str, Any]]:
    """config.json of an encoder, its family, and the settings of the vision model in it, completed."""
    path, content = read_part(directory, VISION_PART)
    model_type = content.get("model_type")
    family = FAMILY_OF.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        known = ", ".join(FAMILY_OF)
        raise ConfigError([f"{path}: model_type is {model_type!r}, but the encoder must be one of {known}"])
    vision = content.get("vision_config", content)
    if not isinstance(vision, dict):
        raise ConfigError([f"{path}: vision_config is {vision!r}, but must be the settings of a vision model"])
    return path, family, family.complete(vision, path)
