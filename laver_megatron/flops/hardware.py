"""What a GPU can do at most: dense bf16 matrix products, by the name that CUDA reports. The one table of it.

Figures "with sparsity" are halved. MFU is a share of these whatever the run computes in, fp8 included.
"""

from __future__ import annotations

import re

# Each from NVIDIA's data sheet of that name.
PEAK_BF16_TFLOPS = {
    "A100": 312.0,  # A100: 312
    "A100 PCIe": 312.0,  # A100: 312
    "A800": 312.0,  # A800: 312
    "A800 PCIe": 312.0,  # A800: 312
    "H100": 989.4,  # H100, column SXM: 1,979 with sparsity
    "H100 PCIe": 756.5,  # H100 PCIe: 1,513 with sparsity
    "H100 NVL": 835.5,  # H100, column NVL: 1,671 with sparsity
    "H200": 989.4,  # H200, column SXM: 1,979 with sparsity
    "H200 NVL": 835.5,  # H200, column NVL: 1,671 with sparsity
    "H20": 148.0,  # H20: 148
    "B200": 2250.0,  # HGX B200: 36,000 with sparsity, of eight
    "GB200": 2500.0,  # GB200 NVL72: 360,000 with sparsity, of 72
    "L40S": 362.0,  # L40S: 733 with sparsity, of which it also says 362.05
}
# Words of a name that say nothing of the speed.
_WITHOUT_MEANING = re.compile(r"nvidia|\d+gb|sxm\d*|hbm\d\w*")


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 TFLOP/s of a GPU, None of one that is not in the table or only a part of one (MIG, vGPU).

    Example: "NVIDIA H100 80GB HBM3" is an H100 (989.4), "NVIDIA H100 PCIe" is not (756.5), "NVIDIA H20" neither.
    """
    words = [word for word in re.split(r"[ -]+", device_name.lower()) if not _WITHOUT_MEANING.fullmatch(word)]
    return {name.lower(): peak for name, peak in PEAK_BF16_TFLOPS.items()}.get(" ".join(words))
