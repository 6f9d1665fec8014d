"""Rescaling and normalising by a table: an 8-bit picture has only 256 values of each colour.

The numbers are those of transformers' image processor to the bit, at a tenth of the time: it goes over the picture
several times, in double precision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:  # importing either takes seconds
    from PIL import Image
    from transformers import BaseImageProcessor


class PixelTable:
    """The pixel that each value of each colour becomes, made by the processor's own steps."""

    def __init__(self, processor: BaseImageProcessor) -> None:
        values = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
        if processor.do_rescale:
            values = processor.rescale(values, processor.rescale_factor)
        if processor.do_normalize:
            values = processor.normalize(values, processor.image_mean, processor.image_std)
        table_3C = torch.from_numpy(np.ascontiguousarray(values[:, 0], dtype=np.float32))
        # numpy has no bf16, so its bits are looked up.
        self._tables = {dtype: _as_numpy(table_3C.to(dtype)) for dtype in (torch.float32, torch.bfloat16)}

    def __call__(self, picture: Image.Image, memory: Tensor | None = None) -> Tensor:
        """The pixels of an RGB picture, `[3, height, width]`, at the beginning of `memory` (flat; float32 or bfloat16,
        which they are rounded to) or in memory of their own, float32."""
        values_HW3 = np.asarray(picture)
        height, width, num_colours = values_HW3.shape
        memory = torch.empty(num_colours * height * width) if memory is None else memory
        pixels_3HW = memory[: num_colours * height * width].view(num_colours, height, width)
        for colour, table in enumerate(self._tables[memory.dtype]):
            # "clip" lets numpy write to `out` directly; nothing is out of range.
            np.take(table, values_HW3[..., colour], out=_as_numpy(pixels_3HW[colour]), mode="clip")
        return pixels_3HW


def _as_numpy(tensor: Tensor) -> np.ndarray:
    """The same memory; of bfloat16 its bits."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
