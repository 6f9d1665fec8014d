"""Filling the model straight from a Hugging Face directory: `--load hf:DIR`.

Every rank reads only the rows and columns it owns; what all tensor-parallel ranks hold alike is read by the
first of them and broadcast.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from laver_megatron.hf.rows import join_blocks, runs_of_megatron_rows
from laver_megatron.hf.safetensors_reader import SafetensorsReader, num_not_finite
from laver_megatron.hf.source import WeightSource
from laver_megatron.hf.weights import Weight
from laver_megatron.model.laver import LaverStage
from laver_megatron.model.teacher import Centre, TeacherAverage
from laver_megatron.runtime.sharded_state import sharded_tensors


@torch.no_grad()
def load_hugging_face(stages: Sequence[LaverStage], directory: str | Path, metadata: dict) -> int:
    """Fills this rank's stages from a text-only Qwen2.5 (decoder, embedding and LM head) or from a LaVer export
    (encoder and connector, too, and with its training state [MASK] and vision head). Parts that the directory
    does not have are left as they are. Collective.

    Returns:
        The bytes that this rank asked the files for.

    Raises:
        ValueError: see `WeightSource`; with file and tensor, a value that is not finite; a weight left unwritten.
    """
    with WeightSource(Path(directory)) as source:
        for stage in stages:
            _fill(sharded_tensors(stage.sharded_state_dict(metadata=metadata)), source)
            _refuse_unwritten(stage, directory)
        return source.num_bytes_read


@torch.no_grad()
def load_teacher(teacher: TeacherAverage, centre: Centre | None, directory: str | Path, metadata: dict) -> None:
    """Fills the teacher's accumulators, and the centre, from an export's training state; without one they stay as
    they are. Collective."""
    with WeightSource(Path(directory)) as source:
        if not source.parts.teacher:
            return
        state = teacher.sharded_state(metadata, is_loading=True)
        whole = {name: tensor.data for name, tensor in state.items()}
        _fill(sharded_tensors(state), source)
        if centre is not None:
            _fill([centre.sharded_state(parallel_state.get_tensor_model_parallel_group(), 0)], source)
    teacher.load_sharded_state(whole)


def _fill(targets: Iterable[ShardedTensor], source: WeightSource) -> None:
    group = parallel_state.get_tensor_model_parallel_group()
    for target in targets:
        weight = source.weights.get(target.key)
        if weight is None:
            continue
        assert tuple(target.global_shape) == weight.size, f"{target.key}: {target.global_shape}, not {weight.size}"
        is_shared = group.size() > 1 and target.local_shape == target.global_shape
        if not is_shared or group.rank() == 0:
            target.data.copy_(_read_block(target, source.reader(weight), weight))
        if is_shared:
            dist.broadcast(target.data, src=dist.get_global_rank(group, 0), group=group)


def _read_block(target: ShardedTensor, tensors: SafetensorsReader, weight: Weight) -> Tensor:
    """The rows and columns of a Megatron tensor that `target` is."""
    start, num_rows = target.global_offset[0], target.local_shape[0]
    columns = None
    if len(target.local_shape) > 1 and target.local_shape[1] < target.global_shape[1]:
        columns = slice(target.global_offset[1], target.global_offset[1] + target.local_shape[1])
    blocks = []
    for run in runs_of_megatron_rows(weight, start, start + num_rows):
        name = weight.hugging_face[run.part]
        block = tensors.read(name, run.part_row, run.part_row + run.num_rows, columns)
        if num_not_finite(block):
            raise ValueError(f"{tensors.where(name)} holds NaN or infinite values; download or copy it again")
        blocks.append(block)
    return join_blocks(blocks)


def _refuse_unwritten(stage: LaverStage, directory: str | Path) -> None:
    """Weights are NaN until they are written or initialised."""
    for name, parameter in stage.named_parameters():
        if not name.startswith("teacher.") and parameter.isnan().any():
            raise ValueError(f"{name} is NaN after loading {directory}: no tensor of the checkpoint reached it")
