"""Builds what a run trains: the stages of this rank, frozen parts, data parallelism and optimizer around them."""

from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from torch import Tensor

from laver_megatron.config.fields import Config
from laver_megatron.config.modules import MODULES
from laver_megatron.encoders import build_encoder, read_encoder
from laver_megatron.flops.encoder import BY_TOKENS, ImageCost, image_cost
from laver_megatron.hf.shape import ModelShape
from laver_megatron.model.image_division import sum_partial_gradients
from laver_megatron.model.laver import LaverStage
from laver_megatron.model.overlap import data_parallel_config, prepare_overlap
from laver_megatron.model.qwen import transformer_config
from laver_megatron.model.rates import group_overrides
from laver_megatron.runtime.cpu_kernels import fuse_weight_gradients
from laver_megatron.runtime.engine import data_parallel


def build_stages(
    config: Config,
    shape: ModelShape,
    encoder_dir: Path | None = None,
    *,
    load_encoder: bool = False,
    cost: ImageCost = BY_TOKENS,
) -> list[LaverStage]:
    """The pipeline stage of this rank, or its virtual stages under the interleaved schedule. Without encoder_dir
    the model is text only. cost: by which images are divided over tensor-parallel ranks."""
    megatron_config = transformer_config(config, shape)
    megatron_config.finalize_model_grads_func = finalise_gradients
    num_virtual = megatron_config.virtual_pipeline_model_parallel_size
    stages = []
    for vp_stage in range(num_virtual or 1):
        virtual = None if num_virtual is None else vp_stage
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=virtual)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=virtual)
        encoder = None
        if first and encoder_dir is not None:
            encoder = build_encoder(
                encoder_dir, config.model.encoder_feature_layer, megatron_config.params_dtype, load_weights=load_encoder
            )
        stage = LaverStage(
            config,
            shape,
            encoder,
            pre_process=first,
            post_process=last,
            vp_stage=virtual,
            megatron_config=megatron_config,
            image_cost=cost,
        )
        freeze(stage, config.model.freeze)
        stages.append(stage)
    return stages


def freeze(stage: LaverStage, parts: tuple[str, ...]) -> None:
    """Stops training of whole modules: `decoder` means the language model with its embedding and LM head,
    `heads` the vision head and [MASK]."""
    frozen = tuple(prefix for part in parts for prefix in MODULES[part])
    for name, parameter in stage.named_parameters():
        if name.startswith(frozen or ("\0",)):
            parameter.requires_grad_(False)


def finalise_gradients(model: list[torch.nn.Module], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    """Megatron's gradient reductions, without its division by tokens: the losses are divided already."""
    finalize_model_grads(model, None, **kwargs)
    # Afterwards, because the replicas may have begun their sums during the backward pass.
    for chunk in model:
        sum_partial_gradients(chunk.parameters(), parallel_state.get_tensor_model_parallel_group())


def wrap(config: Config, stages: list[LaverStage]) -> tuple[list[DistributedDataParallel], MegatronOptimizer]:
    """Megatron's data parallelism around the stages and its distributed optimizer over them."""
    training = config.training
    ddp_config = data_parallel_config(config)
    chunks = [data_parallel(stage, ddp_config, disable_bucketing=i > 0) for i, stage in enumerate(stages)]
    fuse_weight_gradients(stages)
    prepare_overlap(chunks)
    optimizer_config = OptimizerConfig(
        optimizer=training.optimizer,
        use_precision_aware_optimizer=training.use_precision_aware_optimizer,
        lr=training.lr,
        min_lr=training.min_lr,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_eps=training.adam_eps,
        clip_grad=training.clip_grad,
        bf16=training.bf16,
        params_dtype=stages[0].config.params_dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=ddp_config.overlap_param_gather,
    )
    overrides = group_overrides(optimizer_config, training)
    optimizer = get_megatron_optimizer(optimizer_config, chunks, overrides, use_gloo_process_groups=False)
    for part in optimizer.chained_optimizers:
        if not part.is_stub_optimizer:
            # Moments of 0 now and not at the first step: a run whose first steps are skipped can be saved, too.
            part.init_state_fn(part.optimizer, part.config)
            for group in part.optimizer.param_groups:
                group.setdefault("step", 0)
    return chunks, optimizer


def run_image_cost(config: Config, encoder_dir: Path) -> ImageCost:
    """By what a run divides images over the tensor-parallel ranks."""
    encoder = read_encoder(encoder_dir)
    return image_cost(encoder, encoder.num_layers_run(config.model.encoder_feature_layer))
