"""How few packs both budgets together allow, where images are all of one size: a true bound by linear programming.

Letters: T kinds of samples; C + 1 tokens from 0 to a pack's, in grains; M + 1 numbers of images from 0 to a pack's.

Give every kind of sample a weight, so that no pack can weigh more than 1. Then there are at least as many packs as all
samples weigh together. bound.py does that with weights that follow one budget's sizes; here a linear program finds the
weights that weigh most. That no pack may be too heavy are endless conditions, so it starts with few, and the heaviest
pack that its weights allow, found by dynamic programming, becomes the next one. Weights divided by that pack's are a
bound at any time. [Gilmore and Gomory, A linear programming approach to the cutting stock problem, 1961; Farley, A note
on bounding a class of linear programming problems, 1990.] Tokens are rounded down to grains, which allows more than
there is, so that the bound holds.

It matters where samples of several images leave token slots that only samples with few images could fill: 15% of them
in a mix for packs of four images make each budget's own bound 1 to 2% too low.
"""

import math
from collections import Counter
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Pack: TypeAlias = tuple[tuple[int, int], ...]  # (kind of sample, how often)

_GRAINS = 512  # of a pack's tokens: more are slower and hardly tighter
_MOST_IMAGES = 16  # in a pack
_CLOSE_ENOUGH = 0.25  # packs that the weights may lack to the best
_MOST_ROUNDS = 100
_CAUTION = 0.7  # how much of the best weights so far goes into the next ones, which else swing to and fro
_ROUNDING_ERROR = 1e-6  # packs


def least_packs_jointly(
    tokens_I: NDArray[np.integer], visual_I: NDArray[np.integer], seq_length: int, visual_seq_length: int
) -> int:
    """The packs that these samples need at least; 0, which says nothing, without images or where more than 16 of what
    all visual tokens are multiples of have room in a pack. Takes seconds, and needs scipy."""
    image = int(np.gcd.reduce(visual_I)) if len(visual_I) else 0
    if image == 0 or visual_seq_length // image > _MOST_IMAGES:
        return 0
    grain = -(-seq_length // _GRAINS)
    kinds = np.stack([tokens_I // grain, visual_I // image], axis=1)
    kind_T, num_T = np.unique(kinds[kinds[:, 0] > 0], axis=0, return_counts=True)  # less than a grain is nothing
    if len(kind_T) == 0:
        return 0
    packer = _HeaviestPacks(kind_T[:, 0], kind_T[:, 1], seq_length // grain, visual_seq_length // image)
    return math.ceil(_heaviest_weights(packer, num_T) - _ROUNDING_ERROR)


def _heaviest_weights(packer: "_HeaviestPacks", num_T: NDArray[np.integer]) -> float:
    """What all samples weigh at most together, or a little less."""
    best, most = 0.0, math.inf
    best_T: NDArray[np.floating] = np.zeros(len(num_T))
    proposed_T: NDArray[np.floating] = np.ones(len(num_T))  # by the linear program, which knows too few conditions
    weight_T: NDArray[np.floating] = packer.tokens_T / packer.num_tokens  # the bound of full packs
    conditions = dict.fromkeys(packer.of_one_kind())
    for _ in range(_MOST_ROUNDS):
        heaviest, packs = packer.find(weight_T)
        if num_T @ weight_T / heaviest > best:
            best, best_T = float(num_T @ weight_T / heaviest), weight_T / heaviest
        if most - best < _CLOSE_ENOUGH:
            break
        broken = [pack for pack in packs if sum(times * proposed_T[kind] for kind, times in pack) > 1 + _ROUNDING_ERROR]
        if broken:
            conditions.update(dict.fromkeys(broken))
            proposed_T = _solve(list(conditions), num_T)
            most = float(num_T @ proposed_T)
        weight_T = _CAUTION * best_T + (1 - _CAUTION) * proposed_T
    return best


def _solve(packs: list[Pack], num_T: NDArray[np.integer]) -> NDArray[np.floating]:
    """The weights that weigh most together while none of these packs weighs more than 1."""
    from scipy.optimize import linprog
    from scipy.sparse import csr_matrix

    entries = [(row, kind, times) for row, pack in enumerate(packs) for kind, times in pack]
    rows, kinds, times = zip(*entries, strict=True)
    table = csr_matrix((times, (kinds, rows)), shape=(len(num_T), len(packs)))
    # The dual program, which is solved faster: how often each pack is taken, so that all samples have a place.
    solution = linprog(np.ones(len(packs)), A_ub=-table, b_ub=-num_T, bounds=(0, None), method="highs")
    assert solution.status == 0, solution.message
    return -solution.ineqlin.marginals


class _HeaviestPacks:
    """Finds the heaviest packs of kinds of samples, each of which may come any number of times."""

    def __init__(
        self, tokens_T: NDArray[np.integer], images_T: NDArray[np.integer], num_tokens: int, num_images: int
    ) -> None:
        assert tokens_T.min() > 0
        self.tokens_T, self.images_T, self.num_tokens, self.num_images = tokens_T, images_T, num_tokens, num_images
        # Kinds by their images, by rising tokens: those that fit into some room are the first ones.
        self._kinds_of = [np.flatnonzero(images_T == images) for images in range(num_images + 1)]
        room_C = np.arange(num_tokens + 1)
        self._num_fitting = [
            np.searchsorted(tokens_T[kinds], room_C, side="right").tolist() for kinds in self._kinds_of
        ]

    def find(self, weight_T: NDArray[np.floating]) -> tuple[float, list[Pack]]:
        """What the heaviest pack weighs, and for each kind the heaviest pack with a sample of it."""
        heaviest_CM = np.zeros((self.num_tokens + 1, self.num_images + 1))
        choice_CM = np.full(heaviest_CM.shape, -1)  # a kind of the heaviest pack of that room; -1 if it is empty
        for tokens in range(1, self.num_tokens + 1):
            for images, kinds in enumerate(self._kinds_of):
                fitting = kinds[: self._num_fitting[images][tokens]]
                if len(fitting):
                    rest_TM = heaviest_CM[tokens - self.tokens_T[fitting], : self.num_images + 1 - images]
                    self._improve(heaviest_CM[tokens, images:], choice_CM[tokens, images:], rest_TM, fitting, weight_T)
        choices = choice_CM.tolist()
        return float(heaviest_CM[-1, -1]), [self._trace(choices, kind) for kind in range(len(weight_T))]

    def of_one_kind(self) -> list[Pack]:
        """For each kind the pack with as many samples of it as have room."""
        num_T = self.num_tokens // self.tokens_T
        with_images_T = self.images_T > 0
        num_T[with_images_T] = np.minimum(num_T, self.num_images // np.maximum(self.images_T, 1))[with_images_T]
        return [((kind, num),) for kind, num in enumerate(num_T.tolist())]

    @staticmethod
    def _improve(
        heaviest_M: NDArray[np.floating],
        choice_M: NDArray[np.integer],
        rest_TM: NDArray[np.floating],
        kinds: NDArray[np.integer],
        weight_T: NDArray[np.floating],
    ) -> None:
        """Takes the best of these kinds with what is heaviest in the room that it leaves, where that is heavier."""
        weight_TM = rest_TM + weight_T[kinds, None]
        best_M = weight_TM.argmax(axis=0)
        weight_M = weight_TM[best_M, np.arange(len(best_M))]
        better_M = weight_M > heaviest_M
        heaviest_M[better_M], choice_M[better_M] = weight_M[better_M], kinds[best_M[better_M]]

    def _trace(self, choices: list[list[int]], kind: int) -> Pack:
        pack: Counter[int] = Counter()
        tokens, images = self.num_tokens, self.num_images
        while kind >= 0:
            pack[kind] += 1
            tokens, images = tokens - int(self.tokens_T[kind]), images - int(self.images_T[kind])
            kind = choices[tokens][images]
        return tuple(sorted(pack.items()))
