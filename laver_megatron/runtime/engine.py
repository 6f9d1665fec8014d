"""What differs between the versions of Megatron-Core that the package runs on: 0.16.1 and 0.19.

The rest of the package is written for both. What a version has is asked of its classes, not of its number.
"""

import importlib.util
import inspect
import io
import logging
import sys
import warnings
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

# A module of kernels for mixtures of experts, which are not used here, and the names in it that 0.19 imports.
_PAGED_STASH = "megatron.core.transformer.moe.ops.paged_stash"
_PAGED_STASH_NAMES = ("GLOBAL_BLOCK_SIZE", "paged_stash_copy_kernel", "paged_stash_pop_kernel")

# What 0.19 logs on every rank and no setting changes: a save that is not asynchronous goes through the writer of its
# older asynchronous ones, and checkpoints of 0.16 hold what is not sharded in a file of its own.
_NEEDLESS_LOG_LINES = {
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
    "megatron.core.dist_checkpointing.strategies.common": "load_common is deprecated",
}

# What a configuration that recomputes core_attn warns of, whether or not TransformerEngine computes the attention. Here
# it never does, and docs/training.md says with which kernels it is of use.
_NEEDLESS_WARNING = "If you are using transformer_engine as the transformer implementation"

# Under which key of a checkpoint 0.19 keeps what is not sharded; 0.16 has the file for it.
_COMMON_STATE, _COMMON_FILE = "common_state", "common.pt"


def prepare_import() -> None:
    """Makes Megatron-Core importable as it is installed, and silences what it logs needlessly. Call before
    megatron.core is imported.

    0.19 imports Triton unconditionally in one of its modules; where Triton is not installed, as beside torch's builds
    for the CPU, an empty module takes the place of that one.
    """
    if importlib.util.find_spec("triton") is None and _PAGED_STASH not in sys.modules:
        empty = ModuleType(_PAGED_STASH)
        vars(empty).update(dict.fromkeys(_PAGED_STASH_NAMES))
        sys.modules[_PAGED_STASH] = empty
    for name, beginning in _NEEDLESS_LOG_LINES.items():
        logging.getLogger(name).addFilter(partial(_does_not_begin, beginning))
    warnings.filterwarnings("ignore", message=_NEEDLESS_WARNING, category=UserWarning)


def _does_not_begin(beginning: str, record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(beginning)


def mlp_builder(submodules: Any, ffn_hidden_size: int) -> Any:
    """What `TransformerLayerSubmodules.mlp` takes for a plain MLP: a ModuleSpec in 0.16, a function in 0.19."""
    from megatron.core.transformer import ModuleSpec
    from megatron.core.transformer.mlp import MLP

    if hasattr(MLP, "as_mlp_submodule"):
        return partial(MLP.as_mlp_submodule, submodules=submodules, ffn_hidden_size=ffn_hidden_size)
    return ModuleSpec(module=MLP, submodules=submodules, params={"ffn_hidden_size": ffn_hidden_size})


def data_parallel(stage: Any, ddp_config: Any, *, disable_bucketing: bool) -> Any:
    """Megatron's `DistributedDataParallel` around a stage.

    0.19 wants to be given the layout of its buffers, which it otherwise computes with a warning; the buckets are those
    that it would choose.
    """
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel

    layout = {}
    if "full_param_layout" in inspect.signature(DistributedDataParallel).parameters:
        from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

        num_replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        bucket_size = ddp_config.bucket_size or max(40_000_000, 1_000_000 * num_replicas)
        is_first = parallel_state.get_pipeline_model_parallel_rank() == 0
        has_buckets = ddp_config.overlap_grad_reduce and is_first and not disable_bucketing
        trained = [parameter for parameter in stage.parameters() if parameter.requires_grad]
        layout["full_param_layout"] = DistributedOptimizer.compute_full_param_layout(
            trained, bucket_size if has_buckets else None, num_replicas, ddp_config
        )
    return DistributedDataParallel(stage.config, ddp_config, stage, disable_bucketing=disable_bucketing, **layout)


def stored_keys(checkpoint: Path) -> set[str]:
    """The keys of all that is sharded in a checkpoint, of tensors and of other objects."""
    from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

    return {key for key in load_sharded_metadata(str(checkpoint)) if key.split("/")[0] != _COMMON_STATE}


def load_sharded(sharded: dict, checkpoint: Path) -> dict:
    """Fills a sharded state from a checkpoint that either version wrote; keys that the checkpoint lacks are dropped."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    reads_common = {}
    takes_strategy = "common_strategy" in inspect.signature(dist_checkpointing.load).parameters
    if takes_strategy and not (checkpoint / _COMMON_FILE).exists():
        reads_common["common_strategy"] = _common_state_of_0_19()
    loaded, *_ = dist_checkpointing.load(
        sharded, str(checkpoint), strict=StrictHandling.RETURN_UNEXPECTED, **reads_common
    )
    return loaded


def _common_state_of_0_19() -> Any:
    """What 0.16 reads the part of a checkpoint with that is not sharded, where 0.19 wrote it."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
    from torch.distributed.checkpoint import FileSystemReader, load

    class CommonState(TorchCommonLoadStrategy):
        def load_common(self, checkpoint_dir: str | Path) -> dict:
            key = ShardedObject(_COMMON_STATE, None, (1,), (0,)).unique_key
            state: dict[str, Any] = {key: io.BytesIO()}
            load(state, storage_reader=FileSystemReader(checkpoint_dir), no_dist=True)
            (common,) = state[key]
            return common

    return CommonState()
