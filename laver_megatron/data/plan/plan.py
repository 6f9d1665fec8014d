"""Which samples make up which pack: a pure function of the samples' sizes, two budgets, a window and a seed.

Letters: I sample ids, P packs of a window.

A pack's number counts through the epochs, so a position in the data is one integer. An epoch's order is cut into
windows, and each window is packed when one of its packs is first asked for. Where a window's packs begin is known once
all windows before it have been packed; a *mark*, stored beside a position, makes that unnecessary.
"""

import hashlib
import json
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from laver_megatron.data.plan.best_fit import ALGORITHM, Style, pack_window, rank_styles
from laver_megatron.data.plan.mixture import Mixture, SampleSizes, shuffle

__all__ = ["PackPlan", "SampleSizes", "WindowPacks"]

_WINDOW, _PACKS = 2, 3  # streams of random bits, after the mixture's
_WINDOWS_KEPT = 4  # batches run across the end of a window, and what is read ahead does too
_EPOCHS_KEPT = 2
_STYLES_TRIED = 2  # in a window; the second only if the first wastes more than usual


@dataclass(frozen=True)
class WindowPacks:
    """A window's packs: sample ids, pack after pack, and the start of each pack and end of the last, `[P + 1]`."""

    sample_id_I: NDArray[np.integer]
    begin_P: NDArray[np.integer]

    def __len__(self) -> int:
        return len(self.begin_P) - 1

    def __getitem__(self, index: int) -> tuple[int, ...]:
        return tuple(self.sample_id_I[self.begin_P[index] : self.begin_P[index + 1]].tolist())


@dataclass(frozen=True)
class PlanMark:
    """Where a window's packs begin.

    Attributes:
        window, first_pack: the window's number and that of its first pack, both through all epochs.
        digest: of both, of the plan's fingerprint and of all packs of the window, so that a mark of another plan is
            detected.
    """

    window: int
    first_pack: int
    digest: str


class PackPlan:
    """Every epoch holds each sample as often as its source's weight says, in packs within both budgets.

    A sample with more than `seq_length` tokens or `visual_seq_length` visual tokens is left out and counted in
    `skipped`. Nothing depends on how the plan is queried. Global sample ids count through the sources.

    Args:
        window: the most samples that are shuffled and packed together; larger windows mix and fill better and keep more
            shards open.

    Attributes:
        token_counts_I, visual_counts_I: all sizes, by global sample id.
        sample_ids: those that take part.

    Raises:
        ValueError: no sample fits, or the weights leave none.
    """

    def __init__(
        self, sources: Sequence[SampleSizes], seq_length: int, visual_seq_length: int, seed: int, window: int = 10_000
    ) -> None:
        if window < 1:
            raise ValueError(f"a window of {window} samples holds none")
        self.sources, self.seq_length, self.visual_seq_length = tuple(sources), seq_length, visual_seq_length
        self.seed, self.window = seed, window
        self.token_counts_I = _joined([source.tokens_I for source in self.sources])
        self.visual_counts_I = _joined([source.visual_I for source in self.sources])
        self._first_sample_ids = np.cumsum([0, *(len(source) for source in self.sources)])
        fits_I = self._fitting()
        self.sample_ids = np.flatnonzero(fits_I)
        if len(self.sample_ids) == 0:
            raise ValueError(self._nothing_fits())
        usable = np.split(fits_I, self._first_sample_ids[1:-1])
        self._mixture = Mixture(self.sources, usable, seed)
        if len(self._mixture) == 0:
            raise ValueError(
                f"the weights {[source.weight for source in self.sources]} leave none of {len(self.sample_ids)} samples"
            )
        for source, usable_I in zip(self.sources, usable, strict=True):
            if source.weight > 0 and usable_I.any() and round(source.weight * usable_I.sum()) == 0:
                raise ValueError(
                    f"a weight of {source.weight} leaves none of a source's {usable_I.sum()} samples in any epoch; "
                    "raise it, or leave the source out"
                )
        self.num_windows = -(-len(self._mixture) // window)  # of an epoch, all of the same size or one less
        # The number of each window's first pack, through all epochs, as far as they are packed, and which window's
        # is the first one.
        self._first_packs, self._first_window = [0], 0
        self._orders: OrderedDict[int, NDArray[np.integer]] = OrderedDict()
        self._windows: OrderedDict[int, WindowPacks] = OrderedDict()
        self._styles: tuple[Style, ...] | None = None  # until a window is packed

    def mark(self, number: int) -> PlanMark:
        """The start of the last known window that begins at or before a pack; packs at most one window."""
        assert number >= self._first_packs[0], (number, self._first_packs[0])
        place = bisect_right(self._first_packs, number) - 1
        return self._mark(self._first_window + place, self._first_packs[place])

    def resume_from(self, mark: PlanMark) -> None:
        """Counts packs from a mark on. Packs before it are counted from the start if they are asked for, and compared
        with it.

        Raises:
            ValueError: the mark is not of this plan.
        """
        if mark.window < 0 or mark.first_pack < 0 or mark != self._mark(mark.window, mark.first_pack):
            raise ValueError(
                f"this plan has no window {mark.window} that begins at pack {mark.first_pack} as it was noted: the "
                "note is damaged, or belongs to other data or to another version of laver_megatron"
            )
        self._first_window, self._first_packs = mark.window, [mark.first_pack]

    def pack(self, number: int) -> tuple[int, ...]:
        """The sample ids of a pack, in the order of their places in it."""
        window = self._find(number)
        return self.window_packs(window)[number - self._first_pack(window)]

    def locate(self, number: int) -> tuple[int, int]:
        """(epoch, index within the epoch) of a pack. Packs all earlier windows that have not been packed."""
        epoch = self._find(number) // self.num_windows
        return epoch, number - self._first_pack(epoch * self.num_windows)

    def num_packs(self, epoch: int = 0) -> int:
        """Packs of an epoch; epochs differ slightly. Packs all of its windows that have not been packed."""
        begin, end = epoch * self.num_windows, (epoch + 1) * self.num_windows
        return self._first_pack(end) - self._first_pack(begin)

    @property
    def num_samples(self) -> int:
        """Samples of an epoch, as often as their weights say."""
        return len(self._mixture)

    def estimate_num_packs(self) -> int:
        """About how many packs an epoch has, judged by its first window."""
        return len(self.window_packs(0)) * self.num_windows

    def window_packs(self, window: int) -> WindowPacks:
        """The packs of a window, by its number through all epochs; the last few asked for are kept."""
        if window not in self._windows:
            self._windows[window] = self._pack_window(window)
            if len(self._windows) > _WINDOWS_KEPT:
                self._windows.popitem(last=False)
        self._windows.move_to_end(window)
        return self._windows[window]

    def locate_sample(self, sample_id: int) -> tuple[int, int]:
        """(number of its source, row in it) of a global sample id."""
        assert 0 <= sample_id < len(self.token_counts_I), sample_id
        source = int(np.searchsorted(self._first_sample_ids, sample_id, side="right")) - 1
        return source, sample_id - int(self._first_sample_ids[source])

    def fingerprint(self) -> str:
        """Changes whenever any pack could: stored with a position, and compared on resuming."""
        settings = [ALGORITHM, self.seq_length, self.visual_seq_length, self.seed, self.window]
        sources = [(len(source), source.weight) for source in self.sources]
        digest = hashlib.sha256(json.dumps([settings, sources]).encode())
        for source in self.sources:
            for values_I in (source.tokens_I, source.visual_I, source.shard_I):
                digest.update(np.ascontiguousarray(values_I, dtype="<i4").data)
        return digest.hexdigest()[:16]

    def _find(self, number: int) -> int:
        """The window that a pack is in."""
        assert number >= 0, number
        if number < self._first_packs[0]:
            self._count_from_the_start()
        while self._first_packs[-1] <= number:
            self._count_next_window()
        return self._first_window + bisect_right(self._first_packs, number) - 1

    def _first_pack(self, window: int) -> int:
        """The number of a window's first pack."""
        if window < self._first_window:
            self._count_from_the_start()
        while self._first_window + len(self._first_packs) <= window:
            self._count_next_window()
        return self._first_packs[window - self._first_window]

    def _count_next_window(self) -> None:
        window = self._first_window + len(self._first_packs) - 1
        self._first_packs.append(self._first_packs[-1] + len(self.window_packs(window)))

    def _count_from_the_start(self) -> None:
        """Also counts the windows before a mark.

        Raises:
            ValueError: they do not lead to it.
        """
        window, noted = self._first_window, self._first_packs
        first_packs = [0]
        for earlier in range(window):
            first_packs.append(first_packs[-1] + len(self.window_packs(earlier)))
        if first_packs[-1] != noted[0]:
            raise ValueError(f"window {window} begins at pack {first_packs[-1]}, but {noted[0]} was noted")
        self._first_window, self._first_packs = 0, first_packs + noted[1:]

    def _mark(self, window: int, first_pack: int) -> PlanMark:
        packs = self.window_packs(window)
        digest = hashlib.sha256(f"{self.fingerprint()} {window} {first_pack}".encode())
        for values in (packs.sample_id_I, packs.begin_P):
            digest.update(np.ascontiguousarray(values, dtype="<i8").data)
        return PlanMark(window, first_pack, digest.hexdigest()[:16])

    def _pack_window(self, window: int) -> WindowPacks:
        epoch, part = divmod(window, self.num_windows)
        order_I = self._order(epoch)
        begin, end = (len(order_I) * edge // self.num_windows for edge in (part, part + 1))
        ids_I = order_I[begin:end][shuffle(end - begin, self.seed, epoch, _WINDOW, part)]
        if self._styles is None:
            self._styles, self._good_enough = self._rank_styles()
        pack_I = pack_window(
            self.token_counts_I[ids_I], self.visual_counts_I[ids_I], self.seq_length, self.visual_seq_length,
            self._styles, self._good_enough,
        )  # fmt: skip
        place_P = shuffle(int(pack_I.max()) + 1, self.seed, epoch, _PACKS, part)
        place_I = place_P[pack_I]
        begin_P = np.concatenate([[0], np.cumsum(np.bincount(place_I))])
        return WindowPacks(ids_I[np.argsort(place_I, kind="stable")], begin_P)

    def _rank_styles(self) -> tuple[tuple[Style, ...], float]:
        """The ways of packing that suit the first epoch best, judged by a window's worth of its samples, and how good
        they are."""
        order_I = self._order(0)
        num_samples = min(self.window, len(order_I))
        ids_I = order_I[np.arange(num_samples) * len(order_I) // num_samples]  # spread over all shards
        sizes = self.token_counts_I[ids_I], self.visual_counts_I[ids_I]
        styles, good_enough = rank_styles(*sizes, self.seq_length, self.visual_seq_length)
        return styles[:_STYLES_TRIED], good_enough

    def _order(self, epoch: int) -> NDArray[np.integer]:
        if epoch not in self._orders:
            self._orders[epoch] = self._mixture.order(epoch)
            if len(self._orders) > _EPOCHS_KEPT:
                self._orders.popitem(last=False)
        self._orders.move_to_end(epoch)
        return self._orders[epoch]

    def _fitting(self) -> NDArray[np.bool_]:
        """Which samples take part; counts the others, except those that could not be read when they were counted."""
        too_long_I = self.token_counts_I > self.seq_length
        too_visual_I = ~too_long_I & (self.visual_counts_I > self.visual_seq_length)
        self.skipped: Counter[str] = Counter()
        if too_long_I.any():
            self.skipped[f"more than {self.seq_length} tokens"] = int(too_long_I.sum())
        if too_visual_I.any():
            self.skipped[f"more than {self.visual_seq_length} visual tokens"] = int(too_visual_I.sum())
        return (self.token_counts_I > 0) & ~too_long_I & ~too_visual_I

    def _nothing_fits(self) -> str:
        usable_I = self.token_counts_I > 0
        if not usable_I.any():
            return f"none of the {len(usable_I)} samples can be used"
        return (
            f"none of the {len(usable_I)} samples fits: the shortest has "
            f"{self.token_counts_I[usable_I].min()} tokens (seq_length is {self.seq_length}), the fewest visual "
            f"tokens are {self.visual_counts_I[usable_I].min()} (visual_seq_length is {self.visual_seq_length})"
        )


def _joined(parts: Sequence[NDArray[np.int32]]) -> NDArray[np.int32]:
    """One array; the only one there is without a copy."""
    return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.int32), *parts])
