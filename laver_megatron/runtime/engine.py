"""What differs between the versions of Megatron-Core that the package runs on: 0.16.1 and 0.19.

The rest of the package is written for both. What a version has is asked of its classes, not of its number.
"""

import importlib.util
import inspect
import io
import logging
import queue
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

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


class Stored(NamedTuple):
    """A tensor as a whole in a checkpoint; without size and type, an object of another kind."""

    size: tuple[int, ...] | None = None
    dtype: "torch.dtype | None" = None


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


def gradients_of_norm(optimizer: Any) -> list["torch.Tensor"]:
    """The gradients of an optimizer that this rank adds to the global norm: no copies of what another rank adds."""
    if hasattr(optimizer, "get_grads_for_grad_norm"):
        return optimizer.get_grads_for_grad_norm()
    return optimizer.get_main_grads_for_grad_norm()


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within the block, an attribute that a module or class defines itself is another. In all threads: Megatron-Core
    and torch have no argument for it."""
    before = vars(owner)[name]  # not getattr, which would unwrap a static method
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def stored_tensors(checkpoint: Path) -> dict[str, Stored]:
    """What is sharded in a checkpoint, tensors and other objects, by key.

    Raises:
        ValueError: `.metadata` cannot be read, or names what no checkpoint needs.
    """
    from laver_megatron.runtime.pickles import read_metadata  # torch: not every program waits for it

    tensors = read_metadata(checkpoint).state_dict_metadata
    return {
        key: Stored(tuple(it.size), it.properties.dtype) if hasattr(it, "size") else Stored()
        for key, it in tensors.items()
        if key.split("/")[0] != _COMMON_STATE
    }


class PlannedSave(NamedTuple):
    """What this rank writes of a checkpoint.

    Attributes:
        writer: Megatron-Core's `FileSystemWriterAsync`; its `write_buckets` are files with their tensors and objects.
        metadata: of the whole checkpoint, on rank 0.
        files: further files, by name.
    """

    writer: Any
    metadata: Any
    files: dict[str, bytes]


def plan_save(sharded: dict, directory: Path) -> PlannedSave:
    """Lets Megatron-Core divide a state among the ranks, one file each. Collective; nothing is written."""
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import common, filesystem_async
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    planned = PlannedSave(None, None, {})

    class Plan(TorchDistSaveShardedStrategy):
        def _get_save_and_finalize_callbacks(self, writer: Any, outcome: tuple, *strategy: Any) -> Any:
            nonlocal planned
            planned = planned._replace(writer=writer, metadata=outcome[1])
            return super()._get_save_and_finalize_callbacks(writer, outcome, *strategy)

    def keep_common(strategy: Any, state: dict, checkpoint_dir: str | Path) -> None:
        # A file of its own, in 0.16. It is written with the rest, where an error is heard of by all ranks.
        if torch.distributed.get_rank() == 0:
            content = io.BytesIO()
            torch.save(state, content)
            planned.files[_COMMON_FILE] = content.getvalue()

    takes_strategy = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    more = {"async_strategy": "mcore"} if takes_strategy else {}
    has_file = hasattr(common, "TorchCommonSaveStrategy")
    # Whoever writes is a thread of this process; Megatron-Core would start another process to hold a queue.
    filesystem_async._results_queue = queue.SimpleQueue()
    strategy = Plan("torch_dist", 1, thread_count=1)
    with replaced(common.TorchCommonSaveStrategy, "save_common", keep_common) if has_file else nullcontext():
        dist_checkpointing.save(sharded, str(directory), strategy, async_sharded_save=True, **more)
    return planned


def finish_save(planned: PlannedSave, places: list, directory: Path) -> None:
    """On rank 0, writes what makes a directory of tensors a checkpoint. places: of all ranks' tensors."""
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

    planned.writer.finish(planned.metadata, places)
    save_config(CheckpointingConfig("torch_dist", 1), str(directory))


def load_sharded(sharded: dict, checkpoint: Path) -> dict:
    """Fills a sharded state from a checkpoint that either version wrote; keys that the checkpoint lacks are dropped."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    from laver_megatron.runtime.pickles import only_known_pickles

    reads_common = {}
    takes_strategy = "common_strategy" in inspect.signature(dist_checkpointing.load).parameters
    if takes_strategy and not (checkpoint / _COMMON_FILE).exists():
        reads_common["common_strategy"] = _common_state_of_0_19()
    with only_known_pickles(checkpoint):
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
