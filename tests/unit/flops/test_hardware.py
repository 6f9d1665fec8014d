"""GPUs by the names that CUDA reports, and the one table of their peaks."""

import pytest

from laver_megatron.flops.hardware import PEAK_BF16_TFLOPS, peak_tflops
from laver_megatron.planning.hardware import GPUS


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H800 PCIe", None),
        ("NVIDIA H800", None),
        ("GRID A100-10C", None),
        ("NVIDIA A100-10C", None),
        ("NVIDIA H100 PCIe MIG 1g.10gb", None),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H20", 148),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_a_device_is_found_by_its_name(name, expected):
    assert peak_tflops(name) == expected


def test_the_planner_has_the_same_peaks():
    for name, gpu in GPUS.items():
        assert gpu.peak_flops == pytest.approx(1e12 * PEAK_BF16_TFLOPS[name.split("-")[0].upper()])
