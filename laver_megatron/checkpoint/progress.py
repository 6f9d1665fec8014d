"""Where a run stands: what a checkpoint keeps besides tensors."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """Where a run stands. Everything that changes with the step is computed from `iteration`.

    Attributes:
        consumed_samples, bad_samples: good ones, and those whose slots were padding (0 in old checkpoints).
        data_fingerprint: names the order of packs that `consumed_packs` counts in.
        data_mark: see `BatchSource.mark`.
        counted_iterations: what the fields after it are sums over, for the run's summary.
        model_flops, laver_flops: of all devices together, and LaVer's share of them.
        device_seconds: training seconds times devices.
        recent_losses, recent_norms: of the last applied steps, for --spike-action; empty without it.
        data_seconds, skipped_seconds: of the training seconds, those that waited for data, and the other ones of
            skipped iterations.
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
    recent_losses: tuple[float, ...] = ()
    recent_norms: tuple[float, ...] = ()
    data_seconds: float = 0.0
    skipped_seconds: float = 0.0
