"""Communication of data parallelism beside the computation: gradients reduced during the backward pass, parameters
gathered during the forward pass.

Megatron-Core does both bucket by bucket, in the order in which parameters are used, and takes for granted that every
parameter is used in every step by every rank. The image encoder's are not: a rank whose packs hold no image runs
without it. Buckets with such parameters are therefore reduced after the backward pass and gathered at the beginning of
the forward pass, on all ranks alike; otherwise the order of the collectives would differ between the ranks.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from laver_megatron.config.engine_checks import overlaps
from laver_megatron.config.fields import Config
from laver_megatron.config.modules import MODULES

# Parameters without a gradient where a micro-batch holds no image.
_USED_BY_IMAGES = (*MODULES["encoder"], *MODULES["connector"], "mask_token")


def data_parallel_config(config: Config) -> DistributedDataParallelConfig:
    """Megatron-Core's configuration of data parallelism."""
    num_replicas = parallel_state.get_data_parallel_world_size()
    reduces, gathers = overlaps(config, on_cuda=torch.cuda.is_available(), num_replicas=num_replicas)
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=reduces,
        overlap_param_gather=gathers,
        bucket_size=config.engine.ddp_bucket_size,
        check_for_nan_in_grad=False,
    )


def prepare_overlap(chunks: Sequence[DistributedDataParallel]) -> None:
    """What Megatron-Core's training loop sets for the schedules, and the order of buckets (see above)."""
    ddp_config = chunks[0].ddp_config
    _count_padding(chunks)
    if ddp_config.overlap_grad_reduce:
        contexts = [chunk.no_sync for chunk in chunks]
        # Gradients are complete in the last micro-batch.
        chunks[0].config.no_sync_func = contexts if len(contexts) > 1 else contexts[0]
    for chunk in chunks:
        late = _late_groups(chunk)
        if ddp_config.overlap_grad_reduce:
            for group in late:
                # A group that never counts its gradients is reduced when the backward pass is over.
                group.register_grad_ready = _count_nothing
        if ddp_config.overlap_param_gather:
            chunk.module.register_forward_pre_hook(_Gather(late))


def _count_padding(chunks: Sequence[DistributedDataParallel]) -> None:
    """Makes the padding at the end of a bucket part of it.

    Megatron-Core's optimizer reads its state for a checkpoint from a copy of the buffer without this padding, but at
    the places of the buffer with it: what lies behind a padded bucket would be saved shifted (its warning: "param range
    exceeds unpadded buffer").
    """
    for buffer in (buffer for chunk in chunks for buffer in chunk.buffers):
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()
        buffer.numel_unpadded = buffer.numel


def _late_groups(chunk: DistributedDataParallel) -> list[Any]:
    """The bucket groups of a chunk with a parameter that not every rank uses, the first to be gathered first."""
    late = [
        parameter
        for name, parameter in chunk.module.named_parameters()
        if parameter.requires_grad and name.startswith(_USED_BY_IMAGES)
    ]
    groups = {id(chunk.param_to_bucket_group[parameter]) for parameter in late}
    return [group for group in reversed(chunk.bucket_groups) if id(group) in groups]


def _count_nothing(parameter: torch.nn.Parameter, *_: Any) -> None:
    pass


class _Gather:
    """A hook before the forward pass that waits for some buckets."""

    def __init__(self, groups: Sequence[Any]) -> None:
        self.groups = groups

    def __call__(self, module: torch.nn.Module, inputs: Any) -> None:
        for group in self.groups:
            group.finish_param_sync()


def complete_parameters(chunks: Sequence[DistributedDataParallel]) -> None:
    """Gathers what the last step left to the next forward pass, for readers of the weights. Collective."""
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
