"""Every rank of a run built on one machine: shapes without memory, in a world that does not exist.

Each model-parallel position is built by the code that trains, around tensors of the meta device; what its data-parallel
replicas own of the optimizer follows from Megatron's own division. So the parameters, their sharding and the bytes are
those of the run, for any number of processes, without weights and data.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, field, fields, replace
from math import prod
from pathlib import Path

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from laver_megatron.config.fields import Config
from laver_megatron.encoders import encoder_tensor_sizes, read_encoder, with_target_size
from laver_megatron.hf.shape import ModelShape
from laver_megatron.hf.weights import TEACHER, ModelParts, weight_table
from laver_megatron.model.build import build_stages, wrap
from laver_megatron.model.laver import LaverStage
from laver_megatron.model.qwen import num_virtual_stages
from laver_megatron.model.teacher import TeacherAverage, pair_by_name
from laver_megatron.planning.hardware import GIB
from laver_megatron.planning.memory import StateBytes, with_shares
from laver_megatron.planning.plan_report import align
from laver_megatron.planning.sharding import Size, Tile, division_problems, tiles_of, tiling_problems
from laver_megatron.planning.simulated_rank import simulated_rank
from laver_megatron.runtime.sharded_state import sharding_metadata

_OPTIMIZER_STATE = "optimizer.state."
_PER_VALUE = ("param", "exp_avg", "exp_avg_sq")  # what the optimizer's checkpoint has of each trained value


def state_bytes(
    stages: Sequence[LaverStage],
    chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    average: TeacherAverage | None,
) -> StateBytes:
    """What the tensors of this rank take. Those that share memory count once."""
    named = [(name, parameter) for stage in stages for name, parameter in stage.named_parameters()]
    student = _storages(parameter for name, parameter in named if not name.startswith(TEACHER))
    teacher = _storages(parameter for name, parameter in named if name.startswith(TEACHER))
    gradients = _storages(buffer.grad_data for chunk in chunks for buffer in chunk.buffers)
    of_optimizer = _storages(_optimizer_tensors(optimizer))
    # Under fp32 the optimizer's parameters are pieces of the weights themselves, and the accumulators of the teacher's.
    own = {storage: size for storage, size in of_optimizer.items() if storage not in student}
    averages = _storages(average.accumulators() if average is not None else ())
    accumulators = {storage: size for storage, size in averages.items() if storage not in teacher}
    return StateBytes(*(sum(sizes.values()) for sizes in (student, gradients, own, teacher, accumulators)))


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of each piece of memory behind the tensors. Tensors without memory have no address: the storage's own
    identity serves for both."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage.nbytes() for storage in storages}


def _optimizer_tensors(optimizer: MegatronOptimizer) -> Iterator[Tensor]:
    for part in optimizer.chained_optimizers:
        if not part.is_stub_optimizer:
            for group in part.optimizer.param_groups:
                yield from group["params"]
            for state in part.optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))


@dataclass(frozen=True)
class RankContents:
    """What one rank holds.

    Attributes:
        num_layers: the student's on this stage.
        num_parameters: the student's on this rank, a copy of the tied embedding included.
    """

    stage: int
    tp_rank: int
    dp_rank: int
    num_layers: int
    num_parameters: int
    bytes: StateBytes


@dataclass(frozen=True)
class DryRun:
    """A whole run.

    Attributes:
        parameters: of each part of the model, each value once.
        problems: what is wrong with the sharding, one sentence each.
        num_tensors: how many were looked at.
    """

    ranks: tuple[RankContents, ...]
    parameters: dict[str, int]
    problems: tuple[str, ...]
    num_tensors: int


@dataclass
class _Findings:
    """What the model-parallel positions hold, all together.

    Attributes:
        tiles: of the student, of the teacher under its own prefix, and of the optimizer.
        trained: keys of the student's tensors that train.
    """

    ranks: list[RankContents] = field(default_factory=list)
    tiles: list[Tile] = field(default_factory=list)
    trained: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


def model_parts(config: Config, shape: ModelShape, encoder_dir: Path) -> ModelParts:
    """What a checkpoint of a run consists of."""
    objective = config.objective
    head = (objective.vision_head_hidden_size, objective.vision_head_output_size or shape.hidden_size)
    return ModelParts(
        shape,
        encoder=encoder_tensor_sizes(encoder_dir),
        feature_size=read_encoder(encoder_dir).feature_size,
        vision_head=head if objective.laver else None,
        teacher=objective.laver,
    )


def dry_run(config: Config, shape: ModelShape, encoder_dir: Path, world_size: int) -> DryRun:
    """Builds all model-parallel positions one after the other. The configuration must be valid."""
    config = with_target_size(config, read_encoder(encoder_dir))
    tp, pp = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    dp = world_size // (tp * pp)
    expected = {key: weight.size for key, weight in weight_table(model_parts(config, shape, encoder_dir)).items()}
    found = _Findings()
    # Megatron collects garbage for each position; what is there already needs no look.
    gc.freeze()
    try:
        for stage in range(pp):
            for tp_rank in range(tp):
                # Megatron numbers ranks with TP innermost, then DP, then PP.
                _build(config, shape, encoder_dir, stage * tp * dp + tp_rank, world_size, found)
    finally:
        gc.unfreeze()
    trained = [key for key in found.trained if key in expected]
    expected |= {f"{_OPTIMIZER_STATE}{kind}.{key}": expected[key] for key in trained for kind in _PER_VALUE}
    problems = dict.fromkeys([*found.problems, *tiling_problems(found.tiles, expected)])
    return DryRun(tuple(found.ranks), _parameters(expected), tuple(problems), len(expected))


def _parameters(sizes: dict[str, Size]) -> dict[str, int]:
    """Values of each part of the model, by what users call it."""
    parts = {
        "language model": ("embedding.", "decoder.", "output_layer."),
        "encoder": ("encoder.",),
        "connector": ("connector.",),
        "[MASK]": ("mask_token",),
        "vision head": ("vision_head.",),
        "teacher": (TEACHER,),
    }
    return {
        name: sum(prod(size) for key, size in sizes.items() if key.startswith(beginnings))
        for name, beginnings in parts.items()
    }


def _build(config: Config, shape: ModelShape, encoder_dir: Path, rank: int, world_size: int, found: _Findings) -> None:
    """Adds what a model-parallel position holds, named by its rank of data-parallel rank 0."""
    with simulated_rank(
        rank,
        world_size,
        tensor_model_parallel_size=config.parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=num_virtual_stages(config, shape.num_layers),
    ):
        stages = build_stages(config, shape, encoder_dir)
        chunks, optimizer = wrap(config, stages)
        average = None
        if config.objective.laver:
            average = TeacherAverage(stages, optimizer, parallel_state.get_data_parallel_group())
        measured = state_bytes(stages, chunks, optimizer, average)
        owned = _OwnedValues(stages, chunks, parallel_state.get_data_parallel_world_size())
        student = (p for stage in stages for name, p in stage.named_parameters() if not name.startswith(TEACHER))
        at_first = RankContents(
            stage=parallel_state.get_pipeline_model_parallel_rank(),
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            dp_rank=0,
            num_layers=sum(len(stage.decoder.layers) for stage in stages),  # type: ignore[arg-type,misc]
            num_parameters=sum(p.numel() for p in student),
            bytes=measured,
        )
        for dp_rank in range(owned.num_ranks):
            held = with_shares(measured, owned.trained(dp_rank), owned.averaged(dp_rank), config)
            assert dp_rank or held == measured, (held, measured)
            found.ranks.append(replace(at_first, dp_rank=dp_rank, bytes=held))
        found.problems += owned.problems()
        _add_tiles(stages, optimizer, found)


def _add_tiles(stages: Sequence[LaverStage], optimizer: MegatronOptimizer, found: _Findings) -> None:
    """This position's pieces of student, teacher and optimizer, and the student's keys that train."""
    metadata = sharding_metadata()
    model_state: dict = {}
    for i, stage in enumerate(stages):
        state = stage.sharded_state_dict(metadata=metadata)
        parameters = dict(stage.named_parameters())
        found.trained |= {state[name].key for name, p in parameters.items() if p.requires_grad and name in state}
        model_state[f"model{i}"] = state
        if stage.teacher is not None:
            found.tiles += tiles_of(stage.teacher.sharded_state_dict(TEACHER, (), metadata))
    if not optimizer.is_stub_optimizer:
        found.tiles += tiles_of(optimizer.sharded_state_dict(model_state, is_loading=True, metadata=metadata))
    found.tiles += tiles_of(model_state)


class _OwnedValues:
    """Which values of each trained parameter each data-parallel rank owns, by Megatron's division of its buffers."""

    def __init__(self, stages: Sequence[LaverStage], chunks: Sequence[DistributedDataParallel], num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self._names = {p: name for stage in stages for name, p in stage.named_parameters()}
        self._averaged = {
            student: student.requires_grad
            for stage in stages
            if stage.teacher is not None
            for _, student, _ in pair_by_name(stage)
        }
        self._parts = [self._of_rank(chunks, rank) for rank in range(num_ranks)]

    def _of_rank(self, chunks: Sequence[DistributedDataParallel], rank: int) -> dict:
        parts = {}
        for chunk in chunks:
            for buffer in chunk.buffers:
                for ranges in DistributedOptimizer._build_gbuf_range_map(
                    _AtRank(buffer, rank, self.num_ranks)
                ).values():
                    for of_bucket in ranges:
                        for parameter, found in of_bucket["param_map"].items():
                            parts[parameter] = (found["param"].start, found["param"].end)
        return parts

    def trained(self, rank: int) -> int:
        """Values that the optimizer of a rank keeps."""
        return sum(end - start for start, end in self._parts[rank].values())

    def averaged(self, rank: int) -> int:
        """Values whose EMA a rank keeps: of what trains those it owns, of what is frozen all on the first."""
        parts = self._parts[rank]
        owned = sum(end - start for p, (start, end) in parts.items() if p in self._averaged)
        frozen = sum(p.numel() for p, trains in self._averaged.items() if not trains)
        return owned + (frozen if rank == 0 else 0)

    def problems(self) -> Iterator[str]:
        for parameter, name in self._names.items():
            if parameter.requires_grad:
                parts = (of_rank.get(parameter, (0, 0)) for of_rank in self._parts)
                yield from division_problems(f"optimizer of {name}", parameter.numel(), parts)


class _AtRank:
    """Megatron's buffer as another data-parallel rank would see it."""

    def __init__(self, buffer: object, rank: int, num_ranks: int) -> None:
        self._buffer, self._rank, self._num_ranks = buffer, rank, num_ranks
        self.data_parallel_group = self

    def __getattr__(self, name: str) -> object:
        return getattr(self._buffer, name)

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._num_ranks


_KINDS = [item.name for item in fields(StateBytes)]


def dry_run_report(run: DryRun) -> str:
    """The model by part, the table by pipeline stage (equal ranks in one line), totals over all ranks."""
    counted = {name: number for name, number in run.parameters.items() if number}
    width = max(len(f"{number:,}") for number in counted.values())
    lines = ["parameters"]
    lines += [f"  {number:>{width},}  {name}" for name, number in counted.items()]
    lines += ["", *rank_table(run.ranks), ""]
    total = sum(rank.bytes.total for rank in run.ranks)
    largest = max(run.ranks, key=lambda rank: rank.bytes.total)
    lines += [
        f"all {len(run.ranks)} ranks: {total / GIB:,.3f} GiB; the largest: {largest.bytes.total / GIB:,.3f} GiB, on "
        f"stage {largest.stage}. Activations, the losses' logits and what the libraries take come on top.",
        f"sharding: {run.num_tensors:,} tensors of student, teacher and optimizer, every value of each on one rank "
        "and its copies",
    ]
    return "\n".join(lines)


def rank_table(ranks: Sequence[RankContents]) -> list[str]:
    """Lines of the table; ranks of a stage that hold the same share one."""
    groups: dict[tuple, list[RankContents]] = {}
    for rank in ranks:
        groups.setdefault((rank.stage, rank.num_layers, rank.num_parameters, rank.bytes), []).append(rank)
    rows = [["stage", "TP rank", "DP rank", "ranks", "layers", "parameters", *_KINDS, "GiB"]]
    for (stage, num_layers, num_parameters, held), alike in groups.items():
        rows.append(
            [
                str(stage),
                spans(rank.tp_rank for rank in alike),
                spans(rank.dp_rank for rank in alike),
                str(len(alike)),
                str(num_layers),
                f"{num_parameters:,}",
                *(f"{number / GIB:.3f}" for number in (*astuple(held), held.total)),
            ]
        )
    return align(rows)


def spans(numbers: Iterable[int]) -> str:
    """Whole numbers in short: 0-3,5."""
    found: list[list[int]] = []
    for number in sorted(set(numbers)):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in found)
