"""An ablation as one picture: differences to the baseline with their intervals, and how alike visual tokens become.

Letters: L layers, S seeds, I iterations.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from laver_megatron.run_log.curves import BLUE, GREY, RED, STYLE
from laver_megatron.run_log.records import read_records
from laver_megatron.run_log.run_summary import VISUAL_SIMILARITY
from laver_megatron.runtime.files import replacing
from laver_megatron.studies.arm_table import LOSS, SIMILARITIES, ArmResult, difference, result_columns

_COLOURS, _DASHES = matplotlib.colormaps["tab10"], ("-", "--", ":", "-.")
_NUM_COLUMNS = 4


def draw_arms(arms: Sequence[ArmResult], baseline: ArmResult, sweep: Path, path: Path) -> None:
    """Replaces `path` by the picture. sweep: the directory whose runs/ hold metrics.jsonl; runs without it are left out
    of the similarity in training, whose title says how many."""
    columns = [column for column in result_columns(arms) if column not in SIMILARITIES]
    others = [arm for arm in arms if arm is not baseline and arm.seeds]
    curves = [_curve(arm) for arm in arms]
    has_layers = max(map(len, curves)) > 1
    num_panels = len(columns) + has_layers + 1
    num_rows = -(-num_panels // _NUM_COLUMNS)
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=(3.6 * _NUM_COLUMNS, (0.9 + 0.32 * len(arms)) * num_rows), dpi=110, layout="constrained"
        )
        panels = figure.subplots(num_rows, _NUM_COLUMNS, squeeze=False).flat
        for column in columns:
            _draw_differences(next(panels), others, baseline, column)
        if has_layers:
            _draw_layers(next(panels), arms, curves)
        _draw_similarity(next(panels), arms, sweep)
        for axes in panels:
            axes.set_visible(False)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png")


def _draw_differences(axes: Axes, arms: Sequence[ArmResult], baseline: ArmResult, column: str) -> None:
    """A line an arm, the first on top; to the better side of zero the points are blue."""
    axes.set_title(f"{column} minus {baseline.name}", loc="left", fontsize=8)
    axes.axvline(0, color=GREY, linewidth=0.9)
    sign = -1 if column == LOSS else 1
    for place, arm in enumerate(reversed(arms)):
        item = difference(arm, baseline, column)
        if item is None:
            continue
        colour = (BLUE if sign * item.mean > 0 else RED) if item.is_clear else GREY
        axes.plot(item.mean, place, "o", color=colour, markersize=4)
        if item.low is not None and item.high is not None:
            axes.plot((item.low, item.high), (place, place), color=colour, linewidth=1.4)
    axes.set_yticks(range(len(arms)), [arm.name for arm in reversed(arms)], fontsize=7)
    axes.tick_params(axis="x", labelsize=7)


def _style(number: int) -> dict[str, Any]:
    """Of an arm's line; after ten colours the dashes differ."""
    rounds, colour = divmod(number, _COLOURS.N)
    return {"color": _COLOURS(colour), "linestyle": _DASHES[rounds % len(_DASHES)], "linewidth": 1.2}


def _curve(arm: ArmResult) -> np.ndarray:
    """How alike visual tokens are by layer: the mean over seeds, [L]; empty where no seed has it."""
    curves = [record[VISUAL_SIMILARITY] for record in arm.seeds.values() if record.get(VISUAL_SIMILARITY)]
    return np.array(curves, dtype=float).mean(axis=0) if curves else np.empty(0)


def _draw_layers(axes: Axes, arms: Sequence[ArmResult], curves: Sequence[np.ndarray]) -> None:
    axes.set_title(f"{VISUAL_SIMILARITY} by layer", loc="left", fontsize=8)
    for number, (arm, curve_L) in enumerate(zip(arms, curves, strict=True)):
        if len(curve_L):
            layers = np.arange(1, len(curve_L) + 1)
            axes.plot(layers, curve_L, marker="o", markersize=3, label=arm.name, **_style(number))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer", fontsize=7)
    axes.legend(fontsize=6)


def _draw_similarity(axes: Axes, arms: Sequence[ArmResult], sweep: Path) -> None:
    """The student's mean pairwise cosine in training, of arms that log it: mean over seeds."""
    files = {run: sweep / "runs" / run / "metrics.jsonl" for arm in arms for run in arm.runs.values()}
    absent = sum(not file.is_file() for file in files.values())
    note = f"\n(without metrics.jsonl: {absent} of {len(files)} runs)" if absent else ""
    axes.set_title(f"cosine of visual tokens (vision head) in training{note}", loc="left", fontsize=8)
    axes.axhline(1.0, color=RED, linewidth=0.9, linestyle="--", label="collapse")
    for number, arm in enumerate(arms):
        curves = [curve for run in arm.runs.values() if (curve := _similarities(files[run]))]
        if curves:
            length = min(map(len, curves))
            mean_I = np.array([curve[:length] for curve in curves]).mean(axis=0)
            axes.plot(np.arange(1, length + 1), mean_I, label=arm.name, **_style(number))
    axes.set_xlabel("iteration", fontsize=7)
    axes.legend(fontsize=6)


def _similarities(path: Path) -> list[float]:
    """Every iteration's value; a skipped one has that before it. None where there is no file."""
    values: list[float] = []
    for record in read_records(path) if path.is_file() else []:
        value = record.get(SIMILARITIES[0])
        if value is not None:
            values.append(value)
        elif values:
            values.append(values[-1])
    return values
