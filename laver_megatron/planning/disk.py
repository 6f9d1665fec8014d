"""How much of the disk a run's checkpoints need."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from laver_megatron.config.fields import Config
from laver_megatron.encoders import EncoderShape
from laver_megatron.hf.shape import ModelShape
from laver_megatron.hf.weights import Size
from laver_megatron.planning.memory import checkpoint_copy_bytes, fullest_state

_ONE_PROCESS = {
    "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "sequence_parallel": False,
    "num_layers_per_virtual_pipeline_stage": None, "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
}  # fmt: skip


def checkpoint_bytes(
    config: Config, shape: ModelShape, encoder: EncoderShape | None, encoder_sizes: Mapping[str, Size]
) -> int:
    """The tensors of a checkpoint, whatever the layout: what one process that holds the whole model writes."""
    alone = config.replace(**_ONE_PROCESS)
    return checkpoint_copy_bytes(alone, fullest_state(alone, shape, encoder, encoder_sizes, 1, 0), 1)


def room_needed(config: Config, num_bytes: int) -> str:
    """In words, for a checkpoint of that size. Old checkpoints are deleted only when the new one is whole."""
    one, kept = f"a checkpoint takes {num_bytes / 1e9:.3f} GB of disk", config.reliability.keep_last
    if kept is None:
        return f"{one}, and all are kept (--keep-last)"
    more = ", besides those of --keep-every and --keep-best" * bool(
        config.reliability.keep_every or config.reliability.keep_best
    )
    return (
        f"{one}; --keep-last {kept} needs room for {kept + 1}, {(kept + 1) * num_bytes / 1e9:.3f} GB{more}, as an old "
        "one is deleted only when the new one is whole"
    )


def room_free(run_dir: Path) -> str:
    """In words, what is free where a run directory is or will be."""
    there = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.exists())
    return f"{shutil.disk_usage(there).free / 1e9:.3f} GB are free for {run_dir} on this machine"
