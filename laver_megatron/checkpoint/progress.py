"""Where a run stands: what a checkpoint keeps besides tensors."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """Where a run stands. Everything that changes with the step is computed from `iteration`. data_fingerprint
    names the order of packs that `consumed_packs` counts in; data_mark: see `BatchSource.mark`. consumed_samples are
    the good ones, bad_samples those whose slots were padding (0 in checkpoints that do not say).

    The fields from counted_iterations on are sums over that many iterations for the run's summary: model_flops of all
    devices together, laver_flops what LaVer has in them, device_seconds the training seconds times the devices.
    """

    iteration: int = 0
    consumed_packs: int = 0
    consumed_samples: int = 0
    bad_samples: int = 0
    consumed_tokens: int = 0
    skipped_iterations: int = 0
    data_fingerprint: str = ""
    data_mark: dict[str, Any] = field(default_factory=dict)
    counted_iterations: int = 0
    consumed_visual_tokens: int = 0
    consumed_label_tokens: int = 0
    model_flops: int = 0
    laver_flops: int = 0
    training_seconds: float = 0.0
    device_seconds: float = 0.0
