"""This program's training step on ready packs: `trainer.setup` and `train.train_step`, with everything real but the
reading of samples."""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from unittest import mock

import torch
from megatron.core import parallel_state

from laver_megatron import train
from laver_megatron import trainer as trainer_module
from laver_megatron.config.fields import Config
from laver_megatron.data.batch import run_data
from laver_megatron.data.batch.batches import BatchSource
from laver_megatron.data.batch.packing import PackBatch
from laver_megatron.data.index.faults import Fault, FaultLog
from laver_megatron.data.plan.plan import PlanMark
from laver_megatron.flops.step import StepFlops, step_flops
from laver_megatron.model import attention
from laver_megatron.run_log.metrics import RunLog
from laver_megatron.run_log.utilisation import work_of
from tools.benchmarks.plain_steps import build_qwen
from tools.benchmarks.step_shapes import PATCH_SIZE, StepShape, make_packs

if TYPE_CHECKING:
    from laver_megatron.data.batch.pack_reader import PackReader


class ReadyPacks:
    """In place of `PackReader`: the same packs at every step."""

    fingerprint = "ready packs"

    def __init__(self, shape: StepShape) -> None:
        self.micro_batches = [
            make_packs(shape, shape.micro_batch_size, seed=number * shape.micro_batch_size)
            for number in range(shape.num_micro_batches)
        ]
        self.plan, self.faults = self, FaultLog(logging.getLogger("laver_megatron.benchmark"))

    def mark(self, number: int) -> PlanMark:
        return PlanMark(0, number, self.fingerprint)

    def read(self, first_pack: int, num_packs: int, micro_batch_size: int) -> list[PackBatch]:
        return self.micro_batches

    def check_bad(self, num_bad: int, num_read: int, found: Mapping[Fault, int]) -> None:
        assert num_bad == 0 < num_read and not found

    def close(self) -> None:
        pass


def write_model(shape: StepShape, directory: Path, dtype: torch.dtype) -> None:
    """A Qwen2 model of random weights and an encoder-free "encoder" under `directory`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        build_qwen(shape, "sdpa").to(dtype).save_pretrained(directory / "model")
    (directory / "encoder").mkdir()
    description = {"model_type": "laver_patches", "patch_size": PATCH_SIZE, "num_channels": 3}
    (directory / "encoder" / "config.json").write_text(json.dumps(description))


def make_config(shape: StepShape, directory: Path, *, laver: bool, bf16: bool, **changes: Any) -> Config:
    settings: dict[str, Any] = {
        "load": f"hf:{directory / 'model'}",
        "encoder": str(directory / "encoder"),
        "run_dir": str(directory / ("laver" if laver else "lm")),
        "data_path": ("ready packs",),
        "seq_length": shape.seq_length,
        "visual_seq_length": shape.visual_seq_length,
        "micro_batch_size": shape.micro_batch_size,
        "global_batch_size": shape.num_packs,
        "vision_head_hidden_size": shape.vision_head_hidden_size,
        "laver": laver,
        "mask_ratio": 0.3,
        "train_iters": 10**6,
        "bf16": bf16,
        "num_workers": 0,
    }
    return Config.of(**{**settings, **changes})


def make_trainer(config: Config, shape: StepShape) -> train.Trainer:
    """`trainer.setup`. A second trainer in a process shares the parallel groups of the first."""
    joined = parallel_state.model_parallel_is_initialized()
    groups = mock.patch.object(trainer_module, "initialise_parallelism") if joined else mock.MagicMock()
    with (
        mock.patch.object(run_data, "load_tokenizer"),
        mock.patch.object(run_data, "open_preprocessor"),
        mock.patch.object(run_data, "open_reader", lambda *_: ReadyPacks(shape)),
        groups,
        mock.patch.object(trainer_module, "say"),
    ):
        return trainer_module.setup(config)


def use_packs(trainer: train.Trainer, shape: StepShape) -> train.Trainer:
    """The same trainer on other packs: weights and optimizer are shared."""
    source, reader = trainer.training_data, cast("PackReader", ReadyPacks(shape))
    packs = BatchSource(source.config, reader, source.areas, source.dtype, source.device, source.image_cost)
    return replace(trainer, training_data=packs)


class OurStep:
    """Calls are steps; each is written to a log as in a run."""

    def __init__(self, trainer: train.Trainer, name: str) -> None:
        """name: of the log's folder, under the run directory."""
        self.trainer = trainer
        self.log = RunLog(
            Path(trainer.config.run.run_dir) / name,
            train_iters=trainer.config.training.train_iters,
            log_interval=1,
            resume_iteration=trainer.progress.iteration,
            progress_bar=False,
        )

    def __call__(self) -> None:
        with redirect_stdout(io.StringIO()):
            self.log.log(train.train_step(self.trainer))

    def flops(self) -> StepFlops:
        """What a step needs: the LM head where there is a label, as `mfu` counts."""
        config = self.trainer.config
        batch = self.trainer.training_data.at(0, mask_ratio=config.objective.mask_ratio, step=0)
        work = work_of(batch.counts, config)
        return step_flops(self.trainer.flops, **work, num_label_tokens=batch.counts.labels)


@contextmanager
def timed_overhead() -> Iterator[dict[str, float]]:
    """Adds up host seconds of what a step does beside the model: the batch with its metadata, masks and counts; the
    streams of a micro-batch; dense attention masks; record and log."""
    seconds: dict[str, float] = {}

    def timed(owner: Any, attribute: str, name: str) -> Any:
        function = getattr(owner, attribute)

        @wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started

        return mock.patch.object(owner, attribute, wrapper)

    with (
        timed(BatchSource, "at", "batch"),
        timed(train, "build_micro_batch", "streams"),
        timed(attention, "dense_tiles", "attention masks"),
        timed(train, "step_record", "record"),
        timed(RunLog, "log", "log"),
    ):
        yield seconds
