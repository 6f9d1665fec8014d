"""Which tensor-parallel rank encodes, and therefore gets, which images of a micro-batch."""

from collections.abc import Sequence

from laver_megatron.flops.encoder import BY_TOKENS, ImageCost

Division = tuple[tuple[int, ...], ...]
"""For each rank the numbers of its images, ascending."""

_MOST_OVER_MEAN = 1.05  # what one rank may have without images changing places again


def divide_images(num_tokens: Sequence[int], num_ranks: int, cost: ImageCost = BY_TOKENS) -> Division:
    """Images to ranks, so that these have nearly as much work each: the largest first, each to the rank that has the
    least so far; then, while one has far too much, single images change places. The same on every rank that asks.

    >>> divide_images([64, 16, 16, 32], 2)
    ((0,), (1, 2, 3))
    """
    work = [cost(num) for num in num_tokens]
    loads = [0] * num_ranks
    images: list[list[int]] = [[] for _ in range(num_ranks)]
    for image in sorted(range(len(work)), key=lambda image: (-work[image], image)):
        rank = loads.index(min(loads))
        images[rank].append(image)
        loads[rank] += work[image]
    while max(loads) * num_ranks > _MOST_OVER_MEAN * sum(loads) and _exchange(images, loads, work):
        pass
    return tuple(tuple(sorted(of_rank)) for of_rank in images)


def _exchange(images: list[list[int]], loads: list[int], work: Sequence[int]) -> bool:
    """Moves an image from the fullest rank to another, or swaps it for a smaller one there, whichever balances the two
    best; False if nothing does."""
    fullest = loads.index(max(loads))
    for other in sorted(range(len(loads)), key=lambda rank: (loads[rank], rank)):
        gap = loads[fullest] - loads[other]
        # (distance from even, image given, image taken back)
        choices = [
            (abs(gap - 2 * (work[given] - (0 if taken is None else work[taken]))), given, taken)
            for given in images[fullest]
            for taken in (None, *images[other])
        ]
        best = min(choices, key=lambda choice: choice[0])
        if best[0] < gap:
            _, given, taken = best
            images[fullest].remove(given)
            images[other].append(given)
            moved = work[given]
            if taken is not None:
                images[other].remove(taken)
                images[fullest].append(taken)
                moved -= work[taken]
            loads[fullest] -= moved
            loads[other] += moved
            return True
    return False
