"""Whether a configuration can run at all, found out before anything is allocated, all problems at once.

Each check yields sentences with the numbers and what to do about them. Those of the layout, the objective, learning
rates, Megatron-Core's options, and files and directories are in the modules beside this one.
"""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from collections.abc import Iterator, Sequence

from laver_megatron.config.capabilities import Capabilities, find_capabilities
from laver_megatron.config.command_line import Invocation, exit_on_config_error
from laver_megatron.config.continuity import continuity_problems
from laver_megatron.config.directories import (
    CheckedEncoder,
    encoder_problems,
    model_problems,
    run_dir_problems,
    shard_problems,
)
from laver_megatron.config.engine_checks import engine_problems
from laver_megatron.config.fields import Config, ConfigError, all_fields
from laver_megatron.config.layout_checks import layout_problems, num_replicas
from laver_megatron.config.objective_checks import masking_problems, target_problems
from laver_megatron.config.rate_checks import rate_problems
from laver_megatron.hf.shape import ModelShape
from laver_megatron.objective import schedules
from laver_megatron.start import find_start

MOST_PROFILED = 20  # iterations


def check_run(invocation: Invocation) -> Config:
    """What training does with its command line before it starts: the configuration, if it can run on this machine.
    Problems end the process with exit code 2."""
    import torch  # here, because the planner, which shares these checks, needs none

    with exit_on_config_error():
        if invocation.dry_run:
            raise ConfigError(["--dry-run is the launcher's: examples/pretrain_laver.sh or `laver dry-run`"])
        check(invocation, on_cuda=torch.cuda.is_available())
    return invocation.config


def check(invocation: Invocation, *, on_cuda: bool | None = None) -> ModelShape:
    """Checks everything: numbers, directories and, unless it is a dry run, weights and shards.

    on_cuda: whether the run will be on GPUs; None leaves out what depends on it. Returns the model's shape.

    Raises:
        ConfigError: all problems found. Nothing has been written.
    """
    config, dry_run = invocation.config, invocation.dry_run
    model_shape = encoder = None
    problems: list[str] = []
    try:
        start = find_start(config)
    except ConfigError as error:
        problems += error.problems
    else:
        model_shape, of_model = model_problems(config, start)
        encoder, of_encoder = encoder_problems(config, start, dry_run=dry_run)
        problems += [*start.problems(config, dry_run=dry_run), *of_model, *of_encoder]
        problems += continuity_problems(
            config, start, model_shape.hidden_size if model_shape else None, encoder.shape if encoder else None
        )
    if not dry_run:
        problems += shard_problems(config)
        problems += missing_packages(config.run.tensorboard, config.run.wandb_project)
    problems += run_dir_problems(config)
    machine = None if on_cuda is None else find_capabilities(on_cuda)
    processes = invocation.world_size()
    problems += validate(config, model_shape, processes, encoder=encoder, capabilities=machine)
    if problems:
        # A directory that serves twice is reported once.
        raise ConfigError(list(dict.fromkeys(problems)))
    assert model_shape is not None
    return model_shape


def validate(
    config: Config,
    model_shape: ModelShape | None,
    world_size: int,
    *,
    encoder: CheckedEncoder | None = None,
    capabilities: Capabilities | None = None,
) -> list[str]:
    """All that is wrong with the numbers, an empty list if nothing is. What needs a shape that is not given
    is left out; capabilities None leave out what depends on the machine."""
    problems = [*_range_problems(config), *rate_problems(config)]
    problems += engine_problems(config, capabilities, model_shape, num_replicas(config, world_size))
    problems += _training_problems(config, encoder)
    problems += layout_problems(config, model_shape, world_size, encoder.shape if encoder else None)
    if encoder is not None:
        problems += _encoder_problems(config, encoder)
    return [*problems, *masking_problems(config, encoder), *target_problems(config, encoder)]


def describe_run(config: Config, shape: ModelShape, world_size: int) -> str:
    """One line for people: the model, and how the processes divide the work."""
    tp, pp = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    dp = world_size // (tp * pp)
    num_micro_batches = config.data.global_batch_size // (config.data.micro_batch_size * dp)
    return (
        f"{shape.num_layers} layers of width {shape.hidden_size}; {world_size} processes as TP {tp} x PP {pp} x "
        f"DP {dp}; {num_micro_batches} micro-batches an iteration; {config.training.train_iters} iterations"
    )


def missing_packages(tensorboard: bool, wandb_project: str | None) -> list[str]:
    """One sentence for each logging package that is asked for and not installed; imports nothing."""
    asked = [("tensorboard", tensorboard, "--tensorboard"), ("wandb", bool(wandb_project), "--wandb-project")]
    return [
        f"{flag} needs the package {name}: pip install 'laver_megatron[log]'"
        for name, wanted, flag in asked
        if wanted and importlib.util.find_spec(name) is None
    ]


def _range_problems(config: Config) -> Iterator[str]:
    training = config.training
    values = config.flat()
    for name, item in all_fields().items():
        value, valid = values[name], item.metadata["range"]
        if valid is not None and value is not None and not valid.holds(value):
            yield f"{name} is {value}, but {valid.rule}"
        if item.metadata["choices"] and isinstance(value, tuple):
            twice = {one: count for one, count in Counter(value).items() if count > 1}
            yield from (f"{name} names {one} {count} times; name it once" for one, count in twice.items())
    interval = config.objective.ema_interval
    if not (0 < interval < 1 or (interval >= 1 and float(interval).is_integer())):
        yield f"ema_interval is {interval}, but must be whole iterations or a share between 0 and 1"
    elif (
        config.objective.laver
        and training.train_iters >= 1
        and schedules.ema_interval_steps(config.objective, training.train_iters) > training.train_iters
    ):
        yield (
            f"ema_interval {interval} is above train_iters {training.train_iters}: the teacher would never move; use "
            f"at most {training.train_iters} (or say so with --ema-momentum 1)"
        )


def _training_problems(config: Config, encoder: CheckedEncoder | None) -> Iterator[str]:
    data, objective = config.data, config.objective
    has_visual_loss = objective.mim_weight > 0 or (objective.gram_weight > 0 and objective.gram_loss != "none")
    trainable = ["encoder"] * (encoder is None or encoder.shape.has_weights) + ["connector", "decoder"]
    trainable += ["heads"] * (objective.laver and has_visual_loss)
    if set(config.model.freeze) >= set(trainable):
        without = "" if "heads" in trainable else " (without a visual loss the heads learn nothing)"
        yield f"freeze names all of {', '.join(trainable)}: nothing is left to train{without}"
    if config.start.finetune and config.start.load is None:
        yield "finetune takes the weights of --load, but load is not given"
    if data.data_weights is not None:
        yield from _weight_problems(data.data_weights, data.data_path)
    start, end = config.run.profile_step_start, config.run.profile_step_end
    train_iters = config.training.train_iters
    if start >= end:
        yield f"profile_step_start {start} must be below profile_step_end {end}, the last iteration that is profiled"
    elif end - start > MOST_PROFILED:
        yield (
            f"profile_step_start {start} and profile_step_end {end} profile {end - start} iterations, whose events are "
            f"held in memory; use at most {MOST_PROFILED}, such as --profile-step-end {start + MOST_PROFILED}"
        )
    elif config.run.profile and start >= train_iters:
        yield f"profile_step_start {start} must be below train_iters {train_iters}, or nothing is profiled"
    if config.run.eval_interval is not None and data.valid_data_path is None:
        yield f"eval_interval is {config.run.eval_interval}, but there is no valid_data_path to evaluate on"
    inspects, evaluates = config.run.inspect_interval, config.run.eval_interval
    if inspects is not None and evaluates is None:
        yield f"inspect_interval is {inspects}, but nothing is validated; set eval_interval, of which it is a multiple"
    elif inspects is not None and evaluates is not None and inspects % evaluates:
        yield f"inspect_interval {inspects} must be a multiple of eval_interval, which is {evaluates}"


def _weight_problems(weights: Sequence[float], paths: Sequence[str]) -> Iterator[str]:
    if len(weights) != len(paths):
        yield f"data_weights has {len(weights)} numbers, but data_path {len(paths)} entries; give one for each"
    wrong = [weight for weight in weights if not (math.isfinite(weight) and weight >= 0)]
    if wrong:
        yield f"data_weights holds {wrong[0]}; each must be a finite number, at least 0"
    elif not any(weights):
        yield "data_weights are all 0: there is nothing to train on"


def _encoder_problems(config: Config, encoder: CheckedEncoder) -> Iterator[str]:
    data = config.data
    try:
        encoder.shape.feature_layer(config.model.encoder_feature_layer)
    except ValueError as error:
        yield str(error)
    num_tokens = encoder.most_image_tokens
    # Of native resolution, pictures may be smaller than the largest; samples that do not fit are left out and counted.
    if num_tokens is None or (encoder.shape.is_native and data.max_image_tokens is None):
        return
    remedy = "; lower max_image_tokens or raise it" if encoder.shape.is_native else ""
    if 0 < data.visual_seq_length < num_tokens:
        yield f"visual_seq_length {data.visual_seq_length} cannot hold one image of {num_tokens} tokens{remedy}"
    # The start and end token, and one token of text to learn.
    if data.seq_length < num_tokens + 3:
        yield (
            f"seq_length {data.seq_length} cannot hold one image of {num_tokens} tokens with its start, "
            f"its end and any text; use {num_tokens + 3} at the very least{remedy}"
        )
