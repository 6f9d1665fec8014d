"""Bytes of what a rank keeps from step to step, counted on the tensors themselves, real ones or those of a dry run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from laver_megatron.model.laver import LaverStage
from laver_megatron.model.teacher import TeacherAverage
from laver_megatron.planning.memory import StateBytes


def state_bytes(
    stages: Sequence[LaverStage],
    chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    average: TeacherAverage | None,
) -> StateBytes:
    """What the tensors of this rank take. Those that share memory count once."""
    student, teacher = Storages(), Storages()
    for stage in stages:
        for name, parameter in stage.named_parameters():
            (teacher if name.startswith("teacher.") else student).add([parameter])
    gradients = Storages()
    for chunk in chunks:
        gradients.add(buffer.grad_data for buffer in chunk.buffers)
    # Under fp32 the optimizer's parameters are pieces of the weights themselves.
    of_optimizer = Storages(besides=student)
    for part in optimizer.chained_optimizers:
        if not part.is_stub_optimizer:
            for group in part.optimizer.param_groups:
                of_optimizer.add(group["params"])
            for state in part.optimizer.state.values():
                of_optimizer.add(value for value in state.values() if isinstance(value, Tensor))
    accumulators = Storages()
    if average is not None:
        accumulators.add(average.accumulators())
    return StateBytes(
        student.num_bytes, gradients.num_bytes, of_optimizer.num_bytes, teacher.num_bytes, accumulators.num_bytes
    )


class Storages:
    """The memory behind tensors, each piece once. besides: what is counted elsewhere."""

    def __init__(self, besides: Storages | None = None) -> None:
        self._seen: set[int] = set(besides._seen) if besides else set()
        self.num_bytes = 0

    def add(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            # Tensors without memory have no address: the storage's own identity serves for both.
            if storage._cdata not in self._seen:
                self._seen.add(storage._cdata)
                self.num_bytes += storage.nbytes()
