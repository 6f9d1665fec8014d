"""What the installed engine and the machine can do, found without importing or allocating anything on a device."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

Version = tuple[int, ...]
AMPERE, HOPPER, BLACKWELL = (8, 0), (9, 0), (10, 0)


@dataclass(frozen=True)
class Capabilities:
    """Of the machine that a run is on.

    Attributes:
        compute_capability: of the GPU, (9, 0) for Hopper; None on a CPU.
        transformer_engine: its version, None where it is not installed.
    """

    compute_capability: Version | None = None
    transformer_engine: Version | None = None


def find_capabilities(on_cuda: bool) -> Capabilities:
    """Those of this machine. on_cuda: whether the run will be on GPUs."""
    import torch  # here, because the planner, which shares the checks, needs none

    return Capabilities(
        compute_capability=torch.cuda.get_device_capability() if on_cuda else None,
        transformer_engine=_version_of("transformer-engine"),
    )


def _version_of(package: str) -> Version | None:
    try:
        parts = version(package).split("+")[0].split(".")
    except PackageNotFoundError:
        return None
    return tuple(int(part) for part in parts if part.isdigit())
