"""Whether a configuration masks anything, and whether the target of the reconstruction goes with its loss, its head and
the layout. Each problem is a sentence with the numbers and what to do about them."""

from __future__ import annotations

import math
from collections.abc import Iterator

from laver_megatron.config.directories import CheckedEncoder
from laver_megatron.config.fields import Config
from laver_megatron.objective import schedules


def masking_problems(config: Config, encoder: CheckedEncoder | None) -> Iterator[str]:
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


def target_problems(config: Config, encoder: CheckedEncoder | None) -> Iterator[str]:
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
