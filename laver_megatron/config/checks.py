"""Whether a configuration can run at all, found out before anything is allocated, all problems at once.

Each check yields sentences with the numbers and what to do about them. The checks of this file are
arithmetic; those of files and directories are in `directories.py`.
"""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

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
from laver_megatron.config.rate_checks import rate_problems
from laver_megatron.encoders import with_target_size
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
    problems += engine_problems(config, capabilities, model_shape, _num_replicas(config, world_size))
    problems += _training_problems(config, encoder)
    if _layout_is_countable(config):
        problems += world_problems(config, world_size)
        problems += sequence_problems(config)
        if model_shape is not None:
            problems += _tensor_parallel_problems(config, model_shape, encoder)
            problems += _pipeline_problems(config, model_shape)
            problems += _position_problems(config, model_shape)
    if encoder is not None:
        problems += _encoder_problems(config, encoder)
    return [*problems, *_masking_problems(config, encoder), *_target_problems(config, encoder)]


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


def _layout_is_countable(config: Config) -> bool:
    parallel, data = config.parallel, config.data
    sizes = (
        parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, data.micro_batch_size,
        data.global_batch_size, data.seq_length, config.objective.vision_head_hidden_size,
        parallel.num_layers_per_virtual_pipeline_stage, config.objective.vision_head_output_size,
    )  # fmt: skip
    return all(size is None or size >= 1 for size in sizes) and data.visual_seq_length >= 0


def _num_replicas(config: Config, world_size: int) -> int | None:
    """Data-parallel replicas; None where the processes do not divide."""
    ranks = config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size
    return world_size // ranks if ranks > 0 and world_size % ranks == 0 else None


def world_problems(config: Config, world_size: int) -> Iterator[str]:
    """Why so many processes cannot share the work."""
    parallel, data = config.parallel, config.data
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if world_size % (tp * pp):
        yield (
            f"{world_size} processes cannot be divided into TP {tp} x PP {pp} = {tp * pp}; start a multiple "
            f"of {tp * pp}, or change --tensor-model-parallel-size or --pipeline-model-parallel-size"
        )
        return
    dp = world_size // (tp * pp)
    packs_at_once = data.micro_batch_size * dp
    if data.global_batch_size % packs_at_once:
        yield (
            f"global_batch_size {data.global_batch_size} is not a multiple of micro_batch_size "
            f"{data.micro_batch_size} x {dp} data-parallel replicas = {packs_at_once}"
        )
        return
    num_micro_batches = data.global_batch_size // packs_at_once
    if parallel.num_layers_per_virtual_pipeline_stage is not None and num_micro_batches % pp:
        yield (
            f"the interleaved schedule needs a multiple of {pp} (pipeline_model_parallel_size) "
            f"micro-batches, but an iteration has {num_micro_batches}; use a global_batch_size that is a "
            f"multiple of {packs_at_once * pp}"
        )


def sequence_problems(config: Config) -> Iterator[str]:
    """What is wrong with the lengths of the sequences, and how sequence parallelism splits them."""
    tp, seq, visual = config.parallel.tensor_model_parallel_size, config.data.seq_length, config.data.visual_seq_length
    if visual > seq:
        yield f"visual_seq_length {visual} is above seq_length {seq}: visual tokens are part of the sequence"
    if not config.parallel.sequence_parallel:
        return
    if tp == 1:
        yield "sequence_parallel needs tensor_model_parallel_size above 1; use --no-sequence-parallel"
    streams = {"seq_length": seq}
    # A proposed visual_seq_length is a multiple of the ranks.
    if config.objective.laver and visual:
        streams = {"seq_length + visual_seq_length": seq + visual, "visual_seq_length": visual}
    for name, length in streams.items():
        if length % tp:
            rest = f"{length} % {tp} = {length % tp}"
            yield f"sequence_parallel splits {name} = {length} between {tp} ranks, but {rest}"


def decoder_sizes(shape: ModelShape) -> dict[str, int]:
    """What tensor parallelism divides of the decoder, by a phrase for messages."""
    return {
        f"the model's {shape.num_attention_heads} attention heads": shape.num_attention_heads,
        f"its vocabulary of {shape.vocab_size}": shape.vocab_size,
        f"its ffn_hidden_size {shape.ffn_hidden_size}": shape.ffn_hidden_size,
    }


def tensor_parallel_faults(divided: Mapping[str, int], num_query_groups: int, tp: int) -> list[str]:
    """What keeps sizes and key/value heads from being divided over `tp` ranks; empty if nothing does."""
    faults = [f"does not divide {name}" for name, value in divided.items() if value % tp]
    if num_query_groups % tp and tp % num_query_groups:
        faults.append(f"neither divides nor is a multiple of its {num_query_groups} key/value heads")
    return faults


def _tensor_parallel_problems(config: Config, shape: ModelShape, encoder: CheckedEncoder | None) -> Iterator[str]:
    objective = (config if encoder is None else with_target_size(config, encoder.shape)).objective
    tp = config.parallel.tensor_model_parallel_size
    divided = decoder_sizes(shape)
    if objective.laver:
        output_size = objective.vision_head_output_size or shape.hidden_size
        divided[f"vision_head_hidden_size {objective.vision_head_hidden_size}"] = objective.vision_head_hidden_size
        divided[f"the vision head's {output_size} logits"] = output_size
    if faults := tensor_parallel_faults(divided, shape.num_query_groups, tp):
        candidates = range(1, shape.num_attention_heads + 1)
        fits = [size for size in candidates if not tensor_parallel_faults(divided, shape.num_query_groups, size)]
        sizes = ", ".join(map(str, fits))
        yield f"tensor_model_parallel_size {tp} {', '.join(faults)}; sizes that fit this model: {sizes}"


def _pipeline_problems(config: Config, shape: ModelShape) -> Iterator[str]:
    parallel = config.parallel
    pp, layers = parallel.pipeline_model_parallel_size, shape.num_layers
    per_chunk = parallel.num_layers_per_virtual_pipeline_stage
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    if first is not None or last is not None:
        yield from _uneven_split_problems(pp, layers, first, last, per_chunk)
    elif layers % pp:
        fits = ", ".join(str(size) for size in range(1, layers + 1) if layers % size == 0)
        yield (
            f"the model's {layers} layers do not divide into {pp} pipeline stages; use {fits} stages, or say "
            "how to split them: --decoder-first-pipeline-num-layers, --decoder-last-pipeline-num-layers"
        )
    elif per_chunk is not None:
        per_stage = layers // pp
        fits = ", ".join(str(size) for size in range(1, per_stage) if per_stage % size == 0) or "none"
        if pp == 1:
            yield (
                f"num_layers_per_virtual_pipeline_stage {per_chunk} needs pipeline_model_parallel_size "
                "above 1: one stage has nothing to interleave with"
            )
        elif per_stage % per_chunk or per_stage == per_chunk:
            yield (
                f"num_layers_per_virtual_pipeline_stage {per_chunk} does not cut the {per_stage} layers of a "
                f"stage ({layers} layers, {pp} stages) into equal chunks, at least two; use {fits}"
            )


def _uneven_split_problems(
    pp: int, layers: int, first: int | None, last: int | None, per_chunk: int | None
) -> Iterator[str]:
    if per_chunk is not None:
        yield "num_layers_per_virtual_pipeline_stage and an uneven split of the layers exclude each other"
    if pp == 1:
        yield "an uneven split of the layers needs pipeline_model_parallel_size above 1"
        return
    split = f"first {first}" if last is None else f"last {last}" if first is None else f"first {first}, last {last}"
    rest = layers - (first or 0) - (last or 0)
    stages = pp - (first is not None) - (last is not None)
    if stages == 0 and rest:
        covered = layers - rest
        yield f"the uneven split ({split}) covers {covered} of the model's {layers} layers, with {pp} stages"
    elif stages and (rest < stages or rest % stages):
        yield (
            f"the uneven split ({split}) leaves {rest} of the model's {layers} layers for {stages} other "
            "pipeline stages; they must divide equally, one layer each at least"
        )


def _position_problems(config: Config, shape: ModelShape) -> Iterator[str]:
    if config.data.seq_length > shape.max_position_embeddings:
        yield (
            f"seq_length {config.data.seq_length} is above the model's max_position_embeddings "
            f"{shape.max_position_embeddings}: it has not learnt positions beyond; shorten the packs"
        )
    if shape.kv_channels % 2:
        yield f"the model's heads are {shape.kv_channels} wide; rotary positions need an even width"


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


def _masking_problems(config: Config, encoder: CheckedEncoder | None) -> Iterator[str]:
    """A mask ratio that never masks: judged where the schedule is highest, at the last step."""
    objective, training = config.objective, config.training
    ratio = objective.mask_ratio
    if not objective.laver or objective.mim_weight <= 0 or not 0 <= ratio <= 1 or training.train_iters < 1:
        return
    last = schedules.mask_ratio(training.train_iters - 1, objective, training.train_iters)
    if ratio == 0:
        yield (
            "mask_ratio 0 never masks a token, so there is nothing to reconstruct; raise it, or set "
            "--mim-weight 0 or --no-laver"
        )
    elif last == 0:
        yield "mask_ratio_schedule cosine starts at 0 and train_iters 1 ends there: nothing is masked; use constant"
    elif objective.mask_sampling == "fixed" and encoder is not None and encoder.most_image_tokens:
        yield from _fixed_masking_problems(config, encoder.most_image_tokens, last)
    elif objective.mask_sampling == "bernoulli" and _expects_no_masked_token(config):
        yield (
            f"mask_ratio {ratio} masks less than one token in all {training.train_iters} iterations, even if every "
            f"pack held {_most_visual_tokens(config)} visual tokens; raise it, or set --mim-weight 0 or --no-laver"
        )


def _target_problems(config: Config, encoder: CheckedEncoder | None) -> Iterator[str]:
    """Targets of reconstruction that do not go with the loss, the vision head, the centre or the layout."""
    objective, stages = config.objective, config.parallel.pipeline_model_parallel_size
    target, size = objective.mim_target, objective.vision_head_output_size
    if not objective.laver:
        return
    if target != "latent" and objective.mim_loss == "cross-entropy":
        yield (
            f"mim_loss cross-entropy compares two distributions, but mim_target {target} is none; use --mim-loss "
            "smooth-l1, or --mim-target latent"
        )
    elif objective.reconstruction_loss == "smooth-l1" and objective.centre_momentum is not None:
        yield (
            f"centre_momentum {objective.centre_momentum} is of the distribution that mim_loss cross-entropy compares, "
            "but mim_loss is smooth-l1; use --centre-momentum none"
        )
    if target != "latent" and stages > 1:
        yield (
            f"mim_target {target} is made on the first pipeline stage and needed on the last, but "
            f"pipeline_model_parallel_size is {stages}; use 1 (tensor and data parallelism work) or --mim-target latent"
        )
    needed = None if encoder is None else encoder.shape.target_size(target)
    if needed is not None and size not in (None, needed):
        yield (
            f"vision_head_output_size is {size}, but mim_target {target} has {needed} numbers for a visual token of "
            "this encoder; leave it out"
        )


def _fixed_masking_problems(config: Config, num_tokens: int, last: float) -> Iterator[str]:
    objective = config.objective
    from laver_megatron.objective.masking import num_masked_tokens  # here, because the planner needs no torch

    if num_masked_tokens(num_tokens, last) > 0:
        return
    at_the_end = "" if last == objective.mask_ratio else f" even in the last iteration, at {last:.4g}"
    least = math.ceil(1e4 * objective.mask_ratio / last / num_tokens) / 1e4
    remedy = f"use at least {least}, or bernoulli" if least <= 1 else "use --mask-ratio-schedule constant"
    yield (
        f"mask_ratio {objective.mask_ratio} with mask_sampling fixed masks floor({last:.4g} x {num_tokens}) = 0 of an "
        f"image's {num_tokens} tokens{at_the_end}; {remedy}"
    )


def _most_visual_tokens(config: Config) -> int:
    """What a pack can hold at most, also where the data will decide."""
    data = config.data
    return data.visual_seq_length if data.visual_seq_length > 0 else data.seq_length


def _expects_no_masked_token(config: Config) -> bool:
    """Whether the expected number of masked tokens of the whole run is below one, with packs full of them."""
    tokens_per_step = config.data.global_batch_size * _most_visual_tokens(config)
    expected = 0.0
    for step in reversed(range(config.training.train_iters)):  # the schedule is highest at the end
        expected += tokens_per_step * schedules.mask_ratio(step, config.objective, config.training.train_iters)
        if expected >= 1:
            return False
    return True
