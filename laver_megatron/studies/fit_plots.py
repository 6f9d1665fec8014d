"""A study's fits as pictures, one column of panels an arm.

fit.png         the runs and the law over tokens, a line for each size, with the bootstrap's band
iso_flop.png    the law over size at fixed FLOPs, its minimum, and the runs in the colour of their FLOPs
frontier.png    the best size, and the value there, over FLOPs, with the bootstrap's band
residuals.png   log residuals over FLOPs

A law is dashed, and its best size hollow, where N or D is beyond the runs it was fitted to.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterSciNotation, LogLocator, NullFormatter

from laver_megatron.run_log.curves import BLUE, GREY, ORANGE, STYLE
from laver_megatron.runtime.files import replacing
from laver_megatron.studies.fit_output import PICTURES
from laver_megatron.studies.fitted_study import FittedArm, FittedStudy
from laver_megatron.studies.law import optimum, percentiles
from laver_megatron.studies.observations import Array, cluster

_COLOURS = matplotlib.colormaps["viridis"]
_MOST_LINES = 12
_NUM_X = 120


def draw_study(study: FittedStudy, directory: Path) -> list[Path]:
    """Draws all pictures, each replaced atomically. Returns the files."""
    directory.mkdir(parents=True, exist_ok=True)
    # A row of panels for each function.
    panels: tuple[tuple[str, tuple[Callable[[Axes, FittedArm, FittedStudy], None], ...]], ...] = (
        ("runs and law", (_draw_fit,)),
        ("at fixed FLOPs", (_draw_iso_flop,)),
        ("best size and value", (_draw_frontier_size, _draw_frontier_value)),
        ("log residuals", (_draw_residuals,)),
    )
    with matplotlib.rc_context(STYLE):
        for name, (title, draws) in zip(PICTURES, panels, strict=True):
            num_arms = len(study.arms)
            figure = Figure(figsize=(5.2 * num_arms, 3.8 * len(draws) + 0.3), dpi=110, layout="constrained")
            for draw, row in zip(draws, figure.subplots(len(draws), num_arms, squeeze=False), strict=True):
                for axes, arm in zip(row, study.arms, strict=True):
                    axes.set_xscale("log")
                    if draw is draws[0]:
                        axes.set_title(f"{arm.name}: {title}", loc="left")
                    draw(axes, arm, study)
                _share_limits(row)
            _save(figure, directory / name)
    return [directory / name for name in PICTURES]


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _share_limits(panels: Sequence[Axes]) -> None:
    """Arms stand side by side to be compared: the same place means the same numbers."""
    x, y = (np.array([getattr(axes, limits)() for axes in panels]) for limits in ("get_xlim", "get_ylim"))
    for axes in panels:
        axes.set(xlim=(x.min(), x.max()), ylim=(y.min(), y.max()))
        _mark_powers(axes.xaxis)
        _mark_powers(axes.yaxis)


def _mark_powers(axis: Axis) -> None:
    """A logarithmic axis has labels at powers of ten, and between them only where there would be less than three."""
    if axis.get_scale() != "log":
        return
    low, high = axis.get_view_interval()
    within = math.floor(math.log10(high)) - math.ceil(math.log10(low)) + 1
    axis.set_major_locator(LogLocator(subs=(1.0,) if within > 2 else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(LogFormatterSciNotation(minor_thresholds=(math.inf, math.inf)))
    axis.set_minor_formatter(NullFormatter())


def _draw_law(axes: Axes, x_X: Array, y_X: Array, outside_X: Sequence[str], colour: object, label: str) -> None:
    """A line; dashed and thin where it is outside the runs."""
    outside = np.array([bool(letters) for letters in outside_X])
    axes.plot(x_X, np.where(outside, np.nan, y_X), color=colour, linewidth=1.4, label=label)
    # Beginning where the other ends, without a gap.
    beside = outside.copy()
    beside[1:] |= outside[:-1]
    beside[:-1] |= outside[1:]
    axes.plot(x_X, np.where(beside, y_X, np.nan), color=colour, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.8)


def _explain(axes: Axes, runs: str, ncols: int = 1, **place: Any) -> None:
    """The legend, with a word on the points and on dashes."""
    axes.plot([], [], "o", color=GREY, markersize=4, label=runs)
    axes.plot([], [], color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), label="outside the runs")
    axes.legend(ncols=ncols, **place)


def _spread(values_R: Array, margin: float = 1.5) -> Array:
    return np.geomspace(values_R.min() / margin, values_R.max() * margin, _NUM_X)


def _band(axes: Axes, x: Array, values_KX: Array, study: FittedStudy, colour: object) -> None:
    axes.fill_between(x, *percentiles(values_KX, study.settings.level), color=colour, alpha=0.2, linewidth=0)


def _draw_fit(axes: Axes, arm: FittedArm, study: FittedStudy) -> None:
    runs, law = arm.fit.observations, arm.fit.law
    # Sizes that differ by less than 1% share a line; of very many some are shown.
    sizes = np.sort(runs.size_R[np.unique(cluster(runs.size_R), return_index=True)[1]])
    shown = sizes[np.unique(np.linspace(0, len(sizes) - 1, _MOST_LINES).round().astype(int))]
    norm = LogNorm(sizes[0], sizes[-1] * 1.2)  # the brightest yellow is hard to see
    tokens_X = _spread(runs.tokens_R)
    for size in shown:
        colour, outside_X = _COLOURS(norm(size)), runs.outside(size, tokens_X)
        _draw_law(axes, tokens_X, law.value(size, tokens_X), outside_X, colour, f"N = {size:.3g}")
        if arm.fit.resampled is not None:
            _band(axes, tokens_X, arm.fit.resampled.value(size, tokens_X), study, colour)
    axes.scatter(runs.tokens_R, runs.column_R, c=runs.size_R, norm=norm, cmap=_COLOURS, s=14, zorder=3)
    _limit_to(axes, runs.column_R)
    axes.set_xlabel("tokens D")
    axes.set_ylabel(runs.column)
    _explain(axes, "runs, coloured by N", ncols=1 + (len(shown) > 6))


def _draw_iso_flop(axes: Axes, arm: FittedArm, study: FittedStudy) -> None:
    runs = arm.fit.observations
    flops_R = arm.flops_R
    every = np.concatenate([flops_R, study.budgets_X])
    norm = LogNorm(every.min(), every.max() * 1.0001)
    size_X = _spread(runs.size_R, margin=4)
    for budget in study.budgets_X:
        tokens_X = arm.cost.tokens(size_X, budget)
        outside_X, label = runs.outside(size_X, tokens_X), f"{budget:.2g} FLOPs"
        _draw_law(axes, size_X, arm.fit.law.value(size_X, tokens_X), outside_X, _COLOURS(norm(budget)), label)
    best = optimum(arm.fit.law, arm.cost, study.budgets_X)
    shown = (best.size_X >= size_X[0]) & (best.size_X <= size_X[-1])
    outside = np.array([bool(letters) for letters in runs.outside(best.size_X, best.tokens_X)])
    for chosen, fill, label in (
        (shown & ~outside, "black", "best size"), (shown & outside, "none", "best size, outside the runs"),
    ):  # fmt: skip
        if chosen.any():
            axes.plot(
                best.size_X[chosen], best.value_X[chosen], "D", color="black", markerfacecolor=fill, markersize=5,
                zorder=4, label=label,
            )  # fmt: skip
    axes.scatter(runs.size_R, runs.column_R, c=flops_R, norm=norm, cmap=_COLOURS, s=16, zorder=3)
    _limit_to(axes, np.concatenate([runs.column_R, best.value_X[shown]]))
    axes.set_xlabel("parameters N")
    axes.set_ylabel(runs.column)
    # Below: lines and runs leave no corner free.
    _explain(axes, "runs, coloured by their FLOPs", ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))


def _draw_frontier_size(axes: Axes, arm: FittedArm, study: FittedStudy) -> None:
    _draw_frontier(axes, arm, study, "size_X")
    axes.set_yscale("log")
    axes.plot(arm.flops_R, arm.fit.observations.size_R, "o", color=GREY, markersize=3)
    axes.set_ylabel("best parameters N")
    _explain(axes, "runs")


def _draw_frontier_value(axes: Axes, arm: FittedArm, study: FittedStudy) -> None:
    _draw_frontier(axes, arm, study, "value_X")
    axes.plot(arm.flops_R, arm.fit.observations.column_R, "o", color=GREY, markersize=3)
    axes.set_ylabel(f"best {arm.fit.observations.column}")
    _explain(axes, "runs")


def _draw_frontier(axes: Axes, arm: FittedArm, study: FittedStudy, field: str) -> None:
    flops_X = np.geomspace(study.budgets_X.min(), study.budgets_X.max(), _NUM_X)
    best = optimum(arm.fit.law, arm.cost, flops_X)
    outside_X = arm.fit.observations.outside(best.size_X, best.tokens_X)
    _draw_law(axes, flops_X, getattr(best, field), outside_X, BLUE, "law")
    if arm.fit.resampled is not None:
        _band(axes, flops_X, getattr(optimum(arm.fit.resampled, arm.cost, flops_X), field), study, BLUE)
    axes.set_xlabel("training FLOPs")


def _draw_residuals(axes: Axes, arm: FittedArm, study: FittedStudy) -> None:
    residuals_R, size_R = arm.fit.residuals_R, arm.fit.observations.size_R
    is_largest_R = size_R > 0.99 * size_R.max()
    for chosen, colour, label in ((~is_largest_R, BLUE, "other sizes"), (is_largest_R, ORANGE, "largest size")):
        axes.plot(arm.flops_R[chosen], residuals_R[chosen], "o", color=colour, markersize=4, label=label)
    axes.axhline(0.0, color=GREY, linewidth=0.9)
    axes.set_xlabel("training FLOPs")
    axes.set_ylabel("log measured - log fitted")
    axes.legend()


def _limit_to(axes: Axes, values: Array) -> None:
    """Bands of few runs are wide, and would make the runs a line."""
    low, high = values.min(), values.max()
    margin = 0.15 * (high - low)
    axes.set_ylim(low - margin, high + margin)
