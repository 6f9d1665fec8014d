"""What a reader is told of a study beside its numbers: bad fits, pairs, laws beyond their runs."""

import dataclasses

import numpy as np
import pytest

from laver_megatron.studies.fit_output import study_text
from laver_megatron.studies.fitted_study import FitSettings, fit_study
from laver_megatron.studies.study import ArmRuns
from tests.unit.studies.synthetic import TRUE_5, make_points

SETTINGS = FitSettings(num_resamples=20)


def study_arm(points, seed="1"):
    return ArmRuns(points, 6 * points.size_R * points.tokens_R, (seed,) * len(points))


def make_study(*, noise, factor=0.99, **options):
    """Both arms with the noise of the same seed, as runs on the same packs have it; treated is better by a factor."""
    points = make_points(noise=noise, num_sizes=4, num_amounts=4, **options)
    better = dataclasses.replace(points, column_R=points.column_R * factor)
    return {"laver": study_arm(better), "baseline": study_arm(points)}


def notes_with(report, words):
    return [note for note in report.notes if words in note]


def test_a_law_that_its_runs_follow_needs_no_note():
    report = fit_study(make_study(noise=1e-3), SETTINGS)
    assert not notes_with(report, "misses its runs") and not notes_with(report, "miss their runs")
    assert not notes_with(report, "nothing is measured")


def test_a_bad_fit_is_called_bad():
    report = fit_study(make_study(noise=0.15), SETTINGS)
    first, second = notes_with(report, "misses its runs by")
    assert first.startswith("baseline: ") and second.startswith("laver: ")
    residuals_R = np.abs(report.arms[0].fit.residuals_R)
    assert f"by {residuals_R.mean():.1%} on average" in first
    assert f"run-{residuals_R.argmax()} by a factor of {np.exp(residuals_R.max()):.3g}" in first
    assert all(note in study_text(report) for note in (first, second))


def test_residuals_are_held_against_the_difference_of_the_arms():
    """1% apart: noise of 4% hides that from the laws, that of 0.1% does not. The pairs measure it either way."""
    for noise, told in ((0.04, True), (1e-3, False)):
        report = fit_study(make_study(noise=noise), FitSettings(num_resamples=0))
        notes = notes_with(report, "read the measured differences, not those of the laws")
        assert bool(notes) == told, noise
        assert len(report.measured.pairs) == 16
        assert all(pair.log_ratio == pytest.approx(np.log(0.99)) for pair in report.measured.pairs)
        assert [mean.num_pairs for mean in report.measured.means] == [4, 4, 4, 4, 16]
    assert (
        "(1.01%)" in notes_with(fit_study(make_study(noise=0.04), FitSettings(num_resamples=0)), "read the measured")[0]
    )


def test_means_are_in_the_text_and_need_no_resamples():
    study = make_study(noise=1e-3)
    for settings in (SETTINGS, FitSettings(num_resamples=0)):
        report = fit_study(study, settings)
        measured = study_text(report).split("laver minus baseline, measured")[1].split("laver minus")[0]
        assert measured.count("4 pairs") == 4 and measured.count("all  ") == 1
        mean = report.measured.means[-1]
        assert f"{mean.difference:+.4g} [{mean.low:+.4g}, {mean.high:+.4g}]" in measured
    assert report.differences == ()


def test_arms_without_a_pair_are_told():
    study = make_study(noise=1e-3)
    study["laver"] = dataclasses.replace(study["laver"], seeds=("2",) * 16)
    report = fit_study(study, SETTINGS)
    assert report.measured.pairs == () and notes_with(report, "nothing is measured in pairs")
    assert "measured: means" not in study_text(report)


def test_where_a_law_is_extrapolated():
    """LaVer has no run of the largest size: every row there is marked, and those at smaller sizes are not."""
    study = make_study(noise=1e-3)
    points = study["laver"].observations
    study["laver"] = study_arm(points.take(points.size_R < 6e10))
    report = fit_study(study, SETTINGS)
    for row in report.differences:
        if row.kind == "equal data":
            assert row.outside == ("laver: N" if row.baseline_size > 6e10 else "")
    number = sum(bool(row.outside) for row in report.differences)
    assert notes_with(
        report, f"{number} of {len(report.differences)} differences between the laws are outside the runs"
    )
    assert "outside the runs (laver: N)" in study_text(report)


def test_a_budget_far_from_the_runs_is_outside():
    report = fit_study(make_study(noise=1e-3), dataclasses.replace(SETTINGS, budgets=(1e30,)))
    assert report.differences[-1].outside == "baseline: N D; laver: N D"


def test_a_cost_is_judged_after_the_points():
    points = make_points(TRUE_5).take(np.array([0, 1]))
    with pytest.raises(ValueError, match=r"^all runs: no law can be fitted to 'loss' of 2 runs:\n  - 2 runs are fewer"):
        fit_study({"all runs": ArmRuns(points, np.ones(2), ("", ""))}, SETTINGS)
