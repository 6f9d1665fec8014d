"""One arm against another as it was measured: pairs of runs, one of each arm, that need no law to be compared.

Runs of the same size and seed are a pair at equal data if their tokens are the same, at equal FLOPs if these are; the
same means within 1%. The mean of several pairs has an interval by Student's t: of what they scatter over sizes and
seeds (over all amounts also with these), which noise and a difference that changes with size make alike.

Letters: R runs of the baseline, T of the treated arm.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from laver_megatron.studies.comparison import EQUAL_DATA, EQUAL_FLOPS
from laver_megatron.studies.points import SAME, Array, check_values, groups, listed
from laver_megatron.studies.study import StudyArm


@dataclass(frozen=True)
class Pair:
    """Two runs. kind: what is equal beside size and seed. tokens, flops (None where nobody counted them) and the
    column's value are of each run; log_ratio: of treated over baseline, of the loss (the distance from a ceiling); None
    where that is not above 0, which only a law needs."""

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


@dataclass(frozen=True)
class MeanDifference:
    """The mean over pairs. amount: tokens or FLOPs of the baseline, as the kind says; None for all of the kind
    together. low, high: its interval; None of one pair."""

    kind: str
    amount: float | None
    num_pairs: int
    difference: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Measured:
    """Two arms, by name, and what their pairs say. notes: what a reader should know of the pairs."""

    baseline: str
    treated: str
    pairs: tuple[Pair, ...]
    means: tuple[MeanDifference, ...]
    notes: tuple[str, ...]


def measure(study: Mapping[str, StudyArm], baseline: str, level: float = 0.95) -> Measured:
    """Compares two arms by their pairs of runs.

    Raises:
        ValueError: other than two arms, or none of them the baseline; values that are no numbers.
    """
    if len(study) != 2:
        raise ValueError(
            f"pairs of runs are those of two arms, but there are {len(study)} ({', '.join(study)}); --arm-by COLUMN, "
            "such as laver, makes arms, and --where chooses among them"
        )
    treated = treated_arm(study, baseline)
    for arm in study.values():
        check_values(arm.points)
    pairs = find_pairs(study[baseline], study[treated])
    alone = missed(study[baseline], study[treated], pairs)
    notes = []
    if not pairs:
        notes.append(
            "no two runs of the arms have size, seed and tokens or FLOPs in common: nothing is measured in pairs"
        )
    elif alone:
        off = [f"{name} ({_off(distance)})" for name, distance in alone.items()]
        number = sum(len(arm.points) for arm in study.values())
        notes.append(
            f"{len(alone)} of {number} runs have no partner with their size and seed and tokens or FLOPs within 1%, "
            f"and so no part in what is measured: {listed(off)}"
        )
    return Measured(baseline, treated, tuple(pairs), tuple(mean_differences(pairs, level)), tuple(notes))


def treated_arm(study: Mapping[str, StudyArm], baseline: str) -> str:
    """The other of two arms.

    Raises:
        ValueError: neither is the baseline.
    """
    if baseline not in study:
        raise ValueError(f"the arms are {' and '.join(study)}; name the one to compare with as --baseline")
    (treated,) = set(study) - {baseline}
    return treated


def _off(distance: float) -> str:
    return f"the nearest is {distance:.1%} off" if distance < np.inf else "none of its size and seed"


def find_pairs(baseline: StudyArm, treated: StudyArm) -> list[Pair]:
    """All pairs, at equal data and then at equal FLOPs, by amount and size. Runs that could pair with several alike
    (repeats that no seed tells apart) have none."""
    pairs: list[Pair] = []
    for kind, ours_R, theirs_T in _amounts(baseline, treated):
        found = [_pair(kind, baseline, i, treated, j) for i, j in _nearest(baseline, ours_R, treated, theirs_T)]
        # Where a token costs both arms alike, equal FLOPs are equal data.
        told = {(pair.baseline_name, pair.treated_name) for pair in pairs}
        pairs += [pair for pair in found if (pair.baseline_name, pair.treated_name) not in told]
    return pairs


def missed(baseline: StudyArm, treated: StudyArm, pairs: Sequence[Pair]) -> dict[str, float]:
    """Runs of either arm that are in no pair, by name: how far off (0.02: 2%) the nearest of the other arm with the
    same size and seed is, in tokens or FLOPs; infinity where it has none."""
    paired = {name for pair in pairs for name in (pair.baseline_name, pair.treated_name)}
    found: dict[str, float] = {}
    for ours, theirs in ((baseline, treated), (treated, baseline)):
        may_RT = _same_places(ours, theirs)
        distances = [_apart(ours_R, theirs_T) for _, ours_R, theirs_T in _amounts(ours, theirs)]
        nearest_R = np.where(may_RT, np.minimum.reduce(distances), np.inf).min(axis=1)
        alone = zip(ours.points.names, np.expm1(nearest_R).tolist(), strict=True)
        found |= {name: distance for name, distance in alone if name not in paired}
    return found


def _amounts(baseline: StudyArm, treated: StudyArm) -> Iterator[tuple[str, Array, Array]]:
    """(what may be equal, the baseline's, the treated arm's): tokens, and FLOPs where both have been counted."""
    yield EQUAL_DATA, baseline.points.tokens_R, treated.points.tokens_R
    if baseline.flops_R is not None and treated.flops_R is not None:
        yield EQUAL_FLOPS, baseline.flops_R, treated.flops_R


def _apart(ours_R: Array, theirs_T: Array) -> Array:
    """How far every one is from every other, as absolute logarithms of ratios, [R, T]."""
    return np.abs(np.log(ours_R)[:, None] - np.log(theirs_T))


def _same_places(baseline: StudyArm, treated: StudyArm) -> NDArray[np.bool_]:
    """Which runs have size and seed in common."""
    sizes_RT = _apart(baseline.points.size_R, treated.points.size_R)
    return (sizes_RT < SAME) & (np.array(baseline.seeds)[:, None] == np.array(treated.seeds))


def _nearest(baseline: StudyArm, ours_R: Array, treated: StudyArm, theirs_T: Array) -> Iterator[tuple[int, int]]:
    """Indexes of those that are each other's nearest."""
    distance_RT = _apart(ours_R, theirs_T)
    may_RT = (distance_RT < SAME) & _same_places(baseline, treated)
    distance_RT = np.where(may_RT, distance_RT, np.inf)
    nearest_RT = may_RT & (distance_RT == distance_RT.min(axis=1, keepdims=True))
    nearest_RT &= distance_RT == distance_RT.min(axis=0)
    nearest_RT &= (nearest_RT.sum(axis=1, keepdims=True) == 1) & (nearest_RT.sum(axis=0) == 1)
    rows, columns = np.nonzero(nearest_RT)
    order = np.lexsort((baseline.points.size_R[rows], ours_R[rows]))
    yield from zip(rows[order].tolist(), columns[order].tolist(), strict=True)


def _pair(kind: str, baseline: StudyArm, i: int, treated: StudyArm, j: int) -> Pair:
    ours, theirs = baseline.points, treated.points
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
        log_ratio=_log_ratio(theirs.loss_R[j], ours.loss_R[i]),
    )


def _log_ratio(one: float, other: float) -> float | None:
    return float(np.log(one / other)) if min(one, other) > 0 else None


def mean_differences(pairs: list[Pair], level: float = 0.95) -> list[MeanDifference]:
    """Of each kind the mean at each amount (within 1%), and that of all pairs."""
    means = []
    for kind in (EQUAL_DATA, EQUAL_FLOPS):
        chosen = [pair for pair in pairs if pair.kind == kind]
        if not chosen:
            continue
        differences = np.array([pair.difference for pair in chosen])
        amounts = np.array([_amount(pair) for pair in chosen])
        numbers = groups(amounts)
        for number in range(numbers.max() + 1):
            of_amount = numbers == number
            means.append(_mean(kind, float(amounts[of_amount].mean()), differences[of_amount], level))
        means.append(_mean(kind, None, differences, level))
    return means


def _amount(pair: Pair) -> float:
    amount = pair.baseline_tokens if pair.kind == EQUAL_DATA else pair.baseline_flops
    assert amount is not None, "pairs at equal FLOPs have them"
    return amount


def _mean(kind: str, amount: float | None, differences: Array, level: float) -> MeanDifference:
    number, mean = len(differences), float(differences.mean())
    if number < 2:
        return MeanDifference(kind, amount, number, mean, None, None)
    half = float(stdtrit(number - 1, (1 + level) / 2) * differences.std(ddof=1) / np.sqrt(number))
    return MeanDifference(kind, amount, number, mean, mean - half, mean + half)
