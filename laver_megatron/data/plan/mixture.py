"""The order of the samples of an epoch, over any number of weighted sources.

Letters: I samples (of a source, or of an epoch's order), B blocks: a shard's samples, once for every copy of it.

A source's weight is how often its samples come in an epoch: floor(weight) times all of them, and for the remainder a
selection that each epoch draws anew. The blocks of all sources are shuffled; within a block samples keep the order of
their shard, so that neighbouring samples come from few shards.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

_ORDER, _CHOICE = 0, 1  # streams of random bits; the plan has further ones


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


class Mixture:
    """Orders of epochs: a pure function of (sources, usable rows, seed, epoch).

    usable: for each source which rows take part, bool `[I]`. Global sample ids count through the sources.
    """

    def __init__(self, sources: Sequence[SampleSizes], usable: Sequence[NDArray[np.bool_]], seed: int) -> None:
        self.seed = seed
        self.weights = [source.weight for source in sources]
        offsets = np.cumsum([0, *(len(source) for source in sources)])
        self._id_type = np.int32 if offsets[-1] < 2**31 else np.int64
        self._ids = [
            _by_shard(source.shard_I, np.flatnonzero(usable_I), int(offset), self._id_type)
            for source, usable_I, offset in zip(sources, usable, offsets, strict=False)
        ]
        self._block_ends = [
            _block_ends(source.shard_I[ids_I - offset])
            for source, ids_I, offset in zip(sources, self._ids, offsets, strict=False)
        ]

    def __len__(self) -> int:
        """Samples of an epoch, the same for all."""
        return sum(
            math.floor(weight) * len(ids_I) + _num_chosen(weight, len(ids_I))
            for weight, ids_I in zip(self.weights, self._ids, strict=True)
        )

    def order(self, epoch: int) -> NDArray[np.integer]:
        """The global sample ids of an epoch in their order, int32 (int64 above 2^31 samples)."""
        blocks = [np.empty(0, self._id_type)]  # weights may leave nothing
        for source, (weight, ids_I, ends_B) in enumerate(zip(self.weights, self._ids, self._block_ends, strict=True)):
            copies = np.split(ids_I, ends_B) * math.floor(weight)  # views
            chosen = self._choose(source, epoch)
            if len(chosen):
                copies += np.split(ids_I[chosen], np.searchsorted(chosen, ends_B))
            blocks += copies
        return np.concatenate([blocks[block] for block in shuffle(len(blocks), self.seed, epoch, _ORDER)])

    def _choose(self, source: int, epoch: int) -> NDArray[np.integer]:
        """Places in the source's ids, ascending, of the samples that come once more in this epoch."""
        num_ids = len(self._ids[source])
        num_chosen = _num_chosen(self.weights[source], num_ids)
        if num_chosen == 0:
            return np.empty(0, np.int64)
        bits_I = random_bits(num_ids, self.seed, epoch, _CHOICE, source)
        highest = np.partition(bits_I, num_chosen - 1)[num_chosen - 1]
        return np.flatnonzero(bits_I <= highest)[:num_chosen]


def random_bits(count: int, *key: int) -> NDArray[np.uint64]:
    """Raw bits of a bit generator: the one stream that numpy promises not to change between versions."""
    return np.random.PCG64(key).random_raw(count)


def shuffle(count: int, *key: int) -> NDArray[np.integer]:
    """A permutation of range(count) that depends on the key alone."""
    return np.argsort(random_bits(count, *key), kind="stable")


def _by_shard(
    shard_I: NDArray[np.int32], rows_I: NDArray[np.integer], offset: int, id_type: type
) -> NDArray[np.integer]:
    shard_of_row = shard_I[rows_I]
    if np.any(shard_of_row[1:] < shard_of_row[:-1]):  # an index has its samples in the order of shards already
        rows_I = rows_I[np.argsort(shard_of_row, kind="stable")]
    return (rows_I + offset).astype(id_type)


def _block_ends(shard_I: NDArray[np.int32]) -> NDArray[np.integer]:
    """Where the next shard begins, without the first beginning and the last end: as np.split takes them."""
    return np.flatnonzero(shard_I[1:] != shard_I[:-1]) + 1


def _num_chosen(weight: float, num_ids: int) -> int:
    return round((weight - math.floor(weight)) * num_ids)
