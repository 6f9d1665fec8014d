"""The results as files: one page that needs nothing beside it, its pictures as PNG, its numbers as CSV.

index.html              everything, with the pictures inside
curves.csv              model, step, measure, layer, mean, standard error, number of images (or conversations)
attention_decay.csv     model, step, layer, position in the answer, mean, number of conversations; of answers that
                        are not empty
gram.csv                model, step, measure, mean, standard error, number of images; of models with a teacher
*.png                   the pictures
"""

import base64
import csv
import html
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from laver_megatron.inspection import plots
from laver_megatron.inspection.collect import MEASURES, Inspection, is_run, mean_and_error
from laver_megatron.inspection.measures import slope

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #24292f; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #d8dce2; }
img { max-width: 100%; display: block; margin: .6rem 0; } .note { color: #57606a; max-width: 60rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #e4e6ea; text-align: right; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; } th { font-weight: 600; color: #57606a; }
"""
_GRAM = {
    "share": "pairs with student > teacher",
    "positive": "mean of max(0, student - teacher)",
    "negative": "mean of max(0, teacher - student)",
}


@dataclass(frozen=True)
class Section:
    """A part of the page. pictures: PNG files by name."""

    title: str
    note: str
    pictures: dict[str, bytes]
    table: str = ""


def write_page(inspections: Sequence[Inspection], directory: Path, *, facts: Sequence[str], with_tsne: bool) -> Path:
    """Writes all files into a directory that exists. facts: lines on what was shown. Returns index.html."""
    sections = _sections(inspections, with_tsne)
    tables = {
        "curves.csv": list(_curve_rows(inspections)),
        "attention_decay.csv": list(_decay_rows(inspections)),
        "gram.csv": list(_gram_rows(inspections)),
    }
    tables = {name: rows for name, rows in tables.items() if rows}
    for name, rows in tables.items():
        (directory / name).write_text(_csv(rows), encoding="utf-8")
    for section in sections:
        for name, content in section.pictures.items():
            (directory / name).write_bytes(content)
    page = directory / "index.html"
    page.write_text(_html(inspections, sections, facts, list(tables)), encoding="utf-8")
    return page


def _sections(inspections: Sequence[Inspection], with_tsne: bool) -> list[Section]:
    steps = is_run(inspections)
    mapped = plots.some(inspections) if steps else inspections
    sections = [
        Section(
            "Over the layers",
            "Layer 0 is what enters the decoder; all layers are before the final norm. Bands are two standard errors "
            "over the images; all models see the same ones, so differences can be clear although bands overlap. "
            + " ".join(f"{measure.title}: {measure.explanation}." for measure in MEASURES.values()),
            {"curves.png": plots.draw_curves(inspections, steps)},
        )
    ]
    if steps:
        sections.append(Section("Over the training", "Layer by step.", {"steps.png": plots.draw_steps(inspections)}))
    answering = [inspection for inspection in inspections if inspection.decay()[0].size]
    note = "Share of its attention that each token of the answer gives to visual tokens, when it is predicted."
    if silent := [inspection.name for inspection in inspections if not inspection.decay()[0].size]:
        note += f" Most answers of {', '.join(silent)} are empty; give one with --answer."
    pictures = {"attention_decay.png": plots.draw_decay(answering, steps)} if answering else {}
    sections.append(Section("Attention along the answer", note, pictures))
    drawn = [inspection for inspection in mapped if inspection.gram is not None]
    if drawn:
        sections.append(
            Section(
                "Gram matrices of student and teacher",
                "Cosines of the visual logits of all pairs of patches. Clipping lets pairs through that are more alike "
                "for the student than for the teacher. After ±: the standard error.",
                {"gram.png": plots.draw_gram(drawn)},
                _table(["model", *_GRAM.values()], [_gram_cells(it) for it in inspections if it.gram is not None]),
            )
        )
    for number in range(min(len(inspection.views) for inspection in inspections)):
        name = inspections[0].views[number].name
        sections.append(
            Section(
                f"Patches of {name}",
                "Above: the first three principal components as red, green and blue; like colours, like tokens. Below: "
                "cosine to the marked patch, from -1 (blue) to 1 (red).",
                {f"patches_{number + 1}.png": plots.draw_views(number, mapped)},
            )
        )
    shown = inspections if not steps else inspections[-1:]
    sections.append(
        Section(
            "Visual and text tokens",
            "Some tokens of the first conversations, by cosine. Distances between clusters of t-SNE mean little.",
            {
                f"tokens_{number}.png": plots.draw_points(inspection, with_tsne)
                for number, inspection in enumerate(shown, start=1)
            },
            "" if len(shown) == 1 else _in_order(shown),
        )
    )
    return sections


def _in_order(inspections: Sequence[Inspection]) -> str:
    return f'<p class="note">From above: {html.escape(", ".join(it.name for it in inspections))}.</p>'


def _html(
    inspections: Sequence[Inspection], sections: Sequence[Section], facts: Sequence[str], files: list[str]
) -> str:
    names = ", ".join(inspection.name for inspection in inspections)
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(names)}</title>',
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>',
        f"<h1>Inside {html.escape(names)}</h1>",
        *(f'<p class="note">{html.escape(fact)}</p>' for fact in facts),
        _summary(inspections),
    ]
    for section in sections:
        parts += [f"<h2>{html.escape(section.title)}</h2>", f'<p class="note">{html.escape(section.note)}</p>']
        parts.append(section.table)
        for name, content in section.pictures.items():
            data = base64.b64encode(content).decode()
            parts.append(f'<img alt="{html.escape(section.title)}" src="data:image/png;base64,{data}">')
            files.append(name)
    parts.append(f'<p class="note">Beside this page: {html.escape(", ".join(files))}.</p></body></html>\n')
    return "\n".join(parts)


def _summary(inspections: Sequence[Inspection]) -> str:
    """All measures at two layers."""
    rows = []
    for inspection in inspections:
        layer = round(2 * inspection.num_layers / 3)
        means = [inspection.mean(name)[0] for name in MEASURES]
        cells = [f"{_number(mean_C[layer])} / {_number(mean_C[-1])}" for mean_C in means]
        decay = slope(torch.from_numpy(inspection.decay()[0].mean(0)))
        rows.append([inspection.name, *cells, _number(float(decay))])
    heads = ["model", *(measure.title for measure in MEASURES.values()), "Attention, change a token of the answer"]
    return (
        f'{_table(heads, rows)}<p class="note">After two thirds of the layers / after the last; '
        f"{inspections[0].num_images} images. The change is the slope of a line through the mean over the layers.</p>"
    )


def _gram_cells(inspection: Inspection) -> list[str]:
    assert inspection.gram is not None
    found = [mean_and_error(np.array(inspection.gram.values[name])[:, None]) for name in _GRAM]
    return [inspection.name, *(f"{_number(mean[0])} ± {_number(error[0])}" for mean, error, _ in found)]


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3g}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    lines = "".join(row(cells, "td") for cells in rows)
    return f'<div class="wide"><table>{row(heads, "th")}{lines}</table></div>'


def _curve_rows(inspections: Sequence[Inspection]) -> Iterable[dict[str, Any]]:
    for inspection in inspections:
        for name in MEASURES:
            for layer, (mean, error, count) in enumerate(zip(*inspection.mean(name), strict=True)):
                yield _row(inspection, measure=name, layer=layer, mean=mean, standard_error=error, count=count)


def _decay_rows(inspections: Sequence[Inspection]) -> Iterable[dict[str, Any]]:
    for inspection in inspections:
        mean_LP, count_P = inspection.decay()
        for layer, mean_P in enumerate(mean_LP, start=1):
            for position, (mean, count) in enumerate(zip(mean_P, count_P, strict=True)):
                yield _row(inspection, layer=layer, position=position, mean=mean, count=count)


def _gram_rows(inspections: Sequence[Inspection]) -> Iterable[dict[str, Any]]:
    for inspection in inspections:
        for name, values in inspection.gram.values.items() if inspection.gram else ():
            mean, error, count = (column[0] for column in mean_and_error(np.array(values)[:, None]))
            yield _row(inspection, measure=name, mean=mean, standard_error=error, count=count)


def _row(inspection: Inspection, **cells: Any) -> dict[str, Any]:
    plain = {name: cell.item() if isinstance(cell, np.generic) else cell for name, cell in cells.items()}
    known = {name: "" if isinstance(cell, float) and math.isnan(cell) else cell for name, cell in plain.items()}
    return {"model": inspection.name, "step": inspection.source.step, **known}


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
