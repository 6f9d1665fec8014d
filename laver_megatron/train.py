"""Training LaVer, from the command line to the last checkpoint. Read top to bottom: the program, a step,
the loop; `trainer.py` builds what they work on.

Every process of torchrun runs this file. Megatron-Core carries the parallelism; this file says what happens.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from torch.profiler import record_function

from laver_megatron.checkpoint.directory import iteration_directory
from laver_megatron.checkpoint.parameter_counts import count_parameters
from laver_megatron.config.checks import check_run
from laver_megatron.config.command_line import from_command_line
from laver_megatron.config.fields import Config
from laver_megatron.data.batch.batches import GlobalBatch
from laver_megatron.model.laver import StageOutput
from laver_megatron.model.overlap import complete_parameters
from laver_megatron.model.streams import MicroBatch, build_micro_batch
from laver_megatron.model.visual_similarity import SimilarityCurve
from laver_megatron.objective import schedules
from laver_megatron.objective.micro_batch import TERMS, count_of, micro_batch_losses, weighted_sum
from laver_megatron.resilience import status
from laver_megatron.resilience.out_of_memory import OutOfMemory, explaining_memory
from laver_megatron.resilience.phases import enter, phase
from laver_megatron.resilience.run_lock import hold
from laver_megatron.resilience.signals import heed_signals, ignore_signals
from laver_megatron.resilience.skipped import note_skipped, remember_step, skip_reason
from laver_megatron.resilience.stop import StepEnd
from laver_megatron.resilience.watchdog import watched
from laver_megatron.run_log.answers import AnswerCounts
from laver_megatron.run_log.metrics import RunLog
from laver_megatron.run_log.profile import ProfileWindow
from laver_megatron.run_log.run_summary import VISUAL_SIMILARITY, make_summary, read_run_records, write_summary
from laver_megatron.run_log.step_record import advance, flops_of, step_record
from laver_megatron.run_log.tolerance import tolerating
from laver_megatron.run_log.utilisation import missing_peak
from laver_megatron.runtime.backend import hardware_of, shut_down_parallelism
from laver_megatron.runtime.files import write_text
from laver_megatron.runtime.gradient_norm import agreed_loss_and_norm
from laver_megatron.runtime.ranks import RaisedByAll
from laver_megatron.runtime.terminal import say
from laver_megatron.trainer import Trainer, setup


def main(argv: Sequence[str] | None = None) -> None:
    """The program: `torchrun examples/pretrain_laver.sh --config FILE.yaml [--any-field value]`."""
    run(check_run(from_command_line(argv)))


def run(config: Config) -> None:
    """Trains by a configuration that has been checked; ends the process with a message if that fails."""
    heed_signals(config.run.run_dir)
    lock = hold(Path(config.run.run_dir))
    try:
        with watched(config), explaining_memory(config):
            trainer = setup(config)
            train(trainer)
    except (ValueError, OSError, TrainingFailed, OutOfMemory) as error:
        # torchrun stops the other ranks; leaving the group in order would only wait for them.
        sys.exit(f"rank {os.environ.get('RANK', '0')}: error: {error} [{origin(error)}]")
    ignore_signals()
    for data in filter(None, (trainer.training_data, trainer.validation_data)):
        data.close()
    shut_down_parallelism()
    if lock:
        lock.release()


class TrainingFailed(RuntimeError):
    """The run cannot continue, for a reason other than the configuration."""


def origin(error: BaseException) -> str:
    """File and line of this package that an error comes from, in place of a traceback from every rank."""
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "laver_megatron" in frame.filename]
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else type(error).__name__


# --- one step ------------------------------------------------------------------------------------------


def run_schedule(
    trainer: Trainer,
    batch: GlobalBatch,
    *,
    forward_only: bool,
    losses: list[Tensor] | None = None,
    answers: AnswerCounts | None = None,
) -> Tensor:
    """Megatron-Core's pipeline schedule over the micro-batches of one global batch; gradients are complete
    afterwards. Returns TERMS of the global batch, the same on every rank, fp32 `[len(TERMS)]`.

    losses: gets this replica's loss of each micro-batch, on the last pipeline stage. answers: notes which labels are
    the likeliest words.
    """
    config = trainer.config
    tp_group = parallel_state.get_tensor_model_parallel_group()

    def forward_step(
        micro_batches: Iterator[tuple[MicroBatch, list[Tensor] | None]], chunk: DistributedDataParallel
    ) -> tuple[Tensor | StageOutput, Callable]:
        micro_batch, pixels = next(micro_batches)
        output = chunk(micro_batch, pixels)
        return output, partial(loss, micro_batch)

    def loss(micro_batch: MicroBatch, output: StageOutput) -> tuple[Tensor, Tensor, Tensor]:
        if answers is not None:  # first: the language loss may work in place on the logits
            answers.note(output.language_logits_RW, micro_batch.labels_R, tp_group)
        value, terms = micro_batch_losses(output, micro_batch, batch.counts, config.objective, trainer.centre, tp_group)
        # Megatron asks for a number of tokens to divide by; the losses are divided already.
        return value, torch.zeros((), dtype=torch.int32, device=value.device), terms

    # Before the schedule starts, so that the device waits for none of them; every chunk takes the same.
    micro_batches = [
        build_micro_batch(packs, masked, trainer.streams, trainer.backend.device)
        for packs, masked in zip(batch.packs, batch.masked, strict=True)
    ]
    pixels = batch.pixels if batch.pixels is not None else [None] * len(micro_batches)
    visual_tokens = 2 * config.data.visual_seq_length if config.objective.laver else 0
    reported = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(list(zip(micro_batches, pixels, strict=True))) for _ in trainer.chunks],
        model=trainer.chunks,
        num_microbatches=len(batch.packs),
        seq_length=config.data.seq_length + visual_tokens,
        micro_batch_size=config.data.micro_batch_size,
        forward_only=forward_only,
    )
    if losses is not None:
        losses.extend(of_micro_batch[TERMS.index("loss")] for of_micro_batch in reported)
    terms = torch.stack(reported).sum(0) if reported else torch.zeros(len(TERMS), device=trainer.backend.device)
    dist.all_reduce(terms, group=parallel_state.get_data_parallel_group())
    dist.broadcast(
        terms,
        src=parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    return terms


def train_step(trainer: Trainer) -> dict:
    """One iteration: data, losses and gradients, the student's update, the teacher's. Returns its record.

    If the loss or a gradient on any rank is not finite, or a spike (--spike-action), nothing changes on any rank:
    weights, optimizer, teacher and centre stay as they were. The step is counted as skipped, and `trainer.skipped` says
    why.

    Raises:
        RaisedByAll: a spike with --spike-action stop; the step is not counted.
    """
    config, step = trainer.config, trainer.progress.iteration
    started = time.perf_counter()
    trainer.skipped = None
    mask_ratio = schedules.mask_ratio(step, config.objective, config.training.train_iters)
    with phase("data"):
        batch = trainer.training_data.at(trainer.progress.consumed_packs, mask_ratio=mask_ratio, step=step)
    data_seconds = time.perf_counter() - started

    for chunk in trainer.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    losses: list[Tensor] = []
    terms = dict(zip(TERMS, run_schedule(trainer, batch, forward_only=False, losses=losses).tolist(), strict=True))

    learning_rate = schedules.learning_rate(step, config.training)
    grad_norm, reason = update_student(trainer, learning_rate, terms["loss"])
    skipped = bool(reason)
    momentum = schedules.ema_momentum(step, config.objective, config.training.train_iters)
    if (
        trainer.teacher is not None
        and not skipped
        and schedules.ema_update_due(step, config.objective, config.training.train_iters)
    ):
        trainer.teacher.update(momentum)
    if trainer.centre is not None:
        trainer.centre.finish_step(batch.counts.visual_tokens, parallel_state.get_data_parallel_group(), skipped)

    if skipped:
        note_skipped(trainer, reason, terms["loss"], grad_norm, batch.packs, losses)

    seconds = time.perf_counter() - started
    flops = flops_of(trainer.flops, batch.counts, config)
    progress = trainer.progress
    advance(progress, config, batch.counts, flops, seconds=seconds, data_seconds=data_seconds, skipped=skipped)
    return step_record(
        config,
        progress,
        batch.counts,
        trainer.flops,
        terms,
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        mask_ratio=mask_ratio,
        momentum=momentum,
        seconds=seconds,
        data_seconds=data_seconds,
        data_wait_seconds=trainer.training_data.wait_seconds,
        device=trainer.backend.device,
    )


@record_function("optimizer")
def update_student(trainer: Trainer, learning_rate: float, loss: float) -> tuple[float, str]:
    """Clips and applies the gradients unless something speaks against it, which all ranks agree on; returns the norm
    and the reason, empty where they are applied."""
    optimizer, settings = trainer.optimizer, trainer.config.reliability
    optimizer.prepare_grads()
    loss, grad_norm = agreed_loss_and_norm(optimizer, loss)
    if reason := skip_reason(loss, grad_norm, trainer.progress, settings):
        return grad_norm, reason
    remember_step(loss, grad_norm, trainer.progress, settings)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_mult"]
        group["weight_decay"] = trainer.config.training.weight_decay * group["wd_mult"]
    if trainer.config.training.clip_grad > 0:
        for part in optimizer.chained_optimizers:
            if not part.is_stub_optimizer and part.get_parameters():
                clip_grad_by_total_norm_fp32(
                    part.get_parameters(),
                    trainer.config.training.clip_grad,
                    grad_norm,
                    part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
                )
    optimizer.step_with_ready_grads()
    return grad_norm, ""


# --- the loop ------------------------------------------------------------------------------------------


def train(trainer: Trainer) -> None:
    """Runs to train_iters, or until asked to stop, validating, saving and logging on the way."""
    config, progress = trainer.config, trainer.progress
    run_dir = Path(config.run.run_dir)
    status.follow(progress)
    enter("step", progress.iteration)
    step_end = StepEnd(config)
    if progress.iteration >= config.training.train_iters:
        say(
            f"nothing to do: the run is at iteration {progress.iteration} of "
            f"--train-iters {config.training.train_iters}"
        )
        step_end.mark(progress.iteration)  # a run may have been killed just before it did
        return
    parameters = count_parameters(trainer.stages)
    log = open_log(trainer, run_dir)
    if unmeasured := missing_peak(config, trainer.backend.device):
        say(unmeasured)
    window = ProfileWindow(trainer)
    skipped_in_a_row = 0
    try:
        while progress.iteration < config.training.train_iters:
            with window.step(progress.iteration):
                entry = train_step(trainer)
            trainer.saver.publish_when_written()
            enter("step", progress.iteration)
            status.note(entry)
            if log:
                log.log(entry)
                log.log_skipped(trainer.skipped)
            skipped_in_a_row = skipped_in_a_row + 1 if trainer.skipped else 0
            if skipped_in_a_row >= config.training.max_skipped_iterations:
                finish_save_before_end(trainer)
                raise TrainingFailed(
                    f"{skipped_in_a_row} iterations in a row had a loss or gradient norm that is not finite, "
                    f"the last at iteration {progress.iteration}; lower --lr, look at the data, or raise "
                    "--max-skipped-iterations"
                )
            agreed = step_end.agree(progress.iteration)
            finished = progress.iteration == config.training.train_iters
            validating = due(progress.iteration, config.run.eval_interval) or (
                finished and config.run.eval_interval is not None
            )
            if validating and trainer.validation_data is not None:
                inspecting = due(progress.iteration, config.run.inspect_interval) or (
                    finished and config.run.inspect_interval is not None
                )
                result = inspect(trainer) if inspecting else evaluate(trainer)
                if log:
                    log.log_validation(progress.iteration, result)
            if agreed.stop or agreed.save or finished or due(progress.iteration, config.run.save_interval):
                window.close()
                save(trainer, last=finished or agreed.stop is not None)
                step_end.saved()
                summarise(trainer, run_dir, *parameters)
            if agreed.stop:
                say(f"exiting at iteration {progress.iteration}, {agreed.stop}")
                break
    except RaisedByAll:
        if log:
            log.log_skipped(trainer.skipped)
        save_before_end(trainer, run_dir)
        raise
    finally:
        trainer.saver.close()
        window.close()
        if log:
            log.close()
    step_end.mark(progress.iteration)


def due(iteration: int, interval: int | None) -> bool:
    return interval is not None and iteration % interval == 0


def open_log(trainer: Trainer, run_dir: Path) -> RunLog | None:
    """The run directory and its log, on rank 0 alone."""
    if dist.get_rank() != 0:
        return None
    config = trainer.config
    run_dir.mkdir(parents=True, exist_ok=True)
    with tolerating("config.yaml", run_dir, "checkpoints have the configuration, too"):
        write_text(run_dir / "config.yaml", config.to_yaml())
    return RunLog(
        run_dir,
        train_iters=config.training.train_iters,
        log_interval=config.run.log_interval,
        tensorboard=config.run.tensorboard,
        wandb_project=config.run.wandb_project,
        resume_iteration=trainer.progress.iteration,
        config_dict=config.flat(),
    )


@phase("validate")
@torch.no_grad()
def evaluate(trainer: Trainer) -> dict:
    """Losses on held-out packs, always the same ones, masked as at the end of the schedule."""
    assert trainer.validation_data is not None
    started = time.perf_counter()
    config = trainer.config
    for chunk in trainer.chunks:
        chunk.eval()
    # Every term is a mean over its own count, so batches weigh by that count.
    totals = dict.fromkeys(TERMS, 0.0)
    weights = dict.fromkeys(TERMS, 0)
    answers = AnswerCounts(trainer.backend.device)
    for i in range(config.run.eval_iters):
        with phase("data"):
            batch = trainer.validation_data.at(
                i * config.data.global_batch_size, mask_ratio=config.objective.mask_ratio, step=0
            )
        terms = run_schedule(trainer, batch, forward_only=True, answers=answers).tolist()
        answers.add(batch.packs)
        for name, value in zip(TERMS, terms, strict=True):
            weight = count_of(name, batch.counts)
            totals[name] += value * weight
            weights[name] += weight
    result = {name: totals[name] / max(weights[name], 1) for name in TERMS}
    losses = result["lm_loss"], result["mim_loss"], result["gram_loss"]
    result["loss"] = weighted_sum(*losses, config.objective)
    if not config.objective.laver:
        result = {"loss": result["loss"], "lm_loss": result["lm_loss"]}
    return {**result, **answers.accuracies(), "elapsed_seconds": time.perf_counter() - started}


def inspect(trainer: Trainer) -> dict:
    """`evaluate`, and how alike the visual tokens of an image are after each decoder layer."""
    curve = SimilarityCurve(trainer.stages)
    with curve.collecting():
        result = evaluate(trainer)
    by_layer = curve.result()
    return result if by_layer is None else {**result, VISUAL_SIMILARITY: by_layer}


@phase("save")
def save(trainer: Trainer, *, last: bool = True) -> None:
    """A checkpoint of everything, under run_dir/checkpoints. last: it is on the disk when this returns; else it may be
    written while training goes on."""
    complete_parameters(trainer.chunks)
    trainer.progress.data_mark = trainer.training_data.mark(trainer.progress.consumed_packs)
    trainer.saver.save(trainer.state, last=last)


def save_before_end(trainer: Trainer, run_dir: Path) -> None:
    """A checkpoint of the last whole step before an error of all ranks ends the run, unless there is one. What prevents
    it is said, and hides no error."""
    finish_save_before_end(trainer)  # it may be the one that is wanted
    iteration = trainer.progress.iteration
    there = [iteration == 0 or iteration_directory(run_dir / "checkpoints", iteration).is_dir()]
    dist.broadcast_object_list(there, src=0)
    if there[0]:
        return
    try:
        save(trainer)
    except (ValueError, OSError) as error:
        say(f"iteration {iteration} could not be saved before the end: {error}")


def finish_save_before_end(trainer: Trainer) -> None:
    """Waits for a checkpoint that is on its way to the disk, where an error of all ranks is to end the run. What
    prevents it is said, and hides no error."""
    try:
        trainer.saver.publish()
    except (ValueError, OSError) as error:
        say(f"the checkpoint that was being written is lost: {error}")


def summarise(trainer: Trainer, run_dir: Path, parameters: dict[str, int], num_teacher_parameters: int) -> None:
    """The run's summary for scaling studies, on rank 0."""
    if dist.get_rank() != 0:
        return
    with tolerating("run_summary.json", run_dir, "the next checkpoint writes it again"):
        hardware, records = hardware_of(trainer.backend), read_run_records(run_dir)
        summary = make_summary(
            trainer.config,
            trainer.progress,
            parameters,
            num_teacher_parameters,
            hardware,
            *records,
            goodput=status.goodput(),
        )
        write_summary(run_dir, summary)


if __name__ == "__main__":
    main()
