"""Which attention kernels the GPU tests run, and in which dtype."""

from importlib.util import find_spec

import pytest
import torch

from tools.benchmarks.attention import KERNELS

FP32, BF16 = torch.float32, torch.bfloat16
# Flash kernels compute in half precision alone.
_ONLY_BF16 = ("flash", "flex-flash")
# Of flash-attn 4.
_NEEDS = {"flex-flash": "flash_attn.cute"}


def with_dtypes(*dtypes: torch.dtype) -> list:
    """Parameters (kernel, dtype) of all kernels but `dense`, which the others are held against."""
    found = []
    for kernel in KERNELS:
        for dtype in dtypes:
            if kernel == "dense" or (kernel in _ONLY_BF16 and dtype == FP32):
                continue
            package = _NEEDS.get(kernel)
            is_missing = package is not None and find_spec(package.partition(".")[0]) is None
            marks = [pytest.mark.skipif(is_missing, reason=f"needs {package}")]
            found.append(pytest.param(kernel, dtype, marks=marks, id=f"{kernel}-{'bf16' if dtype == BF16 else 'fp32'}"))
    return found


def kernels(*dtypes: torch.dtype) -> list:
    """The same without the dtype."""
    return [pytest.param(item.values[0], marks=item.marks, id=item.values[0]) for item in with_dtypes(*dtypes)]
