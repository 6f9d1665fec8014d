"""`run_summary.json`: what a scaling study needs to know of one run, in one small file of strict JSON.

Written into the run directory at every checkpoint, so an interrupted run has one, too. Version 1 holds

    format, version, name   which file this is; the run directory's name
    state                   finished, or unfinished: iteration < train_iters
    iteration, train_iters, skipped_iterations
    counted_iterations      what tokens, FLOPs and time are sums over: all of them, unless the run resumed from a
                            checkpoint that had no sums
    seed, config_hash       two runs that share both are the same run; see `config_hash`
    parameters              encoder, connector, embedding, decoder (its final norm included), lm_head (0 if tied: the
                            embedding is it then), vision_head, mask_token
    teacher_parameters      held beside them
    tokens                  total = text + visual of the language stream; label: those with a label
    samples
    flops                   model: of all steps, by the convention of `flops.py`, exact integers; laver_overhead: what
                            the reconstruction stream, teacher, vision head and Gram matrices have in that;
                            language_model: the rest, which is what plain training on the same data costs
    validation              last and best (the lowest lm_loss): iteration, lm_loss, loss and with LaVer mim_loss,
                            gram_loss and the collapse monitors student_visual_similarity, teacher_visual_similarity,
                            teacher_entropy; null without validation. answer_accuracy, and answer_accuracy/FAMILY where
                            records name a family (`answers.py`). With --inspect-interval visual_similarity, too:
                            layer_1, layer_2, ... and last, the same as that of the last layer
    training                the same numbers as means over the last num_iterations (at most 20)
    throughput              means over the same: tokens, visual tokens, images a second, TFLOP/s of a device; MFU, HFU
                            and MFU over full squares (`utilisation.py`), absent where the peak is not known
    hardware                device, num_devices, tensor, pipeline and data parallel sizes, versions
    time                    training_seconds (steps alone, without validation and saving), device_hours (the same
                            times devices), written_at (UTC)
    restarts                what `laver train --restarts` did: when, at which iteration, after what (restarts.jsonl)
    goodput                 share of useful steps in the time since the run was born, and seconds by cause
                            (`resilience/goodput.py`); absent where a run keeps no accounts
    config                  the resolved configuration

A number that was NaN or infinite is null. Everything is plain: other numbers that are put into the file (of an
evaluation, say) are columns of the registry like those above.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laver_megatron.config.fields import Config, fields_of
from laver_megatron.run_log.records import read_records
from laver_megatron.runtime.files import write_text

if TYPE_CHECKING:  # the registry reads summaries without loading torch
    from laver_megatron.checkpoint.progress import Progress

FILE_NAME = "run_summary.json"
RESTARTS_FILE = "restarts.jsonl"
MANIFEST = "manifest.csv"  # of a sweep: the runs that it made, beside the folder with their directories
FORMAT, VERSION = "laver_megatron run summary", 1
FINISHED, UNFINISHED = "finished", "unfinished"

LANGUAGE_COLUMNS = ("loss", "lm_loss")
LAVER_COLUMNS = (
    "mim_loss", "gram_loss", "student_visual_similarity", "teacher_visual_similarity", "teacher_entropy",
)  # fmt: skip
THROUGHPUT_COLUMNS = (
    "tokens_per_second", "visual_tokens_per_second", "images_per_second", "tflops_per_gpu",
    "mfu", "hfu", "mfu_full_square",
)  # fmt: skip
VISUAL_SIMILARITY = "visual_similarity"  # of a validation record: one number a decoder layer
_AVERAGED_ITERATIONS = 20
# What decides a run's numbers lies in these sections, and in what is validated; layout and logging change none.
_HASHED_SECTIONS = ("start", "model", "data", "objective", "training")
_NOT_HASHED = (
    "seed",  # stands beside the hash
    "preset",  # its values are in the other fields
    "allow_change", "attention_kernel", "micro_batch_size", "num_workers", "shard_cache", "shard_cache_gb",
    "allow_pipe", "exit_interval", "max_skipped_iterations", "max_bad_fraction",
)  # fmt: skip


def hashed_settings(laver: bool) -> set[str]:
    """The fields of a configuration that decide a run's numbers, the seed apart. Not among them: the layout, kernels,
    workers, what is written where; and without LaVer, LaVer's own settings."""
    names = {item.name for section in _HASHED_SECTIONS for item in fields_of(section)} - set(_NOT_HASHED) | {
        "eval_iters"
    }
    return names if laver else names - {item.name for item in fields_of("objective")} | {"laver"}


def config_hash(config: Config) -> str:
    """Twelve hexadecimal digits of `hashed_settings`."""
    values = config.flat()
    settings = {name: values[name] for name in sorted(hashed_settings(config.objective.laver))}
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]


def make_summary(
    config: Config,
    progress: Progress,
    parameters: Mapping[str, int],
    num_teacher_parameters: int,
    hardware: Mapping[str, Any],
    validation: Sequence[Mapping[str, Any]],
    training: Sequence[Mapping[str, Any]],
    restarts: Sequence[Mapping[str, Any]] = (),
    *,
    goodput: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of the file, as described above. validation, training, restarts: the records of the run's .jsonl
    files, as far as they are there. goodput: of a run that keeps accounts of its time."""
    columns = LANGUAGE_COLUMNS + (LAVER_COLUMNS if config.objective.laver else ())
    visual, total = progress.consumed_visual_tokens, progress.consumed_tokens
    return {
        "format": FORMAT,
        "version": VERSION,
        "name": Path(config.run.run_dir).name,
        "state": FINISHED if progress.iteration >= config.training.train_iters else UNFINISHED,
        "iteration": progress.iteration,
        "train_iters": config.training.train_iters,
        "counted_iterations": progress.counted_iterations,
        "skipped_iterations": progress.skipped_iterations,
        "seed": config.training.seed,
        "config_hash": config_hash(config),
        "parameters": dict(parameters),
        "teacher_parameters": num_teacher_parameters,
        "tokens": {"total": total, "text": total - visual, "visual": visual, "label": progress.consumed_label_tokens},
        "samples": progress.consumed_samples,
        "flops": {
            "model": progress.model_flops,
            "laver_overhead": progress.laver_flops,
            "language_model": progress.model_flops - progress.laver_flops,
        },
        "validation": _last_and_best(validation, columns),
        "training": _recent_means(training, columns),
        "throughput": _known(_recent_means(training, THROUGHPUT_COLUMNS)),
        "hardware": dict(hardware),
        "time": {
            "training_seconds": progress.training_seconds,
            "device_hours": progress.device_seconds / 3600,
            "written_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        },
        "restarts": [dict(restart) for restart in restarts],
        **({} if goodput is None else {"goodput": dict(goodput)}),
        "config": config.flat(),
    }


def _last_and_best(records: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> dict[str, dict] | None:
    if not records:
        return None
    chosen = {
        "last": max(records, key=lambda record: record["iteration"]),
        "best": min(records, key=lambda record: math.inf if record["lm_loss"] is None else record["lm_loss"]),
    }
    return {
        name: {field: record.get(field) for field in ("iteration", *columns)}
        | {field: value for field, value in record.items() if field.split("/")[0] == "answer_accuracy"}
        | _by_layer(record)
        for name, record in chosen.items()
    }


def _by_layer(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The curve of a validation that measured it, as columns."""
    curve = record.get(VISUAL_SIMILARITY)
    if not curve:
        return {}
    layers = {f"layer_{number}": value for number, value in enumerate(curve, start=1)}
    return {VISUAL_SIMILARITY: {**layers, "last": curve[-1]}}


def _recent_means(records: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> dict[str, Any] | None:
    """Skipped iterations have no numbers and don't count; where none has any, the mean is null."""
    if not records:
        return None
    recent = records[-_AVERAGED_ITERATIONS:]
    means: dict[str, Any] = {"num_iterations": len(recent)}
    for column in columns:
        values = [record[column] for record in recent if record.get(column) is not None]
        means[column] = sum(values) / len(values) if values else None
    return means


def _known(means: dict[str, Any] | None) -> dict[str, Any] | None:
    """Without columns that say nothing, such as MFU where the peak is not known."""
    return means and {name: value for name, value in means.items() if value is not None}


def read_run_records(run_dir: Path) -> list[list[dict[str, Any]]]:
    """[validation, training, restarts]: what the run's .jsonl files hold, nothing for those that are not there."""
    paths = [run_dir / name for name in ("validation.jsonl", "metrics.jsonl", RESTARTS_FILE)]
    return [read_records(path) if path.is_file() else [] for path in paths]  # never waits for a pipe


def write_summary(run_dir: Path, summary: Mapping[str, Any]) -> Path:
    """Puts the file into the run directory, whole or not at all."""
    path = run_dir / FILE_NAME
    write_text(path, json.dumps(summary, indent=1, allow_nan=False) + "\n")
    return path
