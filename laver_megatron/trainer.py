"""What a run is built of, on one rank, and how it is put together: parallel groups, data, model, optimizer, teacher,
and the state that it begins with."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from laver_megatron.checkpoint.progress import Progress
from laver_megatron.checkpoint.saver import Saver
from laver_megatron.checkpoint.state import TrainingState, whole_problem
from laver_megatron.config.fields import Config
from laver_megatron.data.batch.batches import BatchSource
from laver_megatron.data.batch.packing import PackBatch, image_grids
from laver_megatron.data.batch.run_data import open_data
from laver_megatron.encoders import read_encoder, with_target_size
from laver_megatron.flops.encoder import window_area
from laver_megatron.flops.step import ModelFlops, run_flops
from laver_megatron.hf.shape import read_model_shape
from laver_megatron.model.build import build_stages, run_image_cost, wrap
from laver_megatron.model.laver import LaverStage
from laver_megatron.model.qwen import num_virtual_stages
from laver_megatron.model.streams import StreamSettings, span_areas
from laver_megatron.model.teacher import Centre, TeacherAverage
from laver_megatron.objective.schedules import rates_of_parts
from laver_megatron.resilience.limits import collective_timeout_minutes
from laver_megatron.run_log.records import validation_losses
from laver_megatron.runtime.backend import (
    Backend,
    initialise_parallelism,
    join_process_group,
    use_backend,
)
from laver_megatron.runtime.ranks import gathered
from laver_megatron.runtime.terminal import log_to_terminal, say
from laver_megatron.start import FromCheckpoint, Start, find_start


@dataclass
class Trainer:
    """Everything a step needs, on one rank. skipped: the record of the last step if it was not applied."""

    config: Config
    backend: Backend
    stages: list[LaverStage]
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    teacher: TeacherAverage | None
    centre: Centre | None
    streams: StreamSettings
    training_data: BatchSource
    validation_data: BatchSource | None
    flops: ModelFlops
    model_dir: Path
    encoder_dir: Path
    progress: Progress
    saver: Saver
    skipped: dict[str, Any] | None = None

    @property
    def state(self) -> TrainingState:
        return TrainingState(self.stages, self.optimizer, self.teacher, self.centre, self.progress)


def setup(config: Config) -> Trainer:
    """Opens the data, builds this rank's stages, optimizer and teacher, and fills them from where the run starts."""
    backend = use_backend()
    log_to_terminal()
    timeout_minutes = collective_timeout_minutes(config)
    join_process_group(timeout_minutes)
    start = agree_on_start(config)
    model_dir, encoder_dir = start.model_dir, start.encoder_dir
    assert model_dir is not None and encoder_dir is not None, "validation lets no such run pass"
    shape = read_model_shape(model_dir)
    encoder = read_encoder(encoder_dir)
    config = with_target_size(config, encoder)
    config = config.replace(encoder_feature_layer=encoder.feature_layer(config.model.encoder_feature_layer))
    initialise_parallelism(
        tensor_model_parallel_size=config.parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=num_virtual_stages(config, shape.num_layers),
        timeout_minutes=timeout_minutes,
        seed=config.training.seed,
    )
    config, reader, validation_reader = open_data(start.with_data_settings(config), model_dir, encoder_dir)
    streams = StreamSettings.of(config, shape)
    dtype = torch.bfloat16 if config.training.bf16 else torch.float32

    def areas(packs: PackBatch) -> tuple[int, int, int]:
        return *span_areas(packs, streams), window_area(image_grids(packs), encoder.window_tokens)

    cost = run_image_cost(config, encoder_dir)
    training_data = BatchSource(config, reader, areas, dtype, backend.device, cost)
    validation_data = None
    if config.data.valid_data_path:
        validation_data = BatchSource(config, validation_reader, areas, dtype, backend.device, cost)
    stages = build_stages(config, shape, encoder_dir, load_encoder=not start.brings_encoder, cost=cost)
    for stage in stages:
        stage.initialise_new_parts(config.training.seed)
    chunks, optimizer = wrap(config, stages)
    teacher = centre = None
    if config.objective.laver:
        teacher = TeacherAverage(stages, optimizer, parallel_state.get_data_parallel_group())
        if config.objective.centre_momentum is not None and stages[-1].post_process:
            num_logits = stages[-1].vision_head.linear_3.output_size_per_partition
            centre = Centre(num_logits, config.objective.centre_momentum, backend.device)
    trainer = Trainer(
        config=config,
        backend=backend,
        stages=stages,
        chunks=chunks,
        optimizer=optimizer,
        teacher=teacher,
        centre=centre,
        streams=streams,
        training_data=training_data,
        validation_data=validation_data,
        flops=run_flops(config, shape, encoder),
        model_dir=model_dir,
        encoder_dir=encoder_dir,
        progress=Progress(data_fingerprint=training_data.fingerprint),
        saver=make_saver(config, model_dir, encoder_dir),
    )
    start.fill(trainer.state, config)
    progress = trainer.progress
    training_data.resume_from(progress.data_mark, progress.consumed_samples, progress.bad_samples)
    verb = "resuming" if start.is_own else "starting"
    when = "during" if chunks[0].ddp_config.overlap_grad_reduce else "after"
    say(
        f"{verb} from {start.directory} at iteration {progress.iteration}; attention kernel {streams.kernel}; "
        f"gradients reduced {when} the backward pass"
    )
    if rates := rates_of_parts(config.training):
        named = ", ".join(f"{part} {rate}" for part, rate in rates.items())
        say(f"learning rates: {config.training.lr}, but {named}")
    for message in start.messages(config, progress.iteration):
        say(message)
    return trainer


def make_saver(config: Config, model_dir: Path, encoder_dir: Path) -> Saver:
    """What writes the run's checkpoints."""
    run_dir = Path(config.run.run_dir)
    losses = partial(validation_losses, run_dir)
    return Saver(run_dir / "checkpoints", model_dir, encoder_dir, config.flat(), config.reliability, losses)


def agree_on_start(config: Config) -> Start:
    """`find_start` of all ranks together, which compare the checksums of all files of a checkpoint before anything is
    read from it, and go back to an older one together. Call when the process group stands.

    Raises:
        ConfigError: as `find_start` does.
        ValueError: the ranks see different checkpoints.
    """
    damaged: dict[Path, str] = {}
    while True:
        start = find_start(config, damaged)
        seen = gathered(str(start.directory))
        if other := next((number for number, path in enumerate(seen) if path != seen[0]), None):
            raise ValueError(
                f"rank 0 would start from {seen[0]}, rank {other} from {seen[other]}: "
                f"is {config.run.run_dir} on a file system that all machines share?"
            )
        if not isinstance(start, FromCheckpoint):
            return start
        if not (problem := whole_problem(start.checkpoint)):
            return start
        damaged[start.checkpoint] = problem
