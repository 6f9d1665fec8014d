"""Reads what VLMEvalKit writes under --work-dir:

MODEL/TDATE/status.json                   the scores of every dataset, flat: {"split=none|Overall": 0.5, ...}
MODEL/TDATE/MODEL_DATASET_acc.csv         or _score.csv, _score.json: the same of one dataset; the only file with
                                          scores of releases that write no status.json
MODEL/TDATE/MODEL_DATASET_JUDGE_result.xlsx    each question (_results, _auxmatch; tsv or json with PRED_FORMAT)
MODEL/...                                 links to the newest of these
"""

from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from laver_megatron.runtime.files import read_object
from laver_megatron.scores.benchmarks import BENCHMARKS, VLMEVALKIT, Benchmark, Source, known
from laver_megatron.scores.results import Found, Result, Sample, Samples, unknown_benchmark
from laver_megatron.scores.sheets import FORMS, number, read_rows

_STATUS = "status.json"
_SCORE_FILES = ("_acc.csv", "_score.csv", "_acc.json", "_score.json")


def read_vlmevalkit(directory: Path) -> Found:
    """Every result below a directory; empty if VLMEvalKit wrote nothing there.

    Raises:
        ValueError: a status.json cannot be read, or is of another form.
    """
    results, notes, models = [], [], set()
    # The links in the folder of a model lead to files that are found below it anyway.
    statuses = sorted({path.resolve() for path in directory.rglob(_STATUS) if path.exists()})
    for path in statuses:
        status = read_object(path)
        model, datasets = status.get("model_name"), status.get("datasets")
        if not (isinstance(model, str) and isinstance(datasets, dict)):
            raise ValueError(f"{path} names no model and datasets; is it a file of VLMEvalKit?")
        models.add(model)
        for dataset, entry in datasets.items():
            result = _of_status(path, model, dataset, entry if isinstance(entry, dict) else {})
            if isinstance(result, Result):
                results.append(result)
            else:
                notes.append(result)
    with_status = {path.parent for path in statuses}
    for path, model, dataset in _score_files(directory):
        if path.parent not in with_status:
            models.add(model)
            results += _of_score_file(path, model, dataset, notes)
    return Found(tuple(results), frozenset(models), tuple(notes))


def _of_status(path: Path, model: str, dataset: str, entry: dict[str, Any]) -> Result | str:
    metrics = entry.get("metrics")
    if not isinstance(metrics, dict) or not metrics:
        reason = entry.get("skip_reason") or entry.get("error_message") or f"status {entry.get('status')}"
        return f"{dataset} (VLMEvalKit) left out: no score ({reason}) in {path}"
    return _result(path, model, dataset, metrics, str(entry.get("updated_at", "")), entry.get("primary_metric"))


def _score_files(directory: Path) -> Iterator[tuple[Path, str, str]]:
    """Files with the scores of one known dataset, its model and name, in a folder without status.json."""
    datasets = [benchmark.vlmevalkit.dataset for benchmark in BENCHMARKS if benchmark.vlmevalkit]
    for path in sorted({found.resolve() for ending in _SCORE_FILES for found in directory.rglob(f"*{ending}")}):
        stem = next((path.name.removesuffix(it) for it in _SCORE_FILES if path.name.endswith(it)), "")
        matching = [dataset for dataset in datasets if stem.endswith(f"_{dataset}")]
        if matching and path.exists():
            dataset = max(matching, key=len)
            yield path, stem.removesuffix(f"_{dataset}"), dataset


def _of_score_file(path: Path, model: str, dataset: str, notes: list[str]) -> list[Result]:
    metrics = read_object(path) if path.suffix == ".json" else _flat(read_rows(path))
    when = datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat()
    result = _result(path, model, dataset, metrics, when, None)
    if isinstance(result, Result):
        return [result]
    notes.append(result)
    return []


def _flat(rows: list[dict[str, Any]]) -> dict[str, float]:
    """As status.json has it: columns that are no numbers tell the rows apart."""
    metrics = {}
    for row in rows:
        texts = [f"{name}={text}" for name, text in row.items() if number(text) is None and text not in (None, "")]
        for name, text in row.items():
            if (value := number(text)) is not None:
                metrics["|".join([*texts, name])] = value
    return metrics


def _result(path: Path, model: str, dataset: str, metrics: dict[str, Any], when: str, primary: Any) -> Result | str:
    """The result of a dataset, or why there is none."""
    is_known = known(VLMEVALKIT, dataset)
    # Of multiple choice, the kit calls the accuracy of all questions by another name than the score itself.
    wanted = is_known[1].metric if is_known else str(primary).replace("Overall Acc", "Overall")
    fitting = [key for key in metrics if key == wanted] or [key for key in metrics if key.endswith(f"|{wanted}")]
    values = [value for key in fitting if (value := number(metrics[key])) is not None]
    if len(values) != 1:
        return f"{dataset} (VLMEvalKit) left out: {len(values)} scores {wanted} in {path}, of {', '.join(metrics)}"
    benchmark, source = is_known or (unknown_benchmark(dataset), Source(dataset, wanted))
    files = _sample_files(path.parent, f"{model}_{dataset}", source)
    read = partial(read_samples, files, benchmark, source) if files else None
    return Result(benchmark, VLMEVALKIT, values[0] * source.scale, source, path, when, read)


def _sample_files(directory: Path, stem: str, source: Source) -> list[Path]:
    """Files with the score of each question: several if several judges scored."""
    if not source.file:
        return []
    return sorted(path for form in FORMS for path in directory.glob(f"{_escaped(stem)}{source.file}{form}"))


def _escaped(text: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in text)


def read_samples(paths: list[Path], benchmark: Benchmark, source: Source) -> Samples:
    """The questions of one dataset by index.

    Raises:
        ValueError: there are several files, it has no scores, or a question is there twice.
    """
    if len(paths) > 1:
        raise ValueError(
            f"{benchmark.name}: several judges scored ({', '.join(path.name for path in paths)}); keep one"
        )
    (path,) = paths
    samples: dict[str, Sample] = {}
    for row in read_rows(path):
        score = number(row.get(source.field))
        if score is None or row.get("index") is None:
            raise ValueError(f"{path}: no `index` and `{source.field}` in the row {list(row)[:5]}; score again")
        key = str(row["index"])
        if key in samples:
            raise ValueError(f"{path}: the question {key} is there twice; score again")
        samples[key] = Sample(score, str(row.get("answer")))
    return samples
