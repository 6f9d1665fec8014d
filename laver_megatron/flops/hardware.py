"""What a GPU can do at most: dense bf16 matrix products, by the name that CUDA reports. The one table of it.

Sources: NVIDIA's data sheets (A100, A800, H100, H200, H20, L40S, HGX B200, GB200 NVL72), whose figures "with sparsity"
are halved. MFU is a share of these whatever the run computes in, fp8 included.
"""

from __future__ import annotations

PEAK_BF16_TFLOPS = {
    "A100": 312.0,
    "A800": 312.0,
    "H100": 989.4,  # SXM
    "H100 PCIe": 756.5,
    "H100 NVL": 835.5,
    "H800": 989.4,
    "GH200": 989.4,
    "H200": 989.4,
    "H200 NVL": 835.5,
    "H20": 148.0,
    "B200": 2250.0,
    "GB200": 2500.0,
    "L40S": 362.0,
}


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 TFLOP/s of a GPU, None of one that is not in the table or only a part of one (MIG).

    Example: "NVIDIA H100 80GB HBM3" is an H100 (989.4), "NVIDIA H100 PCIe" is not (756.5), "NVIDIA H20" neither.
    """
    words = device_name.replace("-", " ").split()
    if "MIG" in words:
        return None
    # The longest entry whose words all occur: "H100 PCIe" before "H100". Sizes may stand between ("A100 80GB PCIe").
    found = [name for name in PEAK_BF16_TFLOPS if set(name.split()) <= set(words)]
    return PEAK_BF16_TFLOPS[max(found, key=len)] if found else None
