"""Training curves as one picture, drawn from a run's `metrics.jsonl` and the `validation.jsonl` beside it."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from laver_megatron.run_log.records import read_records
from laver_megatron.runtime.files import replacing

Records = list[dict[str, Any]]

BLUE, ORANGE, GREEN, RED, GREY = "#2a6fb0", "#e07b20", "#3a9150", "#c43c3c", "#8a8f98"
# Longer runs get a running mean over a fiftieth of the run, the raw values pale behind it.
SMOOTHING_STARTS_AT = 200
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "grid.color": "#e4e6ea",
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def draw_curves(metrics_path: Path, png_path: Path) -> None:
    """Draw the panels that have something to show (with LaVer off its own are left out), replacing `png_path`
    atomically.

    Raises:
        ValueError: the file holds no record.
    """
    metrics_path, png_path = Path(metrics_path), Path(png_path)
    records = read_records(metrics_path)
    if not records:
        raise ValueError(f"{metrics_path} holds no records: nothing to draw")
    validation_path = metrics_path.with_name("validation.jsonl")
    validation = read_records(validation_path) if validation_path.exists() else []
    panels = [(title, draw) for title, fields, draw in PANELS if any(_shown(records, field) for field in fields)]
    num_columns = 3 if len(panels) > 4 else 2
    num_rows = max(1, math.ceil(len(panels) / num_columns))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4 * num_columns, 2.9 * num_rows + 0.5), dpi=110)
        figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.08)
        FigureCanvasAgg(figure)
        figure.suptitle(_headline(metrics_path, records), fontsize=11, color="#333333")
        for number, (title, draw) in enumerate(panels, start=1):
            axes = figure.add_subplot(num_rows, num_columns, number)
            axes.set_title(title, loc="left")
            draw(axes, records, validation)
            _finish(axes, records, is_lowest=number + num_columns > len(panels))
        with replacing(png_path) as temporary:
            figure.savefig(temporary, format="png")


def _headline(metrics_path: Path, records: Records) -> str:
    last = records[-1]
    text = f"{metrics_path.resolve().parent.name}: {last['iteration']} iterations"
    if last.get("consumed_samples") is not None:
        text += f", {last['consumed_samples']:,} samples"
    skipped = last.get("skipped_iterations") or 0
    return text + (f", {skipped} skipped" if skipped else "")


def _finish(axes: Axes, records: Records, is_lowest: bool) -> None:
    first, last = records[0]["iteration"], records[-1]["iteration"]
    margin = 0.02 * (last - first) or 0.5
    axes.set_xlim(first - margin, last + margin)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if is_lowest:
        axes.set_xlabel("iteration")


def _shown(records: Records, field: str) -> bool:
    """Whether a field has any value other than null and zero."""
    return any(record.get(field) for record in records)


def _series(records: Records, field: str) -> tuple[list[int], list[float]]:
    iterations = [record["iteration"] for record in records]
    values = [math.nan if record.get(field) is None else float(record[field]) for record in records]
    return iterations, values


def _line(
    axes: Axes, records: Records, field: str, colour: str, label: str = "", smooth: bool = True, style: str = "-"
) -> None:
    """A field over the iterations; null leaves a gap, a value between two gaps shows as a dot."""
    iterations, values = _series(records, field)
    label = label or "_nolegend_"
    if smooth and len(values) >= SMOOTHING_STARTS_AT:
        means = _running_mean(values, len(values) // 50)
        axes.plot(iterations, values, color=colour, alpha=0.25, linewidth=0.7)
        axes.plot(iterations, means, style, color=colour, linewidth=1.6, label=label)
        return
    axes.plot(iterations, values, style, color=colour, linewidth=1.6, label=label)
    padded = [math.nan, *values, math.nan]
    alone = [i for i in range(len(values)) if math.isnan(padded[i]) and math.isnan(padded[i + 2])]
    axes.plot([iterations[i] for i in alone], [values[i] for i in alone], ".", color=colour, markersize=5)


def _running_mean(values: list[float], width: int) -> list[float]:
    """Mean of the last `width` values that are there."""
    is_there = ~np.isnan(values)
    sums = np.concatenate([[0.0], np.cumsum(np.array(values)[is_there])])
    ends = np.cumsum(is_there)
    starts = np.maximum(ends - width, 0)
    with np.errstate(invalid="ignore"):  # NaN before the first
        return ((sums[ends] - sums[starts]) / (ends - starts)).tolist()


def _second_axis(axes: Axes, label: str, colour: str, left_label: str, left_colour: str) -> Axes:
    axes.set_ylabel(left_label, color=left_colour)
    axes.tick_params(axis="y", labelcolor=left_colour)
    right = axes.twinx()
    right.grid(False)
    right.spines["right"].set_visible(True)
    right.set_ylabel(label, color=colour)
    right.tick_params(axis="y", labelcolor=colour)
    return right


def _draw_lm_loss(axes: Axes, records: Records, validation: Records) -> None:
    _line(axes, records, "lm_loss", BLUE, "train")
    if validation:
        iterations, values = _series(validation, "lm_loss")
        axes.plot(iterations, values, "o-", color=ORANGE, markersize=4, linewidth=1.2, label="validation")
    skips = [
        after["iteration"]
        for before, after in itertools.pairwise(records)
        if (after.get("skipped_iterations") or 0) > (before.get("skipped_iterations") or 0)
    ]
    for number, iteration in enumerate(skips):
        label = "_nolegend_" if number else "skipped step"
        axes.axvline(iteration, color=RED, linewidth=0.8, linestyle=":", label=label)
    axes.legend(loc="upper right")


def _draw_similarity(axes: Axes, records: Records, validation: Records) -> None:
    _line(axes, records, "teacher_visual_similarity", GREY, "teacher")
    _line(axes, records, "student_visual_similarity", BLUE, "student")
    axes.axhline(1.0, color=RED, linewidth=0.9, linestyle="--", label="collapse")
    low = min((v for f in SIMILARITIES for v in _series(records, f)[1] if not math.isnan(v)), default=0.0)
    axes.set_ylim(min(0.0, low - 0.05), 1.05)
    axes.legend(loc="best")


def _draw_mask_and_momentum(axes: Axes, records: Records, validation: Records) -> None:
    right = _second_axis(axes, "EMA momentum", ORANGE, "mask ratio", BLUE)
    _line(axes, records, "mask_ratio", BLUE, smooth=False)
    _line(right, records, "ema_momentum", ORANGE, smooth=False, style="--")
    _pad_if_constant(axes, records, "mask_ratio", high=1.6)
    _pad_if_constant(right, records, "ema_momentum", high=1.05)
    right.ticklabel_format(axis="y", useOffset=False)


def _pad_if_constant(axes: Axes, records: Records, field: str, high: float) -> None:
    """A constant drawn from zero to a little above it: automatic limits would zoom into its last bit."""
    values = {value for value in _series(records, field)[1] if not math.isnan(value)}
    if len(values) == 1 and (value := values.pop()) > 0:
        axes.set_ylim(0.0, value * high)


def _draw_learning_rate(axes: Axes, records: Records, validation: Records) -> None:
    _line(axes, records, "learning_rate", BLUE, smooth=False)
    axes.set_ylim(bottom=0.0)
    axes.yaxis.set_major_formatter(lambda value, position: f"{value:g}")


def _draw_throughput(axes: Axes, records: Records, validation: Records) -> None:
    _line(axes, records, "tokens_per_second", BLUE)
    axes.set_ylim(bottom=0.0)
    if _shown(records, "tflops_per_gpu"):
        right = _second_axis(axes, "model TFLOP/s per device", ORANGE, "tokens/s", BLUE)
        _line(right, records, "tflops_per_gpu", ORANGE, style="--")
        right.set_ylim(bottom=0.0)
    else:
        axes.set_ylabel("tokens/s")


def _single(field: str, colour: str = BLUE) -> Callable[[Axes, Records, Records], None]:
    return lambda axes, records, validation: _line(axes, records, field, colour)


SIMILARITIES = ("student_visual_similarity", "teacher_visual_similarity")
PANELS: tuple[tuple[str, tuple[str, ...], Callable[[Axes, Records, Records], None]], ...] = (
    ("Language loss", ("lm_loss",), _draw_lm_loss),
    ("Masked image loss", ("mim_loss",), _single("mim_loss")),
    ("Gram loss", ("gram_loss",), _single("gram_loss")),
    ("Visual similarity (collapse monitor)", SIMILARITIES, _draw_similarity),
    ("Teacher entropy (nats)", ("teacher_entropy",), _single("teacher_entropy", GREY)),
    ("Gradient norm", ("grad_norm",), _single("grad_norm", GREEN)),
    ("Mask ratio and EMA momentum", ("mask_ratio", "ema_momentum"), _draw_mask_and_momentum),
    ("Learning rate", ("learning_rate",), _draw_learning_rate),
    ("Throughput", ("tokens_per_second",), _draw_throughput),
)
