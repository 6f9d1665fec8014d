"""Tensors from the host to the device, without either waiting for the other."""

import torch
from torch import Tensor


def on_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of the host's on the device, in the same dtype or another. To a GPU it goes through pinned memory: from
    any other the host would wait for the copy."""
    tensor = tensor.to(dtype or tensor.dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
