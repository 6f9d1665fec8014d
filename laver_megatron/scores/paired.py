"""Whether two models that answered the same questions differ: paired tests.

Letters: S samples.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from laver_megatron.scores.results import Sample, Samples

LEVEL = 0.95
_PERMUTATIONS = 9999
_BATCH = 200  # permutations at once, for memory

MCNEMAR, PERMUTATION = "McNemar, exact", "sign flips"


@dataclass(frozen=True)
class PairedTest:
    """Treated minus baseline, over the samples of both.

    Attributes:
        mean_baseline, mean_treated: of scores from 0 to 1.
        low, high: interval of the difference of the means at `LEVEL`, from Student's t of the differences; None for a
            single sample.
        p_value: two-sided, of no difference. Not corrected for several benchmarks.
    """

    method: str
    num_samples: int
    mean_baseline: float
    mean_treated: float
    low: float | None
    high: float | None
    p_value: float


def compare(baseline: Samples, treated: Samples, questions_per_sample: int = 1) -> PairedTest:
    """Tests the difference of two models over the same questions.

    Right-or-wrong scores are compared by McNemar's exact test, graded ones by flipping the signs of the differences at
    random, seeded.

    Raises:
        DifferentSamples: they did not answer the same questions.
        ValueError: the number of questions is no multiple of `questions_per_sample`.
    """
    check_same_questions(baseline, treated)
    keys = sorted(baseline, key=_natural)
    baseline_S = _scores([baseline[key] for key in keys], questions_per_sample)
    treated_S = _scores([treated[key] for key in keys], questions_per_sample)
    difference_S = treated_S - baseline_S
    if np.isin([baseline_S, treated_S], (0, 1)).all():
        method, p_value = MCNEMAR, _mcnemar(difference_S)
    else:
        method, p_value = PERMUTATION, _sign_flips(difference_S)
    low, high = _interval(difference_S)
    return PairedTest(
        method, len(difference_S), float(baseline_S.mean()), float(treated_S.mean()), low, high, float(p_value)
    )


class DifferentSamples(ValueError):
    """Two models did not answer the same questions."""


def check_same_questions(baseline: Samples, treated: Samples) -> None:
    """Raises DifferentSamples with the numbers."""
    only_baseline, only_treated = baseline.keys() - treated.keys(), treated.keys() - baseline.keys()
    if only_baseline or only_treated:
        raise DifferentSamples(
            f"other samples: {len(only_baseline)} of {len(baseline)} are in the baseline alone, {len(only_treated)} of "
            f"{len(treated)} are not in it; score both on the same ones"
        )
    if changed := [key for key in baseline if baseline[key].question != treated[key].question]:
        raise DifferentSamples(
            f"{len(changed)} of {len(baseline)} samples, such as {changed[0]}, are not the baseline's questions; "
            "score both on the same version of the data"
        )
    if not baseline:
        raise DifferentSamples("there are no samples")


def _natural(key: str) -> tuple[int, int, str]:
    """Numbers in order, then the rest: consecutive questions of a pair have consecutive numbers."""
    return (0, int(key), "") if key.isascii() and key.isdigit() else (1, 0, key)


def _scores(samples: list[Sample], questions_per_sample: int) -> NDArray[np.float64]:
    scores = np.array([sample.score for sample in samples], dtype=np.float64)
    if len(scores) % questions_per_sample:
        raise ValueError(f"{len(scores)} questions are no multiple of {questions_per_sample} that count together")
    return scores.reshape(-1, questions_per_sample).min(axis=1)


def _mcnemar(difference_S: NDArray[np.float64]) -> float:
    """The samples that one of them has right, all or none of which would be the other's if one were better."""
    gained, lost = int((difference_S > 0).sum()), int((difference_S < 0).sum())
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def _sign_flips(difference_S: NDArray[np.float64]) -> float:
    if not difference_S.any():
        return 1.0
    found = stats.permutation_test(
        (difference_S,), np.mean, permutation_type="samples", n_resamples=_PERMUTATIONS, batch=_BATCH,
        vectorized=True, rng=np.random.default_rng(0),
    )  # fmt: skip
    return float(found.pvalue)


def _interval(difference_S: NDArray[np.float64]) -> tuple[float, float] | tuple[None, None]:
    if len(difference_S) < 2:
        return None, None
    mean = float(difference_S.mean())
    if np.ptp(difference_S) == 0:
        return mean, mean
    low, high = stats.t.interval(LEVEL, len(difference_S) - 1, loc=mean, scale=stats.sem(difference_S))
    return float(low), float(high)
