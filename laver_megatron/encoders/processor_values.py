"""Whether an image processor is one of the encoder's family, with values of which pixels can be made."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laver_megatron.encoders.interface import EncoderShape, Family
from laver_megatron.hf.shape import is_positive

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import BaseImageProcessor


def check_processor(processor: BaseImageProcessor, family: Family, shape: EncoderShape, file: Path) -> None:
    """file: what the processor was made from.

    Raises:
        ValueError: a processor of another family, or values of which no pixels can be made, by their field.
    """
    name = type(processor).__name__.removesuffix("Pil")
    if name not in family.processors:
        raise ValueError(
            f"{file}: image_processor_type is {name}, but an encoder of type {shape.model_type} comes with "
            f"{' or '.join(family.processors)}; copy both files from the same model"
        )
    if processor.do_resize or shape.is_native:
        _check_resample(processor.resample, file)
    if processor.do_rescale and not is_positive(processor.rescale_factor):
        raise ValueError(f"{file}: rescale_factor is {processor.rescale_factor!r}, but must be a number above 0")
    if processor.do_normalize:
        _check_colours("image_mean", processor.image_mean, file)
        _check_colours("image_std", processor.image_std, file)


def _check_resample(value: Any, file: Path) -> None:
    from PIL import Image

    try:
        Image.Resampling(value)
    except ValueError:
        known = ", ".join(f"{number.value} ({number.name.lower()})" for number in Image.Resampling)
        raise ValueError(f"{file}: resample is {value!r}, but Pillow's are {known}") from None


def _check_colours(name: str, values: Any, file: Path) -> None:
    """A number of each colour, or one for all; deviations are divided by."""
    found = list(values) if isinstance(values, (list, tuple)) else [values] * 3
    fits = is_positive if name == "image_std" else _is_finite
    if len(found) != 3 or not all(map(fits, found)):
        shown = found if isinstance(values, (list, tuple)) else values
        kind = "above 0" if name == "image_std" else "finite"
        raise ValueError(f"{file}: {name} is {shown!r}, but must be three numbers, one of each colour, all {kind}")


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
