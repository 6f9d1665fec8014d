"""The order of the samples of an epoch, over any number of weighted sources, without a list of it.

Letters: I samples asked for, B blocks: a shard's samples, once for every copy of it.

A source's weight is how often its samples come in an epoch: floor(weight) times all of them, and for the remainder a
selection that each epoch draws anew. The blocks of all sources are shuffled; within a block samples keep the order of
their shard, so that neighbouring samples come from few shards. So an order is a permutation of blocks, of which there
are as many as shards, and the sample at any position is found from the blocks before it.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from laver_megatron.data.plan.sizes import SampleSizes
from laver_megatron.data.plan.usable import UsableRows

_ORDER, _CHOICE = 0, 1  # streams of random bits; the plan has further ones
_BITS_A_TIME = 1 << 20
_BUCKET_BITS = 16


class Mixture:
    """Orders of epochs: a pure function of (sources, usable rows, seed, epoch).

    rows: for each source those that take part. Global sample ids count through the sources.
    """

    def __init__(self, sources: Sequence[SampleSizes], rows: Sequence[UsableRows], seed: int) -> None:
        self.seed, self.rows = seed, tuple(rows)
        self.weights = [source.weight for source in sources]
        self.first_ids = np.cumsum([0, *(len(source) for source in sources)])
        self.id_type = np.int32 if self.first_ids[-1] < 2**31 else np.int64

    def __len__(self) -> int:
        """Samples of an epoch, the same for all."""
        return sum(
            math.floor(weight) * len(rows) + _num_chosen(weight, len(rows))
            for weight, rows in zip(self.weights, self.rows, strict=True)
        )

    def order(self, epoch: int) -> "EpochOrder":
        """The samples of an epoch by their position in it."""
        return EpochOrder(self, epoch)


class EpochOrder:
    """The global sample ids of an epoch in their order, int32 (int64 above 2^31 samples), found when asked for.

    Keeps 48 bytes a block.
    """

    def __init__(self, mixture: Mixture, epoch: int) -> None:
        self._mixture = mixture
        self._choices: dict[int, _Choice] = {}
        blocks = [
            np.zeros((1, 5), np.int64)
        ]  # source, whether chosen, begin and end in it, samples; weights may leave 0
        for source, (weight, rows) in enumerate(zip(mixture.weights, mixture.rows, strict=True)):
            begin_B, end_B = np.append(0, rows.block_ends_B), np.append(rows.block_ends_B, len(rows))
            zeros_B = np.zeros_like(begin_B)
            whole = np.stack([zeros_B + source, zeros_B, begin_B, end_B, end_B - begin_B], axis=1)
            blocks += [whole] * math.floor(weight)
            if num_chosen := _num_chosen(weight, len(rows)):
                choice = _Choice(len(rows), num_chosen, mixture.seed, epoch, source)
                self._choices[source] = choice
                blocks.append(
                    np.stack([zeros_B + source, zeros_B + 1, begin_B, end_B, choice.count(rows.block_ends_B)], axis=1)
                )
        table = np.concatenate(blocks)
        table = table[shuffle(len(table), mixture.seed, epoch, _ORDER)]
        self._source_B, self._is_chosen_B, self._begin_B, self._end_B, num_B = np.ascontiguousarray(table.T)
        self._position_B = np.cumsum(num_B)  # at which the next block begins
        self._num_B = num_B

    def __len__(self) -> int:
        return int(self._position_B[-1])

    def at(self, positions_I: NDArray[np.integer]) -> NDArray[np.integer]:
        """The samples at some positions, in any order."""
        block_I = np.searchsorted(self._position_B, positions_I, side="right")
        in_block_I = positions_I - (self._position_B - self._num_B)[block_I]
        places_I = self._begin_B[block_I] + in_block_I
        for block in np.unique(block_I[self._is_chosen_B[block_I] > 0]).tolist():
            asked_I = block_I == block
            choice = self._choices[int(self._source_B[block])]
            chosen = choice.places(int(self._begin_B[block]), int(self._end_B[block]))
            places_I[asked_I] = chosen[in_block_I[asked_I]]
        ids_I: NDArray[np.integer] = np.empty(len(positions_I), self._mixture.id_type)
        source_I = self._source_B[block_I]
        for source in np.unique(source_I).tolist():
            asked_I = source_I == source
            ids_I[asked_I] = self._mixture.rows[source].at(places_I[asked_I]) + self._mixture.first_ids[source]
        return ids_I


class _Choice:
    """Which places of a source come once more in an epoch: those with the smallest random bits, the first of equals.
    The bits are made again when they are needed; the generator can jump to any of them."""

    def __init__(self, num_places: int, num_chosen: int, seed: int, epoch: int, source: int) -> None:
        self._num_places, self._num_chosen, self._key = num_places, num_chosen, (seed, epoch, _CHOICE, source)
        # The bucket of the last one, by its first bits, and the place in the order of that bucket.
        shift = np.uint64(64 - _BUCKET_BITS)
        nums = np.zeros(1 << _BUCKET_BITS, np.int64)
        for _, bits_I in self._bits():
            nums += np.bincount((bits_I >> shift).astype(np.int64), minlength=len(nums))
        bucket = int(np.searchsorted(np.cumsum(nums), num_chosen))
        before = int(nums[:bucket].sum())
        inside = np.concatenate([bits_I[bits_I >> shift == bucket] for _, bits_I in self._bits()])
        self._highest = np.sort(inside)[num_chosen - before - 1]

    def count(self, block_ends_B: NDArray[np.integer]) -> NDArray[np.int64]:
        """How many are chosen of each block."""
        num_B = np.zeros(len(block_ends_B) + 1, np.int64)
        for begin, bits_I in self._bits():
            chosen = np.flatnonzero(bits_I <= self._highest) + begin
            first = int(np.searchsorted(block_ends_B, begin, side="right"))
            nums = np.bincount(np.searchsorted(block_ends_B, chosen, side="right") - first)
            num_B[first : first + len(nums)] += nums
        return np.diff(np.minimum(np.cumsum(num_B), self._num_chosen), prepend=0)

    def places(self, begin: int, end: int) -> NDArray[np.int64]:
        """The chosen places of `begin` to `end`."""
        bits_I = np.random.PCG64(self._key).advance(begin).random_raw(end - begin)
        return np.flatnonzero(bits_I <= self._highest) + begin

    def _bits(self) -> Iterator[tuple[int, NDArray[np.uint64]]]:
        generator = np.random.PCG64(self._key)
        for begin in range(0, self._num_places, _BITS_A_TIME):
            yield begin, generator.random_raw(min(_BITS_A_TIME, self._num_places - begin))


def random_bits(count: int, *key: int) -> NDArray[np.uint64]:
    """Raw bits of a bit generator: the one stream that numpy promises not to change between versions."""
    return np.random.PCG64(key).random_raw(count)


def shuffle(count: int, *key: int) -> NDArray[np.integer]:
    """A permutation of range(count) that depends on the key alone."""
    return np.argsort(random_bits(count, *key), kind="stable")


def _num_chosen(weight: float, num_ids: int) -> int:
    return round((weight - math.floor(weight)) * num_ids)
