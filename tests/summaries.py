"""Run directories with summaries, as runs of known laws would leave them."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from laver_megatron.config.fields import Config
from laver_megatron.run_log.run_summary import make_summary, write_summary


@dataclasses.dataclass
class SumsOfARun:
    """`checkpoint.Progress` without its imports."""

    iteration: int = 100
    counted_iterations: int = 100
    consumed_samples: int = 500
    consumed_tokens: int = 10_000
    consumed_visual_tokens: int = 6_000
    consumed_label_tokens: int = 900
    skipped_iterations: int = 0
    model_flops: int = 10**20 + 1
    laver_flops: int = 10**19
    training_seconds: float = 60.0
    device_seconds: float = 240.0


def make_config(directory, **settings) -> Config:
    required = {"data_path": ("shards",), "seq_length": 4096, "train_iters": 100, "eval_interval": 50}
    return Config.of(**{**required, "run_dir": str(directory), **settings})


def records(lm_loss, laver, iterations=(50, 100)):
    """Validation and training records whose last lm_loss is this one."""
    made = []
    for iteration in iterations:
        loss = None if lm_loss is None else lm_loss * (1 + (100 - iteration) / 100)
        record = {"iteration": iteration, "loss": loss, "lm_loss": loss}
        if laver:
            record |= {"mim_loss": 1.5, "gram_loss": 0.1, "teacher_entropy": 2.5}
            record |= {"student_visual_similarity": 0.3 + iteration / 1000, "teacher_visual_similarity": 0.5}
        made.append(record)
    return made


def write_run(run_dir: Path, lm_loss=2.0, *, size=1000, validation=True, settings=None, **sums):
    """A run directory with its summary, which is returned."""
    config = make_config(run_dir, **(settings or {}))
    parameters = dict.fromkeys(("encoder", "connector", "vision_head", "mask_token"), 7)
    parameters |= {"decoder": size, "embedding": 10, "lm_head": 0}
    made = records(lm_loss, config.objective.laver)
    summary = make_summary(
        config,
        SumsOfARun(**sums),
        parameters,
        size,
        {"device": "CPU", "num_devices": 4},
        made if validation else [],
        made,
    )
    run_dir.mkdir(parents=True, exist_ok=True)
    write_summary(run_dir, summary)
    return summary


def write_study(directory: Path, law_of, *, sizes=4, amounts=4, noise=0.0, cost=6.0, overhead=0.4):
    """Runs of every size and amount with LaVer and without; law_of[laver] is a function (size, tokens) -> loss."""
    generator = np.random.default_rng(0)
    for laver in (False, True):
        for size in np.geomspace(5e8, 7e10, sizes):
            for iterations, tokens in zip(
                range(100, 100 * amounts + 1, 100), np.geomspace(2e9, 1e12, amounts), strict=True
            ):
                size, tokens = int(size), int(tokens)
                plain = int(cost * size * tokens)
                extra = int(overhead * plain) if laver else 0
                loss = law_of[laver](size + 10, tokens) * np.exp(noise * generator.standard_normal())
                write_run(
                    directory / ("laver" if laver else "plain") / f"{size}-{tokens}",
                    float(loss),
                    size=size,
                    settings={"laver": laver, "load": f"hf:{size}", "train_iters": iterations},
                    iteration=iterations,
                    counted_iterations=iterations,
                    consumed_tokens=tokens,
                    consumed_visual_tokens=tokens // 2,
                    model_flops=plain + extra,
                    laver_flops=extra,
                )


def change(run_dir: Path, **changes):
    """Edits a summary: `section__field=value` or `field=value`."""
    path = run_dir / "run_summary.json"
    summary = json.loads(path.read_text())
    for name, value in changes.items():
        *sections, field = name.split("__")
        part = summary
        for section in sections:
            part = part[section]
        part[field] = value
    path.write_text(json.dumps(summary))
