"""The .jsonl files of a run directory: one strict JSON object an iteration, iterations rising."""

import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

from laver_megatron.runtime.files import write_text


def json_line(record: dict[str, Any]) -> str:
    """One line of strict JSON; a number that is not finite becomes null."""
    strict = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }
    return json.dumps(strict, allow_nan=False) + "\n"


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file of ours, in file order. A torn last line (a crash while writing) is left out
    quietly, a bad line elsewhere with a warning that names it."""
    lines = Path(path).read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record["iteration"], int):
                raise TypeError("iteration")
        except (ValueError, TypeError, KeyError):
            if number < len(lines):  # the last piece has no newline after it: torn
                warnings.warn(f"{path}, line {number} is not a record and is left out: {line[:60]!r}", stacklevel=2)
            continue
        records.append(record)
    return records


def drop_after(path: Path, iteration: int) -> None:
    """Keep only the records up to this iteration, atomically. Iteration 0 starts a new file and keeps the old one
    as `<name>.previous.jsonl`: a run directory used twice should not cost the first run its numbers."""
    if not path.exists() or path.stat().st_size == 0:
        return
    if iteration == 0:
        os.replace(path, path.with_name(f"{path.stem}.previous{path.suffix}"))
        return
    kept = [record for record in read_records(path) if record["iteration"] <= iteration]
    write_text(path, "".join(json_line(record) for record in kept))


def validation_losses(run_dir: Path) -> dict[int, float]:
    """The losses of a run's validations, by iteration; those that are not finite are left out."""
    path = run_dir / "validation.jsonl"
    records = read_records(path) if path.is_file() else []
    return {record["iteration"]: record["loss"] for record in records if isinstance(record.get("loss"), (int, float))}
