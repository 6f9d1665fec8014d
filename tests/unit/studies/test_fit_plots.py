"""What the pictures say: labels that can be read, a law beyond its runs, runs with a word on their colour."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from laver_megatron.studies.fit_plots import _draw_law, _mark_powers, draw_study
from laver_megatron.studies.fitted_study import FitSettings, fit_study
from tests.unit.studies.test_fitted_study import make_study


@pytest.fixture
def axes():
    """A panel of the size that the pictures have."""
    figure = Figure(figsize=(5.2, 4.1), dpi=110)
    FigureCanvasAgg(figure)
    return figure.add_subplot()


@pytest.mark.parametrize("low, high", [(1.2e11, 3.9e12), (2e11, 9e11), (1.1e11, 9.9e13), (9e19, 2e25), (5e8, 7e10)])
def test_labels_of_a_logarithmic_axis_are_some_and_do_not_overlap(axes, low, high):
    axes.set_xscale("log")
    axes.plot([low, high], [1, 2])
    _mark_powers(axes.xaxis)
    axes.figure.canvas.draw()
    labels = [text for text in axes.get_xticklabels(which="both") if text.get_text()]
    extents = [text.get_window_extent() for text in labels]
    shown = [extent for extent in extents if axes.bbox.x0 - 1 <= (extent.x0 + extent.x1) / 2 <= axes.bbox.x1 + 1]
    assert len(shown) >= 2, [text.get_text() for text in labels]
    assert all(one.x1 < other.x0 for one, other in zip(shown, shown[1:], strict=False))


def test_a_law_is_dashed_where_it_is_outside_the_runs(axes):
    x_X, y_X = np.arange(1.0, 7), np.arange(6.0)
    _draw_law(axes, x_X, y_X, ["N", "", "", "D", "N D", "N"], "black", "law")
    inside, outside = (np.isfinite(line.get_ydata()).tolist() for line in axes.lines)
    assert inside == [False, True, True, False, False, False]
    assert outside == [True, True, True, True, True, True]  # from the last point inside on
    solid, dashed = axes.lines
    assert (solid.get_linestyle(), solid.get_label()) == ("-", "law") and dashed.get_linestyle() == "--"


def test_every_picture_explains_its_points(tmp_path, monkeypatch):
    figures = {}
    monkeypatch.setattr(
        "laver_megatron.studies.fit_plots._save", lambda figure, path: figures.update({path.name: figure})
    )
    draw_study(fit_study(make_study(noise=1e-3), FitSettings(num_resamples=20)), tmp_path)
    words = {
        name: {text.get_text() for axes in figure.axes for text in axes.get_legend().get_texts()}
        for name, figure in figures.items()
    }
    assert "runs, coloured by their FLOPs" in words["iso_flop.png"] and "runs, coloured by N" in words["fit.png"]
    for name in ("iso_flop.png", "fit.png", "frontier.png"):
        assert "outside the runs" in words[name]
    assert {"best size", "best size, outside the runs"} <= words["iso_flop.png"]
    for figure in figures.values():
        *_, one, other = figure.axes  # the lowest row
        assert (one.get_xlim(), one.get_ylim()) == (other.get_xlim(), other.get_ylim())
