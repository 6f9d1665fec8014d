"""The fits that Open-Athena published to the points of open-athena/isoflop-experiments, with vpnls and others.

The points are not part of this repository. With a copy of https://github.com/Open-Athena/scaling-law-analysis (commit
3e0656ee, whose file has the rows of the data set on Hugging Face), run

    ISOFLOP_POINTS=scaling-law-analysis/data/isoflops/extract/isoflops.csv pytest tests/unit/studies/test_isoflops.py
"""

import csv
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from laver_megatron.studies.law import Law, fit_law
from laver_megatron.studies.observations import Observations
from laver_megatron.studies.study import ALL_RUNS, study_of_csv

SHA256 = "cf343ffda3106862e0e73bfc10ed017f683a03e46f4540896a213276fd180651"
# results/experiments/exp11/compute_allocation_errors.txt there: "Approach 3", the squared error of log losses.
LLAMA_3 = {"E": 0.6021, "A": 56.2, "B": 147.3, "a": 0.3068, "b": 0.3110}
# README.md of vpnls: points, and the mean Huber loss (delta 1e-3, of losses, not their logarithms) of its fit, the best
# of a grid of exponents with steps of 0.01, in millionths.
VPNLS = {
    "ml_scalefit__massivetext__chinchilla": (124, 13.1),
    "llama_3__raw_loss": (133, 2.3),
    "marin_202603__comma__llama_2": (85, 22.9),
    "marin_202603__dclm__llama_2": (85, 22.9),
    "marin_202603__nemotron__llama_2": (88, 22.6),
}
# The same README's parameters for the first of these, with N in millions and D in billions.
VPNLS_CHINCHILLA = {"E": 1.8608, "A": 4.1479, "B": 1.0546, "a": 0.36, "b": 0.40}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    path = os.environ.get("ISOFLOP_POINTS")
    if path is None:
        pytest.skip("ISOFLOP_POINTS does not name the points; the head of this file says where they are")
    content = Path(path).read_bytes()
    assert hashlib.sha256(content).hexdigest() == SHA256, "other points than those of the published fits"
    return list(csv.DictReader(content.decode().splitlines()))


@pytest.fixture
def points(rows, tmp_path):
    def of(experiment: str) -> Observations:
        chosen = [row for row in rows if row["experiment"] == experiment]
        path = tmp_path / "points.csv"
        path.write_text("N,D,loss\n" + "".join(f"{row['params']},{row['tokens']},{row['loss']}\n" for row in chosen))
        return study_of_csv(path).arms[ALL_RUNS].observations

    return of


def huber(residual_R: np.ndarray) -> float:
    distance_R = np.abs(residual_R)
    return float(np.where(distance_R <= 1e-3, 0.5 * residual_R**2, 1e-3 * (distance_R - 0.5e-3)).mean())


def test_the_same_objective_gives_the_printed_digits(points):
    found = fit_law(points("llama_3__raw_loss"), num_resamples=0, delta=1.0).law.named()
    assert {name: round(found[name], 1 if name in "AB" else 4) for name in found} == LLAMA_3


@pytest.mark.parametrize("experiment", VPNLS)
def test_fits_as_well_as_vpnls_by_its_own_measure(points, experiment):
    """Ours minimises another loss, of logarithms; by theirs it is at most half a percent, and their rounding, worse."""
    runs = points(experiment)
    fit = fit_law(runs, num_resamples=0)
    number, theirs = VPNLS[experiment]
    ours = 1e6 * huber(fit.law.value(runs.size_R, runs.tokens_R) - runs.loss_R)
    assert len(runs) == number
    assert ours < 1.005 * theirs + 0.05
    assert fit.num_agreeing == fit.num_starts


def test_by_our_measure_it_fits_better_than_theirs(points):
    runs = points("ml_scalefit__massivetext__chinchilla")
    fit = fit_law(runs, num_resamples=0)
    E, A, B, a, b = VPNLS_CHINCHILLA.values()
    theirs = Law(np.array([E, A * 1e6**a, B * 1e9**b, a, b])).value(runs.size_R, runs.tokens_R)
    ours = fit.law.value(runs.size_R, runs.tokens_R)
    log_loss_R = np.log(runs.loss_R)
    assert (
        huber(np.log(ours) - log_loss_R) < huber(np.log(theirs) - log_loss_R) < 1.05 * huber(np.log(ours) - log_loss_R)
    )
    assert (fit.law.named()["a"], fit.law.named()["b"]) == pytest.approx((a, b), abs=0.02)
