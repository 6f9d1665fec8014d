"""The LaVer objective as functions of tensors: no configuration, no module, no state.

    L = L_LM + w_MIM L_MIM + w_CGA L_CGA

`masking` chooses the visual tokens to hide, `language` is L_LM, `reconstruction` is L_MIM, `gram` is L_GA and
L_CGA. These files know nothing of parallelism. `sharded` holds the same functions for tensors whose last
dimension is split over a tensor-parallel group.

Nothing here averages over tokens or images: every function returns the loss per token or per image, and the
caller sums and divides by the counts of the *global* batch, so that numbers do not depend on how the batch is
laid out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the schedules beside it need no torch
    from torch import Tensor


def at_least_fp32(tensor: Tensor) -> Tensor:
    """The precision of every loss: bf16 and fp16 become fp32, fp32 stays, and fp64 stays (for oracles)."""
    return tensor.float() if tensor.itemsize < 4 else tensor
