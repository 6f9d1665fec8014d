"""L_LM: next-token cross-entropy.

Letters: T tokens, W words of the vocabulary.
"""

import torch.nn.functional as F
from torch import Tensor

from laver_megatron.objective import at_least_fp32

IGNORE_LABEL = -100


def language_losses(logits_TW: Tensor, labels_T: Tensor) -> Tensor:
    """Cross-entropy of every token: log sum_w exp(logits_w) - logits_label.

    Args:
        logits_TW: [T, W], any float dtype.
        labels_T: int64 [T], the label for the logits *at* this position (already shifted), IGNORE_LABEL
            for none.

    Returns:
        [T], fp32 (fp64 for fp64 logits), in nats, per token: nothing is averaged. 0 where the label is
        IGNORE_LABEL, and such a position gets no gradient.
    """
    return F.cross_entropy(at_least_fp32(logits_TW), labels_T, ignore_index=IGNORE_LABEL, reduction="none")
