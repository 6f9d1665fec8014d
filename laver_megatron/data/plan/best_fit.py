"""Packs one window of samples under two budgets at once: pure functions of the samples' sizes.

Letters: I samples of the window, O slots of the pool that candidates are drawn from.

Two ways, because neither suits every data set. *Best fit* takes the samples by falling size and puts each into the
open pack that it leaves the least room in, of tokens and visual tokens together. It wastes next to nothing where
small samples are there to fill the gaps, as with images at their native resolution. Where an encoder makes every
image the same number of tokens, it wastes several per cent: similar samples remain for the end, and three of them
leave a gap that nothing fills. *Aiming* closes one pack after the other: it aims at what the pack still lacks,
divided by the number of samples that it is likely to take, so that large and small ones are used up together. How
best to aim depends on the sizes; `rank_styles` tries on a window of the data.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from laver_megatron.data.plan.bound import least_packs

IntArray: TypeAlias = NDArray[np.integer]

ALGORITHM = 2  # part of every plan's fingerprint: raise it when the same sizes come to be packed or ordered otherwise
_POOL = 2000  # candidates looked at for each place: more fill better and take longer
_GOOD_ENOUGH = 1.005  # packs over what each budget allows on its own: no second style is tried
_AS_USUAL = 1.002  # over what the best style needs for a sample of the data


@dataclass(frozen=True)
class Style:
    """How a window is packed.

    aims: aiming, else best fit. largest_first: share of the packs that start with the largest sample of the pool
    instead of the next one in order. rounding: a pack expected to take x more samples is filled for
    floor(x + rounding) of them.
    """

    aims: bool
    largest_first: float = 0.0
    rounding: float = 0.0


STYLES = (Style(False), *(Style(True, largest, up) for largest in (1.0, 0.75, 0.5, 0.25) for up in (0.5, 0.25)))


def pack_window(
    tokens_I: IntArray,
    visual_I: IntArray,
    seq_length: int,
    visual_seq_length: int,
    styles: Sequence[Style] = STYLES,
    good_enough: float = _GOOD_ENOUGH,
) -> IntArray:
    """The number of each sample's pack, int32 `[I]`, counting from 0 without gaps.

    styles: tried in turn until one needs no more than `good_enough` times the packs that each budget allows on its own;
    the fewest packs win, the earlier style where two are equal. Every sample must fit on its own.
    """
    assert len(tokens_I) == len(visual_I) > 0 and styles
    assert tokens_I.max() <= seq_length and visual_I.max() <= visual_seq_length
    least = least_packs(tokens_I, visual_I, seq_length, visual_seq_length)
    best_I: IntArray | None = None
    for style in styles:
        pack_I = _pack(tokens_I, visual_I, seq_length, visual_seq_length, style)
        if best_I is None or pack_I.max() < best_I.max():
            best_I = pack_I
        if best_I.max() + 1 <= least * good_enough:
            break
    assert best_I is not None
    return best_I


def rank_styles(
    tokens_I: IntArray, visual_I: IntArray, seq_length: int, visual_seq_length: int
) -> tuple[tuple[Style, ...], float]:
    """All styles, those first that pack these samples into the fewest packs; and what `pack_window` may take as good
    enough for others like them: each budget's own bound can be far below what both together allow."""
    sizes = tokens_I, visual_I, seq_length, visual_seq_length
    num_packs = {style: int(_pack(*sizes, style).max()) + 1 for style in STYLES}
    good_enough = max(_GOOD_ENOUGH, min(num_packs.values()) / least_packs(*sizes) * _AS_USUAL)
    return tuple(sorted(STYLES, key=num_packs.__getitem__)), good_enough


def _pack(tokens_I: IntArray, visual_I: IntArray, seq_length: int, visual_seq_length: int, style: Style) -> IntArray:
    if style.aims:
        return _Aiming(tokens_I, visual_I, seq_length, visual_seq_length, style).pack()
    return _best_fit(tokens_I, visual_I, seq_length, visual_seq_length)


def _best_fit(tokens_I: IntArray, visual_I: IntArray, seq_length: int, visual_seq_length: int) -> IntArray:
    """By falling tokens, each sample into the open pack that has the least room, as a share of both budgets."""
    num_samples = len(tokens_I)
    order_I = np.argsort(-tokens_I, kind="stable")
    token_room, visual_room = np.zeros(num_samples, np.int32), np.zeros(num_samples, np.int32)
    room = np.full(num_samples, np.inf)  # both together, in tokens
    visual_in_tokens = seq_length / max(visual_seq_length, 1)
    pack_I, num_packs = np.empty(num_samples, np.int32), 0
    sizes = zip(order_I.tolist(), tokens_I[order_I].tolist(), visual_I[order_I].tolist(), strict=True)
    for sample, tokens, visual in sizes:
        fits = token_room[:num_packs] >= tokens
        fits &= visual_room[:num_packs] >= visual
        room_if_fits = np.where(fits, room[:num_packs], np.inf)
        pack = int(room_if_fits.argmin()) if num_packs else 0
        if num_packs == 0 or room_if_fits[pack] == np.inf:
            pack, num_packs = num_packs, num_packs + 1
            token_room[pack], visual_room[pack] = seq_length, visual_seq_length
        token_room[pack] -= tokens
        visual_room[pack] -= visual
        room[pack] = float(token_room[pack]) + float(visual_room[pack]) * visual_in_tokens
        pack_I[sample] = pack
    return pack_I


class _Aiming:
    """One pack after the other, from a pool of the next samples in order; a sample that is taken makes room for the
    next.

    Sizes are float32 for speed: integers below 2^24 are exact, so the budgets are. Visual tokens are also kept in
    tokens (times seq_length / visual_seq_length), to weigh a gap in one against a gap in the other."""

    def __init__(
        self, tokens_I: IntArray, visual_I: IntArray, seq_length: int, visual_seq_length: int, style: Style
    ) -> None:
        assert seq_length < 2**24
        self.seq_length, self.visual_seq_length, self.style = seq_length, visual_seq_length, style
        self.tokens, self.visual = tokens_I.tolist(), visual_I.tolist()
        self.visual_in_tokens = seq_length / max(visual_seq_length, 1)
        self.next = min(_POOL, len(self.tokens))
        self.sample_O = list(range(self.next))
        self.tokens_O = tokens_I[: self.next].astype(np.float32)
        self.visual_O = visual_I[: self.next].astype(np.float32)
        self.scaled_visual_O = (visual_I[: self.next] * self.visual_in_tokens).astype(np.float32)
        self.size_O = np.maximum(self.tokens_O, self.scaled_visual_O)
        self.miss_O, self.visual_miss_O = np.empty_like(self.tokens_O), np.empty_like(self.tokens_O)
        self.num_left, self.tokens_left, self.visual_left = len(self.tokens), sum(self.tokens), sum(self.visual)

    def pack(self) -> IntArray:
        pack_I, pack, largest_due, turn = np.empty(len(self.tokens), np.int32), 0, 0.0, 0
        while self.num_left:
            largest_due += self.style.largest_first
            if largest_due >= 1:
                slot, largest_due = int(self.size_O.argmax()), largest_due - 1
            else:
                while self.size_O[turn] < 0:  # empty
                    turn = (turn + 1) % len(self.size_O)
                slot, turn = turn, (turn + 1) % len(self.size_O)
            self._fill_pack(slot, pack, pack_I)
            pack += 1
        return pack_I

    def _fill_pack(self, slot: int, pack: int, pack_I: IntArray) -> None:
        """Takes the sample in `slot` and then, as long as any fits, the one nearest to what the pack lacks."""
        token_room, visual_room = self.seq_length, self.visual_seq_length
        # What is scarce for the samples left is to be used up; of the other, what a fair share leaves over may stay.
        visual_load, token_load = self.visual_left * self.visual_in_tokens, float(self.tokens_left)
        spare_tokens = self.seq_length * (1 - token_load / max(token_load, visual_load))
        spare_visual = self.seq_length * (1 - visual_load / max(token_load, visual_load))
        while True:
            sample = self._take(slot)
            pack_I[sample] = pack
            token_room, visual_room = token_room - self.tokens[sample], visual_room - self.visual[sample]
            if not self.num_left or not token_room:
                return
            token_goal = max(token_room - spare_tokens, 0.0)
            visual_goal = max(visual_room * self.visual_in_tokens - spare_visual, 0.0)
            mean_size = (self.tokens_left + self.visual_left * self.visual_in_tokens) / self.num_left
            num_more = max(1, math.floor((token_goal + visual_goal) / mean_size + self.style.rounding))
            slot = self._nearest(token_goal / num_more, visual_goal / num_more, token_room, visual_room)
            if slot < 0:
                return

    def _nearest(self, tokens: float, scaled_visual: float, token_room: int, visual_room: int) -> int:
        """The slot of the sample that fits and is nearest to these sizes, or -1; the first of equals."""
        miss_O, visual_miss_O = self.miss_O, self.visual_miss_O
        np.subtract(self.tokens_O, np.float32(tokens), out=miss_O)
        np.abs(miss_O, out=miss_O)
        np.subtract(self.scaled_visual_O, np.float32(scaled_visual), out=visual_miss_O)
        np.abs(visual_miss_O, out=visual_miss_O)
        miss_O += visual_miss_O
        too_large_O = self.tokens_O > token_room
        too_large_O |= self.visual_O > visual_room
        np.putmask(miss_O, too_large_O, np.inf)
        slot = int(miss_O.argmin())
        return slot if miss_O[slot] < np.inf else -1

    def _take(self, slot: int) -> int:
        sample = self.sample_O[slot]
        self.num_left -= 1
        self.tokens_left -= self.tokens[sample]
        self.visual_left -= self.visual[sample]
        if self.next < len(self.tokens):
            self._put(slot, self.tokens[self.next], self.visual[self.next])
            self.sample_O[slot] = self.next
            self.next += 1
        else:
            self.tokens_O[slot] = np.inf  # fits nowhere
            self.size_O[slot] = -1
        return sample

    def _put(self, slot: int, tokens: int, visual: int) -> None:
        scaled_visual = visual * self.visual_in_tokens
        self.tokens_O[slot], self.visual_O[slot], self.scaled_visual_O[slot] = tokens, visual, scaled_visual
        self.size_O[slot] = max(tokens, scaled_visual)
