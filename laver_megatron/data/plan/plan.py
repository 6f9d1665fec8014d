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
from laver_megatron.data.plan.mixture import EpochOrder, Mixture, shuffle
from laver_megatron.data.plan.sizes import SampleSizes
from laver_megatron.data.plan.usable import UsableRows

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
        rows: of each source, those that take part; num_fitting: of all sources.
        skipped: samples that do not fit, by reason.

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
        self._first_sample_ids = np.cumsum([0, *(len(source) for source in self.sources)])
        self.rows = tuple(UsableRows(source, seq_length, visual_seq_length) for source in self.sources)
        self.num_fitting = sum(map(len, self.rows))
        self.skipped = self._skipped()
        if self.num_fitting == 0:
            raise ValueError(self._nothing_fits())
        self._mixture = Mixture(self.sources, self.rows, seed)
        if len(self._mixture) == 0:
            raise ValueError(
                f"the weights {[source.weight for source in self.sources]} leave none of {self.num_fitting} samples"
            )
        for source, rows in zip(self.sources, self.rows, strict=True):
            if source.weight > 0 and len(rows) and round(source.weight * len(rows)) == 0:
                raise ValueError(
                    f"a weight of {source.weight} leaves none of a source's {len(rows)} samples in any epoch; "
                    "raise it, or leave the source out"
                )
        self.num_windows = -(-len(self._mixture) // window)  # of an epoch, all of the same size or one less
        # The number of each window's first pack, through all epochs, as far as they are packed, and which window's
        # is the first one.
        self._first_packs, self._first_window = [0], 0
        self._orders: OrderedDict[int, EpochOrder] = OrderedDict()
        self._windows: OrderedDict[int, WindowPacks] = OrderedDict()
        self._styles: tuple[Style, ...] | None = None  # until a window is packed
        self._fingerprint = ""  # until it is asked for

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
        assert 0 <= sample_id < self._first_sample_ids[-1], sample_id
        source = int(np.searchsorted(self._first_sample_ids, sample_id, side="right")) - 1
        return source, sample_id - int(self._first_sample_ids[source])

    def sizes(self, sample_ids: Sequence[int] | NDArray[np.integer]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Tokens and visual tokens of samples, by their global ids."""
        ids_I = np.asarray(sample_ids, np.int64)
        tokens_I, visual_I = np.empty(len(ids_I), np.int32), np.empty(len(ids_I), np.int32)
        source_I = np.searchsorted(self._first_sample_ids, ids_I, side="right") - 1
        for number in np.unique(source_I).tolist():
            asked_I = source_I == number
            rows_I = ids_I[asked_I] - self._first_sample_ids[number]
            tokens_I[asked_I] = self.sources[number].tokens_I[rows_I]
            visual_I[asked_I] = self.sources[number].visual_I[rows_I]
        return tokens_I, visual_I

    def fingerprint(self) -> str:
        """Changes whenever any pack could: stored with a position, and compared on resuming."""
        if not self._fingerprint:
            settings = [ALGORITHM, self.seq_length, self.visual_seq_length, self.seed, self.window]
            sources = [(len(source), source.weight) for source in self.sources]
            digest = hashlib.sha256(json.dumps([settings, sources]).encode())
            for source in self.sources:
                for values_I in (source.tokens_I, source.visual_I, source.shard_I):
                    digest.update(np.ascontiguousarray(values_I, dtype="<i4").data)
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint

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
        order = self._order(epoch)
        begin, end = (len(order) * edge // self.num_windows for edge in (part, part + 1))
        ids_I = order.at(begin + shuffle(end - begin, self.seed, epoch, _WINDOW, part))
        if self._styles is None:
            self._styles, self._good_enough = self._rank_styles()
        pack_I = pack_window(
            *self.sizes(ids_I), self.seq_length, self.visual_seq_length, self._styles, self._good_enough
        )
        place_P = shuffle(int(pack_I.max()) + 1, self.seed, epoch, _PACKS, part)
        place_I = place_P[pack_I]
        begin_P = np.concatenate([[0], np.cumsum(np.bincount(place_I))])
        return WindowPacks(ids_I[np.argsort(place_I, kind="stable")], begin_P)

    def _rank_styles(self) -> tuple[tuple[Style, ...], float]:
        """The ways of packing that suit the first epoch best, judged by a window's worth of its samples, and how good
        they are."""
        order = self._order(0)
        num_samples = min(self.window, len(order))
        ids_I = order.at(np.arange(num_samples) * len(order) // num_samples)  # spread over all shards
        styles, good_enough = rank_styles(*self.sizes(ids_I), self.seq_length, self.visual_seq_length)
        return styles[:_STYLES_TRIED], good_enough

    def _order(self, epoch: int) -> EpochOrder:
        if epoch not in self._orders:
            self._orders[epoch] = self._mixture.order(epoch)
            if len(self._orders) > _EPOCHS_KEPT:
                self._orders.popitem(last=False)
        self._orders.move_to_end(epoch)
        return self._orders[epoch]

    def _skipped(self) -> Counter[str]:
        """Samples that do not fit, without those that could not be read when they were counted."""
        return +Counter(
            {
                f"more than {self.seq_length} tokens": sum(rows.num_too_long for rows in self.rows),
                f"more than {self.visual_seq_length} visual tokens": sum(rows.num_too_visual for rows in self.rows),
            }
        )

    def _nothing_fits(self) -> str:
        tokens = [source.tokens_I[source.tokens_I > 0] for source in self.sources]
        visual = [source.visual_I[source.tokens_I > 0] for source in self.sources]
        num_samples = int(self._first_sample_ids[-1])
        if not sum(map(len, tokens)):
            return f"none of the {num_samples} samples can be used"
        return (
            f"none of the {num_samples} samples fits: the shortest has "
            f"{min(part.min() for part in tokens if len(part))} tokens (seq_length is {self.seq_length}), the fewest "
            f"visual tokens are {min(part.min() for part in visual if len(part))} "
            f"(visual_seq_length is {self.visual_seq_length})"
        )
