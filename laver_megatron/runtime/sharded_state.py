"""How Megatron-Core lays out sharded state, and the tensors in it."""

from collections.abc import Iterator

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories


def sharding_metadata() -> dict:
    """How Megatron-Core lays out sharded state: layers by global number, optimizer states by parameter, so
    that both survive any change of TP, PP and DP."""
    return {
        "non_homogeneous_layers": True,
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def sharded_tensors(state: dict) -> Iterator[ShardedTensor]:
    """Every tensor of a sharded state dict as Megatron-Core shards it, with views of its data."""
    apply_factories(state)
    return (tensor for tensor in nested_values(state) if isinstance(tensor, ShardedTensor))
