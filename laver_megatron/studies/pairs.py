"""One arm against another as measured: pairs of runs, one of each arm, compared without a law.

Runs of the same size and seed are a pair at equal data if their tokens are the same, at equal FLOPs if these are; the
same means within 1%. The mean of several pairs has an interval by Student's t over what the pairs scatter by, over
sizes and seeds (that of all amounts also over these), whether from noise or because the difference changes with size.

Letters: R runs of the baseline, T of the treated arm.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from laver_megatron.studies.observations import SAME, Array, check_comparable, cluster, first_few
from laver_megatron.studies.study import ArmRuns

EQUAL_DATA = "equal data"  # the same size and tokens; treated costs more FLOPs
EQUAL_FLOPS = "equal FLOPs"  # the same size and FLOPs; treated sees fewer tokens


@dataclass(frozen=True)
class Pair:
    """Two runs. kind: what is equal beside size and seed.

    baseline, treated: the column's values. log_ratio: treated over baseline, of the loss (the distance from a ceiling);
    None where that is not above 0, which only a law needs. FLOPs are None where they were not counted."""

    kind: str
    size: float
    seed: str
    baseline_name: str
    treated_name: str
    baseline_tokens: float
    treated_tokens: float
    baseline_flops: float | None
    treated_flops: float | None
    baseline: float
    treated: float
    log_ratio: float | None

    @property
    def difference(self) -> float:
        return self.treated - self.baseline

    @property
    def amount(self) -> float:
        """Tokens or FLOPs of the baseline, as the kind says."""
        amount = self.baseline_tokens if self.kind == EQUAL_DATA else self.baseline_flops
        assert amount is not None, "pairs at equal FLOPs have them"
        return amount


@dataclass(frozen=True)
class MeanDifference:
    """The mean over pairs of one amount, or of all amounts (None). low, high: its interval; None of a single pair."""

    kind: str
    amount: float | None
    num_pairs: int
    difference: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class PairedComparison:
    """Two arms, by name, and what their pairs say. notes: what a reader should know of the pairs."""

    baseline: str
    treated: str
    pairs: tuple[Pair, ...]
    means: tuple[MeanDifference, ...]
    notes: tuple[str, ...]


def compare_pairs(arms: Mapping[str, ArmRuns], baseline: str, level: float = 0.95) -> PairedComparison:
    """Compares two arms by their pairs of runs.

    Raises:
        ValueError: not two arms, or neither is the baseline; values that are not numbers.
    """
    if len(arms) != 2:
        raise ValueError(
            f"pairs of runs are those of two arms, but there are {len(arms)} ({', '.join(arms)}); --arm-by COLUMN, "
            "such as laver, makes arms, and --where chooses among them"
        )
    treated = treated_arm(arms, baseline)
    for arm in arms.values():
        check_comparable(arm.observations)
    pairs = find_pairs(arms[baseline], arms[treated])
    alone = unpaired(arms[baseline], arms[treated], pairs)
    notes = []
    if not pairs:
        notes.append(
            "no two runs of the arms have size, seed and tokens or FLOPs in common: nothing is measured in pairs"
        )
    elif alone:
        number = sum(len(arm.observations) for arm in arms.values())
        off = [
            f"{name} ({f'the nearest is {distance:.1%} off' if distance < np.inf else 'none of its size and seed'})"
            for name, distance in alone.items()
        ]
        notes.append(
            f"{len(alone)} of {number} runs have no partner with their size and seed and tokens or FLOPs within 1%, "
            f"and so no part in what is measured: {first_few(off)}"
        )
    return PairedComparison(baseline, treated, tuple(pairs), tuple(mean_differences(pairs, level)), tuple(notes))


def compare_with_baseline(arms: Mapping[str, ArmRuns], baseline: str, level: float = 0.95) -> list[PairedComparison]:
    """Compares every other arm with the baseline by `compare_pairs`, in their order.

    Raises:
        ValueError: fewer than two arms, none of them the baseline, values that are not numbers.
    """
    if len(arms) <= 2:
        return [compare_pairs(arms, baseline, level)]
    if baseline not in arms:
        raise ValueError(f"the arms are {', '.join(arms)}; name the one to compare with as --baseline")
    treated = (name for name in arms if name != baseline)
    return [compare_pairs({baseline: arms[baseline], name: arms[name]}, baseline, level) for name in treated]


def treated_arm(arms: Mapping[str, ArmRuns], baseline: str) -> str:
    """The other of two arms.

    Raises:
        ValueError: neither is the baseline.
    """
    if baseline not in arms:
        raise ValueError(f"the arms are {' and '.join(arms)}; name the one to compare with as --baseline")
    (treated,) = set(arms) - {baseline}
    return treated


def find_pairs(baseline: ArmRuns, treated: ArmRuns) -> list[Pair]:
    """All pairs, at equal data and then at equal FLOPs, by amount and size. Runs that could pair with several alike
    (repeats without different seeds) have none."""
    pairs: dict[tuple[int, int], Pair] = {}
    for kind, ours_R, theirs_T in _amounts(baseline, treated):
        for i, j in _mutually_nearest(baseline, ours_R, treated, theirs_T):
            # Where a token costs both arms the same, runs at equal FLOPs are the pairs at equal data again.
            if (i, j) not in pairs:
                pairs[i, j] = _pair(kind, baseline, i, treated, j)
    return list(pairs.values())


def unpaired(baseline: ArmRuns, treated: ArmRuns, pairs: Sequence[Pair]) -> dict[str, float]:
    """Runs of either arm that are in no pair, by name: how far off (0.02: 2%) the nearest of the other arm with the
    same size and seed is, in tokens or FLOPs; infinity where it has none."""
    paired = {name for pair in pairs for name in (pair.baseline_name, pair.treated_name)}
    found: dict[str, float] = {}
    for ours, theirs in ((baseline, treated), (treated, baseline)):
        distances = [_log_distance(ours_R, theirs_T) for _, ours_R, theirs_T in _amounts(ours, theirs)]
        nearest_R = np.where(_may_pair(ours, theirs), np.minimum.reduce(distances), np.inf).min(axis=1)
        distances_by_name = zip(ours.observations.names, np.expm1(nearest_R).tolist(), strict=True)
        found |= {name: distance for name, distance in distances_by_name if name not in paired}
    return found


def _amounts(baseline: ArmRuns, treated: ArmRuns) -> Iterator[tuple[str, Array, Array]]:
    """(what may be equal, the baseline's, the treated arm's): tokens, and FLOPs where both have been counted."""
    yield EQUAL_DATA, baseline.observations.tokens_R, treated.observations.tokens_R
    if baseline.flops_R is not None and treated.flops_R is not None:
        yield EQUAL_FLOPS, baseline.flops_R, treated.flops_R


def _log_distance(ours_R: Array, theirs_T: Array) -> Array:
    """Absolute logarithm of the ratio of every one to every other, [R, T]."""
    return np.abs(np.log(ours_R)[:, None] - np.log(theirs_T))


def _may_pair(baseline: ArmRuns, treated: ArmRuns) -> NDArray[np.bool_]:
    """Which runs have size and seed in common, [R, T]."""
    sizes_RT = _log_distance(baseline.observations.size_R, treated.observations.size_R)
    return (sizes_RT < SAME) & (np.array(baseline.seeds)[:, None] == np.array(treated.seeds))


def _mutually_nearest(baseline: ArmRuns, ours_R: Array, treated: ArmRuns, theirs_T: Array) -> Iterator[tuple[int, int]]:
    """Indexes of runs that are each other's nearest, without ties, by amount and size."""
    distance_RT = _log_distance(ours_R, theirs_T)
    may_RT = (distance_RT < SAME) & _may_pair(baseline, treated)
    distance_RT = np.where(may_RT, distance_RT, np.inf)
    nearest_RT = may_RT & (distance_RT == distance_RT.min(axis=1, keepdims=True))
    nearest_RT &= distance_RT == distance_RT.min(axis=0)
    nearest_RT &= (nearest_RT.sum(axis=1, keepdims=True) == 1) & (nearest_RT.sum(axis=0) == 1)
    rows, columns = np.nonzero(nearest_RT)
    order = np.lexsort((baseline.observations.size_R[rows], ours_R[rows]))
    yield from zip(rows[order].tolist(), columns[order].tolist(), strict=True)


def _pair(kind: str, baseline: ArmRuns, i: int, treated: ArmRuns, j: int) -> Pair:
    ours, theirs = baseline.observations, treated.observations
    losses = ours.loss_R[i], theirs.loss_R[j]
    return Pair(
        kind=kind,
        size=float(ours.size_R[i]),
        seed=baseline.seeds[i],
        baseline_name=ours.names[i],
        treated_name=theirs.names[j],
        baseline_tokens=float(ours.tokens_R[i]),
        treated_tokens=float(theirs.tokens_R[j]),
        baseline_flops=None if baseline.flops_R is None else float(baseline.flops_R[i]),
        treated_flops=None if treated.flops_R is None else float(treated.flops_R[j]),
        baseline=float(ours.column_R[i]),
        treated=float(theirs.column_R[j]),
        log_ratio=float(np.log(losses[1] / losses[0])) if min(losses) > 0 else None,
    )


def mean_differences(pairs: Sequence[Pair], level: float = 0.95) -> list[MeanDifference]:
    """Of each kind the mean at each amount (within 1%), and that of all pairs."""
    means = []
    for kind in (EQUAL_DATA, EQUAL_FLOPS):
        chosen = [pair for pair in pairs if pair.kind == kind]
        if not chosen:
            continue
        differences, amounts = np.array([(pair.difference, pair.amount) for pair in chosen]).T
        numbers = cluster(amounts)
        for number in range(numbers.max() + 1):
            same = numbers == number
            means.append(_mean(kind, float(amounts[same].mean()), differences[same], level))
        means.append(_mean(kind, None, differences, level))
    return means


def _mean(kind: str, amount: float | None, differences: Array, level: float) -> MeanDifference:
    return MeanDifference(kind, amount, len(differences), *mean_and_interval(differences, level))


def mean_and_interval(differences: Array, level: float = 0.95) -> tuple[float, float | None, float | None]:
    """(mean, low, high) of paired differences, by Student's t; a single one has no interval."""
    number, mean = len(differences), float(differences.mean())
    if number < 2:
        return mean, None, None
    half = float(stdtrit(number - 1, (1 + level) / 2) * differences.std(ddof=1) / np.sqrt(number))
    return mean, mean - half, mean + half
