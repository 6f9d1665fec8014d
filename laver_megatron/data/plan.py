"""Which samples make up which pack: a pure function of the samples' sizes, two budgets and a seed.

Letters: I sample ids. A pack's number counts through the epochs, so a position in the data is one integer.
"""

import hashlib
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Sequence

import numpy as np

_OPEN_PACKS = 16  # packs that are filled side by side
_EPOCHS_KEPT = 2  # batches run across the end of an epoch


class PackPlan:
    """Every epoch is a permutation of the samples that fit, packed greedily under both budgets.

    token_counts, visual_counts: tokens and visual tokens of each sample; a sample with more than `seq_length`
    or `visual_seq_length` is left out and counted in `skipped`. Nothing depends on how the plan is queried.

    Raises:
        ValueError: no sample fits.
    """

    def __init__(
        self,
        token_counts: Sequence[int],
        visual_counts: Sequence[int],
        seq_length: int,
        visual_seq_length: int,
        seed: int,
    ) -> None:
        self.token_counts_I = np.asarray(token_counts, dtype=np.int64)
        self.visual_counts_I = np.asarray(visual_counts, dtype=np.int64)
        assert self.token_counts_I.shape == self.visual_counts_I.shape
        self.seq_length, self.visual_seq_length, self.seed = seq_length, visual_seq_length, seed
        too_long_I = self.token_counts_I > seq_length
        too_visual_I = ~too_long_I & (self.visual_counts_I > visual_seq_length)
        # A sample with 0 tokens is one that could not be read when it was counted.
        self.sample_ids = np.flatnonzero((self.token_counts_I > 0) & ~too_long_I & ~too_visual_I)
        self.skipped: Counter[str] = Counter()
        if too_long_I.any():
            self.skipped[f"more than {seq_length} tokens"] = int(too_long_I.sum())
        if too_visual_I.any():
            self.skipped[f"more than {visual_seq_length} visual tokens"] = int(too_visual_I.sum())
        if len(self.sample_ids) == 0:
            raise ValueError(self._nothing_fits())
        self._first_packs = [0]  # number of each epoch's first pack, as far as epochs have been packed
        self._epochs: OrderedDict[int, list[tuple[int, ...]]] = OrderedDict()

    def pack(self, number: int) -> tuple[int, ...]:
        """The sample ids of a pack, in the order of their places in it."""
        epoch, index = self.locate(number)
        return self._epoch(epoch)[index]

    def locate(self, number: int) -> tuple[int, int]:
        """(epoch, index within the epoch) of a pack."""
        assert number >= 0, number
        while self._first_packs[-1] <= number:
            self._epoch(len(self._first_packs) - 1)
        epoch = bisect_right(self._first_packs, number) - 1
        return epoch, number - self._first_packs[epoch]

    def num_packs(self, epoch: int = 0) -> int:
        """Packs of an epoch; epochs differ a little."""
        return len(self._epoch(epoch))

    def fingerprint(self) -> str:
        """Changes whenever any pack could: to be kept with a position, and compared on resuming."""
        digest = hashlib.sha256(np.array([self.seq_length, self.visual_seq_length, self.seed, _OPEN_PACKS]).tobytes())
        digest.update(self.token_counts_I.tobytes())
        digest.update(self.visual_counts_I.tobytes())
        return digest.hexdigest()[:16]

    def _epoch(self, epoch: int) -> list[tuple[int, ...]]:
        if epoch not in self._epochs:
            packs = self._pack_greedily(self._order(epoch))
            if epoch == len(self._first_packs) - 1:
                self._first_packs.append(self._first_packs[-1] + len(packs))
            self._epochs[epoch] = packs
            if len(self._epochs) > _EPOCHS_KEPT:
                self._epochs.popitem(last=False)
        self._epochs.move_to_end(epoch)
        return self._epochs[epoch]

    def _order(self, epoch: int) -> list[int]:
        # Raw bits of a bit generator are the one stream that numpy promises not to change between versions.
        raw_I = np.random.PCG64([self.seed, epoch]).random_raw(len(self.sample_ids))
        return self.sample_ids[np.argsort(raw_I, kind="stable")].tolist()

    def _pack_greedily(self, order: list[int]) -> list[tuple[int, ...]]:
        """Each sample goes into the oldest open pack with room; too many open ones close the oldest."""
        packs: list[tuple[int, ...]] = []
        open_packs: list[tuple[list[int], int, int]] = []  # ids, tokens left, visual tokens left
        tokens_of, visual_of = self.token_counts_I.tolist(), self.visual_counts_I.tolist()
        for sample in order:
            tokens, visual = tokens_of[sample], visual_of[sample]
            for place, (ids, tokens_left, visual_left) in enumerate(open_packs):
                if tokens <= tokens_left and visual <= visual_left:
                    ids.append(sample)
                    open_packs[place] = (ids, tokens_left - tokens, visual_left - visual)
                    break
            else:
                if len(open_packs) == _OPEN_PACKS:
                    packs.append(tuple(open_packs.pop(0)[0]))
                open_packs.append(([sample], self.seq_length - tokens, self.visual_seq_length - visual))
        return packs + [tuple(ids) for ids, *_ in open_packs]

    def _nothing_fits(self) -> str:
        tokens_I, visual_I = (part[self.token_counts_I > 0] for part in (self.token_counts_I, self.visual_counts_I))
        if len(tokens_I) == 0:
            return f"none of the {len(self.token_counts_I)} samples can be used"
        return (
            f"none of the {len(self.token_counts_I)} samples fits: the shortest has "
            f"{tokens_I.min()} tokens (seq_length is {self.seq_length}), the fewest visual tokens are "
            f"{visual_I.min()} (visual_seq_length is {self.visual_seq_length})"
        )
