"""Rows of a table file, whichever of its forms VLMEvalKit wrote: xlsx, tsv, csv or JSON records."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FORMS = (".xlsx", ".tsv", ".csv", ".json")

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of a table by column.

    Raises:
        ValueError: it cannot be read.
        MissingReader: it is xlsx, and there is no openpyxl.
    """
    try:
        if path.suffix == ".xlsx":
            return _xlsx_rows(path)
        if path.suffix == ".json":
            rows = json.loads(path.read_text(encoding="utf-8"))
            if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
                raise ValueError("it is not a list of records")
            return rows
        with path.open(newline="", encoding="utf-8") as file:
            csv.field_size_limit(2**27)  # an image as base64 is a field, too
            return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    except MissingReader:
        raise
    except (ValueError, KeyError, csv.Error, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as a table ({error}); score again, or copy it again") from error


class MissingReader(ValueError):
    """A package that reads this form is not installed."""


def _xlsx_rows(path: Path) -> list[Row]:
    try:
        import openpyxl
    except ModuleNotFoundError as error:
        raise MissingReader(
            f"{path} needs openpyxl, which is not installed: pip install openpyxl; or score with PRED_FORMAT=tsv"
        ) from error
    try:
        sheet = openpyxl.load_workbook(path, read_only=True, data_only=True).active
        rows: list[Sequence[Any]] = list(sheet.iter_rows(values_only=True)) if sheet is not None else []
    except OSError:
        raise
    except Exception as error:  # of a damaged file, whatever zipfile, zlib and the XML parser raise
        raise ValueError(str(error)) from error
    return [dict(zip(map(str, rows[0]), row, strict=False)) for row in rows[1:]]


def number(value: Any) -> float | None:
    """A number, or its text; True and False count as 1 and 0. None for anything else, and for what is not finite."""
    if isinstance(value, str):
        value = {"true": 1, "false": 0}.get(value.strip().lower(), value)
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None
