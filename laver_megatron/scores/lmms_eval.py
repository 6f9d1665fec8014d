"""Reads what lmms-eval writes under --output_path:

MODEL/DATE_results.json           {"results": {task: {"metric,filter": value, "metric_stderr,filter": ...}}, ...}
MODEL/DATE_samples_TASK.jsonl     with --log_samples: a line a question, its score under the metric's name, either a
                                  number or an object with the score in one of its fields
"""

import json
import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from laver_megatron.runtime.files import read_object
from laver_megatron.scores.benchmarks import LMMS_EVAL, Benchmark, Source, known
from laver_megatron.scores.results import Found, Result, Sample, Samples, unknown_benchmark
from laver_megatron.scores.sheets import number

_ENDING = "_results.json"
# VLMEvalKit's files of samples may end so, too, but do not begin with a date.
_NAME = re.compile(r"\d{8}_\d{6}_results\.json")
_NOT_SCORES = ("alias", "samples")


def read_lmms_eval(directory: Path) -> Found:
    """Every result below a directory; empty if lmms-eval wrote nothing there.

    Raises:
        ValueError: a file of results cannot be read, or is of another form.
    """
    results, notes, models = [], [], set()
    for path in sorted(it for it in directory.rglob(f"*{_ENDING}") if _NAME.fullmatch(it.name)):
        scores = read_object(path).get("results")
        if not (isinstance(scores, dict) and all(isinstance(metrics, dict) for metrics in scores.values())):
            raise ValueError(f"{path} has no scores of tasks under `results`; is it a file of lmms-eval?")
        models.add(path.parent.name)
        for task, metrics in scores.items():
            result = _result(path, task, metrics)
            if isinstance(result, Result):
                results.append(result)
            else:
                notes.append(result)
    return Found(tuple(results), frozenset(models), tuple(notes))


def _result(path: Path, task: str, metrics: dict[str, Any]) -> Result | str:
    """The result of a task, or why there is none."""
    values = {key: found for key, value in metrics.items() if (found := _score(key, value)) is not None}
    is_known = known(LMMS_EVAL, task)
    names = {key for key in values if is_known is None or key.partition(",")[0] == is_known[1].metric}
    if len(names) != 1:
        wanted = f"{is_known[1].metric} " if is_known else ""
        return f"{task} (lmms-eval) left out: {len(names)} scores {wanted}in {path}" + (
            f": {', '.join(sorted(names))}" if names else ""
        )
    (key,) = names
    metric = key.partition(",")[0]
    benchmark, source = is_known or (unknown_benchmark(task), Source(task, metric, 1.0, metric))
    samples = path.with_name(f"{path.name.removesuffix(_ENDING)}_samples_{task}.jsonl")
    has_samples = bool(source.field) and samples.is_file()
    read = partial(read_samples, samples, benchmark, source) if has_samples else None
    return Result(benchmark, LMMS_EVAL, values[key] * source.scale, source, path, path.name, read)


def _score(key: str, value: Any) -> float | None:
    """The value of a metric; None for standard errors, names and what is no number."""
    name = key.partition(",")[0]
    is_score = name not in _NOT_SCORES and "_stderr" not in name and isinstance(value, int | float)
    return number(value) if is_score else None


def read_samples(path: Path, benchmark: Benchmark, source: Source) -> Samples:
    """The questions of one task by doc_id.

    Raises:
        ValueError: a line is damaged or has no score, or a question is there twice.
    """
    samples: dict[str, Sample] = {}
    twice: Counter[str] = Counter()
    with path.open(encoding="utf-8") as file:
        for row, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                value = record[source.metric]
                score = number(value[source.field] if isinstance(value, dict) else value)
                key, question = str(record["doc_id"]), str(record["doc_hash"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {row}: no score of {benchmark.name} ({error!r}); score again"
                ) from error
            if score is None:
                raise ValueError(f"{path}, line {row}: {source.metric} is no number: {value!r}")
            twice[key] += key in samples
            samples[key] = Sample(score, question)
    if repeated := sorted(key for key, count in twice.items() if count):
        raise ValueError(f"{path}: {len(repeated)} questions are there twice, such as {repeated[0]}; score again")
    return samples
