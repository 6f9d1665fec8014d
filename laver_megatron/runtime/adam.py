"""An Adam that Megatron-Core's distributed optimizer can save, reshard and resume.

It has the shape of TransformerEngine's and apex's FusedAdam, which Megatron-Core knows how to
checkpoint: the step count lives in the parameter group, a parameter's state is exactly `exp_avg` and
`exp_avg_sq`. The arithmetic is torch's own fused kernel.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


class ResumableAdam(torch.optim.Optimizer):
    """AdamW (decoupled weight decay) in fp32. Empty groups are allowed: a pipeline stage may have nothing to train."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if not adam_w_mode:
            raise ValueError("only decoupled weight decay (AdamW) is implemented; set decoupled_weight_decay=True")
        assert not capturable, "Megatron-Core 0.19 asks for it under optimizer_cuda_graph alone, which is not set"
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            # Also where nothing of the group is on this rank: a checkpoint keeps the count of one rank for all.
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for param in params:
                if not self.state[param]:
                    self.state[param]["exp_avg"] = torch.zeros_like(param)
                    self.state[param]["exp_avg_sq"] = torch.zeros_like(param)
            adamw(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                # torch counts each parameter's step in place: give every parameter a counter of its own,
                # standing at the step before this one.
                list(torch.full((len(params),), group["step"] - 1.0, device=params[0].device).unbind()),
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
