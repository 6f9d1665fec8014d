"""A study's fits as files: one table in JSON, the same for spreadsheets in CSV.

law.json          everything: settings, parameters with intervals, extrapolation, frontier, differences, notes
law.csv           arm, parameter, value, low, high
frontier.csv      arm, FLOPs, and the best size, tokens and value there, with intervals
measured.csv      the pairs of runs that two arms have in common, treated minus baseline
means.csv         the means of these by amount and of all, with intervals
differences.csv   treated minus baseline by the laws, at equal data and at equal FLOPs

A column `outside` names what lies beyond the runs there, N or D, so that a law is extrapolated.
"""

import csv
import dataclasses
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from laver_megatron.runtime.files import write_text
from laver_megatron.studies.comparison import Arm, Extrapolation
from laver_megatron.studies.compute import optimum
from laver_megatron.studies.law import percentiles
from laver_megatron.studies.law_report import Report
from laver_megatron.studies.measured import Measured

TABLES = ("law.json", "law.csv", "frontier.csv", "measured.csv", "means.csv", "differences.csv")


def write_tables(report: Report, directory: Path, facts: Mapping[str, Any]) -> list[Path]:
    """Writes the tables; `facts` of the study go into law.json as they are. Returns the files."""
    directory.mkdir(parents=True, exist_ok=True)
    tables = {
        "law.json": json.dumps({**facts, **_as_json(report)}, indent=1, allow_nan=False) + "\n",
        "law.csv": _csv(_parameter_rows(report)),
        "frontier.csv": _csv(_frontier_rows(report)),
    }
    if report.measured:
        tables |= _measured_tables(report.measured)
    if report.differences:
        tables["differences.csv"] = _csv(_difference_rows(report))
    return _write(tables, directory)


def write_measured(measured: Measured, directory: Path) -> list[Path]:
    """Writes the tables of two arms that are compared without a law. Returns the files."""
    directory.mkdir(parents=True, exist_ok=True)
    return _write(_measured_tables(measured), directory)


def _write(tables: Mapping[str, str], directory: Path) -> list[Path]:
    assert set(tables) <= set(TABLES)
    for name, text in tables.items():
        write_text(directory / name, text)
    return [directory / name for name in tables]


def _measured_tables(measured: Measured) -> dict[str, str]:
    if not measured.pairs:
        return {}
    return {
        "measured.csv": _csv(_pair_rows(measured)),
        "means.csv": _csv(map(dataclasses.asdict, measured.means)),
    }


def _as_json(report: Report) -> dict[str, Any]:
    return {
        **dataclasses.asdict(report.settings),
        "notes": list(report.notes),
        "arms": {
            arm.name: _arm_as_json(arm, e, report) for arm, e in zip(report.arms, report.extrapolations, strict=True)
        },
        "measured": {
            "pairs": list(_pair_rows(report.measured)) if report.measured else [],
            "means": [dataclasses.asdict(mean) for mean in report.measured.means] if report.measured else [],
        },
        "differences": list(_difference_rows(report)),
    }


def _arm_as_json(arm: Arm, extrapolation: Extrapolation, report: Report) -> dict[str, Any]:
    fit, rows = arm.fit, [row for row in _parameter_rows(report) if row["arm"] == arm.name]
    return {
        "num_runs": len(fit.points),
        "parameters": {row["parameter"]: {key: row[key] for key in ("value", "low", "high")} for row in rows},
        "objective": fit.objective,
        "num_starts": fit.num_starts,
        "num_starts_at_minimum": fit.num_agreeing,
        "mean_absolute_log_residual": float(np.abs(fit.residuals_R).mean()),
        "warnings": list(fit.warnings),
        "flops_per_token": dataclasses.asdict(arm.cost),
        "leave_largest_out": {
            **dataclasses.asdict(extrapolation),
            "errors": list(extrapolation.errors_R),
            "mean_absolute_error": extrapolation.mean_error if extrapolation.errors_R else None,
        },
        "frontier": [row for row in _frontier_rows(report) if row["arm"] == arm.name],
    }


def _parameter_rows(report: Report) -> Iterator[dict[str, Any]]:
    for arm in report.arms:
        intervals = arm.fit.intervals(report.settings.level) if arm.fit.resampled else {}
        for name, value in arm.fit.law.named().items():
            low, high = intervals.get(name, (None, None))
            yield {"arm": arm.name, "parameter": name, "value": value, "low": low, "high": high}


def _frontier_rows(report: Report) -> Iterator[dict[str, Any]]:
    for arm in report.arms:
        best = optimum(arm.fit.law, arm.cost, report.budgets_X)
        resampled = optimum(arm.fit.resampled, arm.cost, report.budgets_X) if arm.fit.resampled else None
        outside_X = arm.fit.points.outside(best.size_X, best.tokens_X)
        for x, flops in enumerate(report.budgets_X.tolist()):
            row: dict[str, Any] = {"arm": arm.name, "flops": flops}
            for name in ("size", "tokens", "value"):
                low = high = None
                if resampled is not None:
                    low, high = map(float, percentiles(getattr(resampled, f"{name}_X")[:, x], report.settings.level))
                row |= {name: float(getattr(best, f"{name}_X")[x]), f"{name}_low": low, f"{name}_high": high}
            yield row | {"outside": outside_X[x]}


def _pair_rows(measured: Measured) -> Iterator[dict[str, Any]]:
    for pair in measured.pairs:
        yield {**dataclasses.asdict(pair), "difference": pair.difference}


def _difference_rows(report: Report) -> Iterator[dict[str, Any]]:
    for row in report.differences:
        yield {**dataclasses.asdict(row), "difference": row.difference}


def _csv(rows: Iterator[dict[str, Any]]) -> str:
    text, writer = io.StringIO(), None
    for row in rows:
        if writer is None:
            writer = csv.DictWriter(text, list(row), lineterminator="\n")
            writer.writeheader()
        writer.writerow(row)
    return text.getvalue()
