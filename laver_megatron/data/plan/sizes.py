"""The sizes of the samples of one data set: all that a plan knows of them."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, eq=False)
class SampleSizes:
    """The sizes of one data set's samples, in the order of its index; all int32 `[I]`.

    Attributes:
        tokens_I, visual_I: tokens and visual tokens; 0 tokens for a sample that cannot be used.
        shard_I: number of the sample's shard.
        weight: how often each sample comes in an epoch.

    Raises:
        ValueError: a weight that is negative or not finite.
    """

    tokens_I: NDArray[np.int32]
    visual_I: NDArray[np.int32]
    shard_I: NDArray[np.int32]
    weight: float = 1.0

    def __init__(self, tokens_I: ArrayLike, visual_I: ArrayLike, shard_I: ArrayLike, weight: float = 1.0) -> None:
        for name, values in (("tokens_I", tokens_I), ("visual_I", visual_I), ("shard_I", shard_I)):
            object.__setattr__(self, name, np.asarray(values, dtype=np.int32))
        object.__setattr__(self, "weight", float(weight))
        assert self.tokens_I.shape == self.visual_I.shape == self.shard_I.shape == (len(self),)
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"a source's weight is {weight}; it is how often its samples come in an epoch, 0 or more")

    def __len__(self) -> int:
        return len(self.tokens_I)
