"""The pictures of the page, by matplotlib. Each is drawn from the results of all models together."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from laver_megatron.inspection.collect import GRAM_BINS, MEASURES, Inspection, View
from laver_megatron.inspection.measures import principal_components
from laver_megatron.run_log.curves import BLUE, GREEN, GREY, ORANGE, RED, STYLE

_COLOURS = (BLUE, ORANGE, GREEN, RED, "#7a4fb0", GREY)
_PERPLEXITY = 30


def png(num_rows: int, num_columns: int, size: tuple[float, float], draw: Callable[[np.ndarray], object]) -> bytes:
    """A picture of panels of this size in inches; draw: gets the panels `[rows, columns]`."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(size[0] * num_columns, size[1] * num_rows), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure.subplots(num_rows, num_columns, squeeze=False))
        file = io.BytesIO()
        figure.savefig(file, format="png")
    return file.getvalue()


def some(steps: Sequence[Any]) -> list[Any]:
    """The first, the middle and the last of several; all of three."""
    return [steps[number] for number in dict.fromkeys((0, len(steps) // 2, len(steps) - 1))]


def colours_of(inspections: Sequence[Inspection], is_run: bool) -> list[Any]:
    """One of each model; along a scale for the steps of a run."""
    if is_run or len(inspections) > len(_COLOURS):
        return list(matplotlib.colormaps["viridis"](np.linspace(0.05, 0.9, len(inspections))))
    return list(_COLOURS[: len(inspections)])


def draw_curves(inspections: Sequence[Inspection], is_run: bool) -> bytes:
    """All measures over the layers: a line a model, with a band of two standard errors; a line a step of a run."""

    def draw(panels: np.ndarray) -> None:
        for axes, (name, measure) in zip(panels.flat, MEASURES.items(), strict=True):
            axes.set_title(measure.title, loc="left")
            for inspection, colour in zip(inspections, colours_of(inspections, is_run), strict=True):
                mean_C, error_C, _ = inspection.mean(name)
                layers = np.arange(len(mean_C))
                label = f"step {inspection.source.step}" if is_run else inspection.name
                axes.plot(layers, mean_C, "o-", color=colour, markersize=3, linewidth=1.5, label=label)
                if not is_run:
                    axes.fill_between(
                        layers, mean_C - 2 * error_C, mean_C + 2 * error_C, color=colour, alpha=0.15, linewidth=0
                    )
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_xlabel("layer")
        if len(inspections) > 1:
            lines = panels[0, 0].get_lines()
            panels[0, 0].legend(handles=some(lines) if is_run else lines, loc="best")

    return png(2, 3, (4.2, 3.0), draw)


def draw_steps(inspections: Sequence[Inspection]) -> bytes:
    """Layer by step of one run, for each measure."""

    def draw(panels: np.ndarray) -> None:
        for axes, (name, measure) in zip(panels.flat, MEASURES.items(), strict=True):
            axes.set_title(measure.title, loc="left")
            values = np.stack([inspection.mean(name)[0] for inspection in inspections], axis=1)
            _heat_map(axes, values, "step", "layer")
            axes.set_xticks(range(len(inspections)), [str(it.source.step) for it in inspections], rotation=45)

    return png(2, 3, (4.2, 3.2), draw)


def _heat_map(
    axes: Axes,
    values: np.ndarray,
    x: str,
    y: str,
    first_row: int = 0,
    limits: tuple[float | None, float | None] = (None, None),
) -> None:
    image = axes.imshow(
        values, aspect="auto", origin="lower", cmap="viridis", interpolation="nearest",
        vmin=limits[0], vmax=limits[1],
        extent=(-0.5, values.shape[1] - 0.5, first_row - 0.5, first_row + len(values) - 0.5),
    )  # fmt: skip
    axes.grid(False)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    assert axes.figure is not None
    axes.figure.colorbar(image, ax=axes)


def draw_decay(inspections: Sequence[Inspection], is_run: bool) -> bytes:
    """Attention to visual tokens along the answer: mean over the layers, and layer by position of each model, of a run
    at some steps."""
    mapped = some(inspections) if is_run else inspections

    def draw(panels: np.ndarray) -> None:
        first, *others = panels.flat
        first.set_title("Mean over the layers", loc="left")
        for inspection, colour in zip(inspections, colours_of(inspections, is_run), strict=True):
            label = f"step {inspection.source.step}" if is_run else inspection.name
            first.plot(inspection.decay()[0].mean(0), "o-", color=colour, markersize=3, label=label)
        first.set_ylim(bottom=0)
        first.set_xlabel("position in the answer")
        first.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(inspections) > 1:
            lines = first.get_lines()
            first.legend(handles=some(lines) if is_run else lines)
        maps = [inspection.decay()[0] for inspection in mapped]
        limits = min(values.min() for values in maps), max(values.max() for values in maps)
        for axes, inspection, values in zip(others, mapped, maps, strict=True):
            axes.set_title(inspection.name, loc="left")
            _heat_map(axes, values, "position in the answer", "layer", first_row=1, limits=limits)

    return png(1, 1 + len(mapped), (4.2, 3.0), draw)


def draw_points(inspection: Inspection, with_tsne: bool) -> bytes:
    """Visual and text tokens in two dimensions: PCA above, t-SNE below."""
    methods: list[tuple[str, Callable[[torch.Tensor], np.ndarray]]] = [("PCA", _two_components)]
    if with_tsne:
        methods.append(("t-SNE", _tsne))

    def draw(panels: np.ndarray) -> None:
        for row, (method, project) in zip(panels, methods, strict=True):
            for axes, (layer, kinds) in zip(row, inspection.points.items(), strict=True):
                visual, text = (torch.cat(kind) for kind in kinds)
                places = project(torch.cat([visual, text]))
                axes.set_title(f"{method}, layer {layer}", loc="left")
                for chosen, colour, label in (
                    (slice(0, len(visual)), BLUE, "visual"), (slice(len(visual), None), ORANGE, "text"),
                ):  # fmt: skip
                    axes.plot(*places[chosen].T, "o", color=colour, markersize=2.5, alpha=0.6, label=label)
                axes.set_xticks([])
                axes.set_yticks([])
        panels[0, 0].legend(markerscale=2)

    return png(len(methods), len(inspection.points), (3.1, 2.8), draw)


def _two_components(tokens: torch.Tensor) -> np.ndarray:
    return principal_components(torch.nn.functional.normalize(tokens, dim=-1), 2).numpy()


def _tsne(tokens: torch.Tensor) -> np.ndarray:
    from sklearn.manifold import TSNE

    perplexity = min(_PERPLEXITY, (len(tokens) - 1) / 3)
    return TSNE(perplexity=perplexity, metric="cosine", init="random", random_state=0).fit_transform(tokens.numpy())


def draw_gram(inspections: Sequence[Inspection]) -> bytes:
    """Of each model with a teacher: both Gram matrices of the first image, and the pairs' differences."""

    def draw(panels: np.ndarray) -> None:
        for row, inspection in zip(panels, inspections, strict=True):
            gram = inspection.gram
            assert gram is not None
            for axes, matrix, whose in zip(row, gram.matrices, ("student", "teacher"), strict=False):
                axes.set_title(f"{inspection.name}: {whose}", loc="left")
                image = axes.imshow(matrix, vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
                axes.grid(False)
                axes.figure.colorbar(image, ax=axes)
            share = gram.histogram / gram.histogram.sum()
            above = GRAM_BINS[:-1] >= 0
            for chosen, colour, label in ((above, RED, "CGA pushes apart"), (~above, GREY, "CGA leaves alone")):
                width = np.diff(GRAM_BINS)[chosen]
                row[2].bar(GRAM_BINS[:-1][chosen], share[chosen], width, color=colour, align="edge", label=label)
            shown = np.flatnonzero(gram.histogram)
            row[2].set_xlim(GRAM_BINS[shown[0]] - 0.05, GRAM_BINS[shown[-1] + 1] + 0.05)
            row[2].set_title("student - teacher, share of pairs", loc="left")
            row[2].legend()

    return png(len(inspections), 3, (4.2, 3.2), draw)


def draw_views(number: int, inspections: Sequence[Inspection]) -> bytes:
    """One image: of each model, its patches by principal components and by similarity to one patch, over layers."""
    views = [(inspection.name, inspection.views[number]) for inspection in inspections]
    num_columns = 1 + max(len(view.layers) for _, view in views)

    def draw(panels: np.ndarray) -> None:
        for axes in panels.flat:
            axes.set_axis_off()
        for index, (name, view) in enumerate(views):
            above, below = panels[2 * index], panels[2 * index + 1]
            _draw_picture(above[0], name, view)
            for column, layer in enumerate(view.layers, start=1):
                above[column].set_title(f"layer {layer}", loc="left")
                above[column].imshow(view.colours[column - 1], interpolation="nearest")
                below[column].imshow(
                    view.similarities[column - 1], vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest"
                )
                row, place = view.patch
                below[column].add_patch(Rectangle((place - 0.5, row - 0.5), 1, 1, fill=False, linewidth=1.5))

    return png(2 * len(views), num_columns, (2.2, 2.2), draw)


def _draw_picture(axes: Axes, name: str, view: View) -> None:
    rows, columns = view.similarities[0].shape
    axes.set_title(name, loc="left")
    axes.imshow(view.picture, extent=(-0.5, columns - 0.5, rows - 0.5, -0.5), aspect="auto")
    axes.set_box_aspect(rows / columns)
    axes.add_patch(Rectangle((view.patch[1] - 0.5, view.patch[0] - 0.5), 1, 1, fill=False, edgecolor="white"))
