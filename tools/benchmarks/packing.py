"""Measures how full packs get on data sets drawn from stated sizes, against what the sizes allow, and the time.

    python tools/benchmarks/packing.py                               # a million samples of each, some minutes
    python tools/benchmarks/packing.py --data native --samples 20000

Text: tokens log-normal as in conversations about pictures (median 220, the longest 3,000), 30 tokens of template and
2 around every image.

- native: 15% of the samples have no image, 70% one, 8% two, 4% three, 3% four. Images keep their shape in patches of
  28 pixels, at most 1024 of them. 35% are photographs of 640 x 480, 45% pictures from the web (long side log-normal,
  median 700; the short side half of it to all of it), 20% pages (long side median 1400; short side 65 to 80%).
- 729, 576: every image is that many tokens, as with an encoder of a fixed resolution; 15% of the samples have no
  image, 75% one, 6% two, 3% three, 1% four.
- many 729, many 576: the same with as many images in a sample as in native.
- captions 729, 576: one image in each sample and a caption of a sentence (median 30 tokens), as in alignment data.

Where packs are far from the bound of each budget alone, that of both together takes seconds more.
"""

# Letters: I samples, M images of a sample, up to four; T kinds of samples; C + 1 tokens from 0 to a pack's, in grains;
# M + 1 numbers of images from 0 to a pack's.

import argparse
import math
import resource
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import csr_matrix

from laver_megatron.data.plan.bound import least_packs
from laver_megatron.data.plan.plan import PackPlan
from laver_megatron.data.plan.sizes import SampleSizes
from laver_megatron.data.plan.visual_budget import propose_visual_budget

DATA_SETS = ("native", "729", "576", "many 729", "many 576", "captions 729", "captions 576")
_NATIVE_SHARES, _FIXED_SHARES = (0.15, 0.70, 0.08, 0.04, 0.03), (0.15, 0.75, 0.06, 0.03, 0.01)
_GOOD_ENOUGH = 1.005  # packs over the bound of each budget alone: the tighter bound is not computed
_SAMPLES_A_SHARD, _PATCH, _MOST_PATCHES = 2_000, 28, 1_024

Pack: TypeAlias = tuple[tuple[int, int], ...]  # (kind of sample, how often)

_GRAINS = 512  # of a pack's tokens: more are slower and hardly tighter
_MOST_IMAGES = 16  # in a pack
_CLOSE_ENOUGH = 0.25  # packs that the weights may lack to the best
_MOST_ROUNDS = 100
_CAUTION = 0.7  # how much of the best weights so far goes into the next ones, which else swing to and fro
_ROUNDING_ERROR = 1e-6  # packs


def benchmark(data_sets: Sequence[str], num_samples: int, seq_length: int, window: int, multiple_of: int) -> str:
    """Plans one epoch of each, in this process, and returns a Markdown table. The budget is the proposed one."""
    lines = [
        f"{num_samples:,} samples, seq_length {seq_length}, windows of {window:,} samples.",
        "",
        "| data | visual budget | left out | packs | tokens: fill / bound | visual: fill / bound | of bound | CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in data_sets:
        source = draw_source(name, num_samples, seed=0)
        started = time.process_time()
        budget = propose_visual_budget([source], seq_length, multiple_of)
        plan = PackPlan([source], seq_length, budget, seed=0, window=window)
        num_packs = plan.num_packs()
        seconds = time.process_time() - started
        fill = measure_fill(plan, num_windows=plan.num_windows)
        lines.append(
            f"| {name} | {budget} | {sum(plan.skipped.values()) / num_samples:.2%} | {num_packs} "
            f"| {fill.token_fill:.2%} / {fill.token_bound:.2%} | {fill.visual_fill:.2%} / {fill.visual_bound:.2%} "
            f"| {fill.share_of_bound:.2%} | {seconds:.1f} |"
        )
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    note = f"Most memory of the process: {peak_mib:.0f} MiB. The CPU's seconds include proposing the budget."
    return "\n".join([*lines, "", note])


def draw_source(name: str, num_samples: int, seed: int) -> SampleSizes:
    """A data set of this module's list, in shards of 2,000 samples."""
    assert name in DATA_SETS, name
    rng = np.random.default_rng(seed)
    if name.startswith("captions"):
        num_images_I = np.ones(num_samples, np.int64)
        text_I = _log_normal(rng, 30, 0.5, num_samples, 8, 200)
    else:
        shares = _NATIVE_SHARES if name.startswith(("native", "many")) else _FIXED_SHARES
        num_images_I = rng.choice(5, num_samples, p=shares)
        text_I = _log_normal(rng, 220, 0.9, num_samples, 12, 3_000)
    if name == "native":
        used_IM = np.arange(4) < num_images_I[:, None]
        visual_I = np.where(used_IM, _native_patches(rng, used_IM.shape), 0).sum(axis=1)
    else:
        visual_I = num_images_I * int(name.split()[-1])
    tokens_I = text_I.astype(np.int64) + 30 + 2 * num_images_I + visual_I
    return SampleSizes(tokens_I, visual_I, np.arange(num_samples) // _SAMPLES_A_SHARD)


def _native_patches(rng: Generator, shape: tuple[int, ...]) -> NDArray[np.int64]:
    kind = rng.random(shape)
    photograph, page = kind < 0.35, kind >= 0.80
    web_side, page_side = _log_normal(rng, 700, 0.5, shape, 100, 3_000), _log_normal(rng, 1400, 0.3, shape, 400, 4_000)
    long_side = np.where(photograph, 640, np.where(page, page_side, web_side))
    web_ratio, page_ratio = rng.uniform(0.5, 1, shape), rng.uniform(0.65, 0.8, shape)
    short_side = long_side * np.where(photograph, 0.75, np.where(page, page_ratio, web_ratio))
    scale = np.minimum(1, np.sqrt(_MOST_PATCHES * _PATCH**2 / (long_side * short_side)))
    sides = (np.maximum(1, side * scale // _PATCH).astype(np.int64) for side in (long_side, short_side))
    return np.multiply(*sides)


def _log_normal(
    rng: Generator, median: float, sigma: float, shape: int | tuple[int, ...], low: float, high: float
) -> NDArray[np.float64]:
    return np.clip(rng.lognormal(np.log(median), sigma, shape), low, high)


@dataclass(frozen=True)
class FillReport:
    """Slots of some packs, and how many hold a token. least_packs: no packing of the same samples needs fewer."""

    num_packs: int
    least_packs: int
    tokens_used: int
    tokens_available: int
    visual_used: int
    visual_available: int

    @property
    def token_fill(self) -> float:
        return self.tokens_used / self.tokens_available

    @property
    def visual_fill(self) -> float:
        return self.visual_used / self.visual_available if self.visual_available else 1.0

    @property
    def token_bound(self) -> float:
        """The most that `token_fill` could be."""
        return self.token_fill / self.share_of_bound

    @property
    def visual_bound(self) -> float:
        """The most that `visual_fill` could be."""
        return self.visual_fill / self.share_of_bound

    @property
    def share_of_bound(self) -> float:
        """Of either fill: both are sums of sizes over packs."""
        return self.least_packs / self.num_packs

    def __str__(self) -> str:
        return (
            f"{self.token_fill:.1%} of the token slots (at most {self.token_bound:.1%} with these sizes) and "
            f"{self.visual_fill:.1%} of the visual slots (at most {self.visual_bound:.1%})"
        )


def measure_fill(plan: PackPlan, first_window: int = 0, num_windows: int = 1) -> FillReport:
    """The fill of `num_windows` windows. The bound is that of all their samples packed together: the larger one of each
    budget's own, and where these leave open whether the packs are good, of both together, which takes seconds and needs
    scipy."""
    parts = [plan.window_packs(window) for window in range(first_window, first_window + num_windows)]
    ids_I = np.concatenate([part.sample_id_I for part in parts])
    num_packs = sum(len(part) for part in parts)
    sizes = tokens_I, visual_I = plan.sizes(ids_I)
    least = least_packs(*sizes, plan.seq_length, plan.visual_seq_length)
    if num_packs > least * _GOOD_ENOUGH:
        least = max(least, least_packs_jointly(*sizes, plan.seq_length, plan.visual_seq_length))
    return FillReport(
        num_packs=num_packs,
        least_packs=least,
        tokens_used=int(tokens_I.sum(dtype=np.int64)),
        tokens_available=num_packs * plan.seq_length,
        visual_used=int(visual_I.sum(dtype=np.int64)),
        visual_available=num_packs * plan.visual_seq_length,
    )


# The joint bound: how few packs both budgets together allow where images are all of one size.
#
# Give every kind of sample a weight, so that no pack can weigh more than 1. Then there are at least as many packs as
# all samples weigh together. data/plan/bound.py uses weights that follow one budget's sizes; here a linear program
# finds the weights with the largest sum. The conditions (no pack may be too heavy) are too many to list, so it starts
# with few, and the heaviest pack that its weights allow, found by dynamic programming, becomes the next one. Weights
# divided by that pack's are a bound at any time. [Gilmore and Gomory, A linear programming approach to the cutting
# stock problem, 1961; Farley, A note on bounding a class of linear programming problems, 1990.] Tokens are rounded down
# to grains, which only loosens the bound, so it still holds.
#
# It matters where samples of several images leave token slots that only samples with few images could fill: 15% of them
# in a mix for packs of four images make the bound of each budget alone 1 to 2% too low.


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", nargs="+", choices=DATA_SETS, default=DATA_SETS, help="which ones (default: all)")
    add("--samples", type=int, default=1_000_000, help="of each (default: 1,000,000)")
    add("--seq-length", type=int, default=4096, help="tokens of a pack (default: 4096)")
    add("--window", type=int, default=10_000, help="samples packed together (default: 10,000)")
    add("--multiple-of", type=int, default=8, help="of the proposed visual budget (default: 8)")
    options = parser.parse_args()
    print(benchmark(options.data, options.samples, options.seq_length, options.window, options.multiple_of))


if __name__ == "__main__":
    main()
