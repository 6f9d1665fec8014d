"""The table of scores as text, CSV, Markdown and JSON."""

import csv
import dataclasses
import io
import json
from pathlib import Path

from laver_megatron.runtime.files import write_text
from laver_megatron.scores.comparison import Cell, Table
from laver_megatron.scores.paired import LEVEL

FORMS = (".csv", ".json", ".md")

Line = list[str]


def write_table(table: Table, path: Path) -> None:
    """Writes the table in the form of the file's ending, atomically. The directory must be there."""
    assert path.suffix in FORMS
    if path.suffix == ".json":
        text = json.dumps(_as_json(table), indent=2) + "\n"
    elif path.suffix == ".csv":
        output = io.StringIO()
        csv.writer(output, lineterminator="\n").writerows(_lines(table))
        text = output.getvalue()
    else:
        text = table_markdown(table)
    write_text(path, text)


def table_text(table: Table) -> str:
    """For the terminal: aligned columns, then the notes."""
    lines = _lines(table)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*rows, *_footnotes(table)])


def table_markdown(table: Table) -> str:
    head, *rows = [[cell.replace("|", "\\|") for cell in line] for line in _lines(table)]
    lines = [head, ["---"] * len(head), *rows]
    notes = "".join(f"- {note}\n" for note in _footnotes(table))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + (f"\n{notes}" if notes else "")


def _lines(table: Table) -> list[Line]:
    others = [name for name in table.directories if name != table.baseline]
    columns = [table.baseline, *(part for name in others for part in (name, "gain", f"{LEVEL:.0%}", "p"))]
    lines = [["benchmark", "type", "kit", *columns]]
    for row in table.rows:
        cells = [_value(row.cells.get(table.baseline))]
        for name in others:
            cells += _compared(row.cells.get(name), row.benchmark.divisor)
        lines.append([row.benchmark.name, row.benchmark.type, row.kit, *cells])
    for average in table.averages:
        reference = average.values[table.baseline]
        cells = [f"{reference:.2f}"]
        for name in others:
            cells += [f"{average.values[name]:.2f}", f"{average.values[name] - reference:+.2f}", "", ""]
        lines.append([average.name, f"mean of {len(average.benchmarks)}", "", *cells])
    return lines


def _value(cell: Cell | None) -> str:
    return f"{cell.value:.2f}" if cell else "-"


def _compared(cell: Cell | None, divisor: float) -> Line:
    """Score, gain, its interval and p. divisor: the row's unit in percent."""
    if cell is None or cell.gain is None:
        return [_value(cell), "-", "", ""]
    if cell.test is None:
        return [_value(cell), f"{cell.gain:+.2f}", "", ""]
    bounds = [f"{100 * divisor * bound:+.2f}" for bound in (cell.test.low, cell.test.high) if bound is not None]
    return [_value(cell), f"{cell.gain:+.2f}", " to ".join(bounds) or "-", f"{cell.test.p_value:.2g}"]


def _footnotes(table: Table) -> list[str]:
    tests = [cell.test for row in table.rows for cell in row.cells.values() if cell.test]
    notes = list(table.notes)
    if divided := [row.benchmark.name for row in table.rows if row.benchmark.divisor != 1]:
        notes.insert(0, f"{', '.join(sorted(set(divided)))} counts in averages divided by 10")
    if tests:
        methods = " or ".join(sorted({test.method for test in tests}))
        notes.insert(0, f"p: {methods}, over the same samples, two-sided, not corrected for {len(tests)} comparisons")
    return notes


def _as_json(table: Table) -> dict:
    return {
        "directories": table.directories,
        "baseline": table.baseline,
        "rows": [
            {
                "benchmark": row.benchmark.name,
                "type": row.benchmark.type,
                "in_paper": row.benchmark.in_paper,
                "kit": row.kit,
                "divisor": row.benchmark.divisor,
                "directories": {name: dataclasses.asdict(cell) for name, cell in row.cells.items()},
            }
            for row in table.rows
        ],
        "averages": [dataclasses.asdict(average) for average in table.averages],
        "notes": table.notes,
    }
