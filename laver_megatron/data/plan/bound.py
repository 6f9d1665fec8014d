"""How few packs the sizes of samples allow: a true bound, which no way of packing can beat.

Letters: I samples.

Each budget alone gives bounds; the largest holds. For a capacity C and k = 1, 2, ... give a sample of size x the
weight floor((k+1) x / C) / k, or x / C where (k+1) x / C is whole. Then no pack weighs more than 1, so there are at
least as many packs as all samples weigh together. (Say a pack holds the sizes x_i, the ones that divide evenly fill
the share s of it, and there are others. Their floors add up to less than (k+1)(1-s), which is whole, so to at most
k - (k+1)s, and the pack weighs at most s + (k - (k+1)s) / k <= 1.) k = 1 says that two samples above half a pack
never share one; k = 4 that five images of 729 tokens never share 2916 visual slots. With x / C alone it says that
packs are at best full. [Fekete and Schepers, New classes of fast lower bounds for bin packing problems, 2001.]
"""

import numpy as np
from numpy.typing import NDArray

_MOST_IN_A_PACK = 64  # beyond, floor() takes next to nothing away


def least_packs(
    tokens_I: NDArray[np.integer], visual_I: NDArray[np.integer], seq_length: int, visual_seq_length: int
) -> int:
    """The packs that these samples need at least. A sample above a budget is an error of the caller."""
    return max(_least(tokens_I, seq_length), _least(visual_I, visual_seq_length))


def _least(size_I: NDArray[np.integer], capacity: int) -> int:
    if len(size_I) == 0 or capacity == 0:
        return 0
    num_of_size = np.bincount(size_I, minlength=capacity + 1)
    assert len(num_of_size) == capacity + 1, (len(num_of_size) - 1, capacity)
    sizes = np.flatnonzero(num_of_size)
    nums = num_of_size[sizes]
    least = -(-int(sizes @ nums) // capacity)
    for k in range(1, _MOST_IN_A_PACK):
        floor, rest = np.divmod((k + 1) * sizes, capacity)
        whole = rest == 0
        weight_times_k_and_capacity = np.where(whole, k * sizes, capacity * floor)
        least = max(least, -(-int(weight_times_k_and_capacity @ nums) // (k * capacity)))
    return least
