"""The teacher's exponential moving average: fp32 accumulators, their update, nothing else.

The teacher computes with run-dtype weights, sharded as the student's. Beside them stand fp32 accumulators,
fed from the optimizer's fp32 master weights (an average kept in bf16 loses its updates: at momentum 0.996
it is off by 87%). Each data-parallel rank accumulates exactly the slices whose master weights Megatron's
distributed optimizer keeps on it, so the update needs no communication; afterwards the ranks gather their slices
from one another, in the run dtype. In an fp32 run the accumulators are these slices themselves.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor
from torch.profiler import record_function

from laver_megatron.model.laver import LaverStage

# Weights of the teacher that are under way at once, all data-parallel ranks together: half a GB in bf16.
GATHERED_ELEMENTS = 1 << 28


@dataclass
class _Pair:
    """A student parameter, its teacher, and the slice [start, end) of it that this rank accumulates.

    master: the fp32 master of that slice (flat), or None when another data-parallel rank owns it all.
    """

    stage: int
    name: str
    student: torch.nn.Parameter
    teacher: torch.nn.Parameter
    start: int = 0
    end: int = 0
    master: Tensor | None = None
    accumulator: Tensor | None = None


def pair_by_name(stage: LaverStage) -> list[tuple[str, torch.nn.Parameter, torch.nn.Parameter]]:
    """(name, student, teacher) of every teacher parameter of a stage; ValueError on any mismatch."""
    assert stage.teacher is not None
    student = {
        name: parameter for name, parameter in stage.named_parameters() if name.startswith(("decoder.", "vision_head."))
    }
    teacher = dict(stage.teacher.named_parameters())
    if student.keys() != teacher.keys():
        raise ValueError(f"student and teacher differ in {sorted(student.keys() ^ teacher.keys())}")
    for name in student:
        if student[name].shape != teacher[name].shape:
            raise ValueError(f"{name}: student {tuple(student[name].shape)}, teacher {tuple(teacher[name].shape)}")
    return [(name, student[name], teacher[name]) for name in student]


class TeacherAverage:
    """EMA of decoder layers, final norm and vision head of all stages on this rank.

    Paper: theta_hat(t) = lambda theta_hat(t-1) + (1 - lambda) theta(t). The official code averages ZeRO-3
    shards without gathering them, which moves nothing.
    """

    def __init__(
        self, stages: Sequence[LaverStage], optimizer: MegatronOptimizer, data_parallel_group: dist.ProcessGroup
    ) -> None:
        self.stages = list(stages)
        self.group = data_parallel_group
        self._pairs = [_Pair(i, *pair) for i, stage in enumerate(self.stages) for pair in pair_by_name(stage)]
        for pair in self._pairs:
            self._find_master(pair, optimizer)
        table: list[list[tuple[int, int]]] = [[]] * self.group.size()
        dist.all_gather_object(table, [(pair.start, pair.end) for pair in self._pairs], group=self.group)
        # What each data-parallel rank accumulates, flat views of the teacher's weights in the order of the pairs.
        self._targets_of_rank = [
            [
                pair.teacher.data.view(-1)[start:end]
                for pair, (start, end) in zip(self._pairs, slices, strict=True)
                if end > start
            ]
            for slices in table
        ]
        self.copy_student()

    def _find_master(self, pair: _Pair, optimizer: MegatronOptimizer) -> None:
        for part in optimizer.chained_optimizers:
            if pair.student in getattr(part, "model_param_gbuf_map", {}):
                owned = part._get_model_param_range_map(pair.student)["param"]
                group_index, order = part.model_param_group_index_map[pair.student]
                pair.start, pair.end = owned.start, owned.end
                pair.master = part.optimizer.param_groups[group_index]["params"][order].detach().view(-1)
                assert pair.master.numel() == pair.end - pair.start
                return
        if not pair.student.requires_grad and self.group.rank() == 0:
            pair.start, pair.end = 0, pair.student.numel()
            pair.master = pair.student.detach().view(-1)

    def _owned(self) -> Iterator[tuple[_Pair, Tensor, Tensor]]:
        for pair in self._pairs:
            if pair.master is not None:
                assert pair.accumulator is not None
                yield pair, pair.accumulator, pair.master

    def accumulators(self) -> list[Tensor]:
        """This rank's slices of the average, flat and fp32."""
        return [accumulator for _, accumulator, _ in self._owned()]

    @torch.no_grad()
    def copy_student(self) -> None:
        """Teacher(0) = student(0)."""
        for pair in self._pairs:
            if pair.master is None:
                continue
            if pair.accumulator is None:
                weights = pair.teacher.data.view(-1)[pair.start : pair.end]
                is_fp32 = weights.dtype == torch.float32
                pair.accumulator = weights if is_fp32 else torch.empty_like(weights, dtype=torch.float32)
            pair.accumulator.copy_(pair.master)
        self._publish()

    @record_function("EMA")
    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * student, in fp32; exact at momentum 0 and 1."""
        of_fp32 = [(accumulator, master) for _, accumulator, master in self._owned() if master.dtype == torch.float32]
        if of_fp32:
            accumulators, masters = map(list, zip(*of_fp32, strict=True))
            torch._foreach_lerp_(accumulators, masters, 1.0 - momentum)
        for _, accumulator, master in self._owned():
            if master.dtype != torch.float32:  # the student's own weights, where they are frozen
                accumulator.lerp_(master.float(), 1.0 - momentum)
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        """Writes the run-dtype weights of the teacher from the accumulators of all data-parallel ranks: one all-gather
        for GATHERED_ELEMENTS of them, so that no rank needs a second copy of the teacher."""
        own, num_ranks = self.accumulators(), self.group.size()
        if num_ranks == 1:
            if own and self._pairs[0].teacher.dtype != torch.float32:
                torch._foreach_copy_(self._targets_of_rank[0], own)
            return
        longest = max(sum(map(len, targets)) for targets in self._targets_of_rank)
        if not longest:
            return
        length = min(longest, max(GATHERED_ELEMENTS // num_ranks, 1))
        teacher = self._pairs[0].teacher
        sent = torch.zeros(length, dtype=teacher.dtype, device=teacher.device)
        received = sent.new_empty(num_ranks, length)
        for start in range(0, longest, length):
            offset = 0
            for part in _window(own, start, start + length):
                sent[offset : offset + len(part)].copy_(part)
                offset += len(part)
            dist.all_gather_into_tensor(received.view(-1), sent, group=self.group)
            for targets, gathered in zip(self._targets_of_rank, received, strict=True):
                parts = _window(targets, start, start + length)
                if parts:
                    lengths = [len(part) for part in parts]
                    torch._foreach_copy_(parts, list(gathered[: sum(lengths)].split(lengths)))

    # --- checkpoints: whole fp32 tensors under `teacher.*`, sharded over TP and PP like the student's ---

    @torch.no_grad()
    def sharded_state(self, metadata: dict, is_loading: bool) -> dict:
        """The accumulators as Megatron-Core's sharded tensors, keys `teacher.decoder...`, `teacher.vision_head...`.

        Saving gathers one parameter at a time over the data-parallel ranks and keeps it in the memory of the host, each
        rank its share of the parameters; loading gives every rank a whole fp32 buffer, from which `load_sharded_state`
        takes its slice.
        """
        sharded: dict = {}
        templates = [
            stage.teacher.sharded_state_dict("teacher.", (), metadata)
            for stage in self.stages
            if stage.teacher is not None
        ]
        keepers = self._keepers()
        for pair, keeper in zip(self._pairs, keepers, strict=True):
            whole = torch.zeros(pair.student.numel(), dtype=torch.float32, device=pair.student.device)
            if not is_loading:
                if pair.accumulator is not None:
                    whole[pair.start : pair.end] = pair.accumulator
                if self.group.size() > 1:
                    dist.all_reduce(whole, group=self.group)
                if keeper != self.group.rank():
                    continue
                whole = whole.cpu()
            template = templates[pair.stage][f"teacher.{pair.name}"]
            tensor = make_sharded_optimizer_tensor(template, whole.view(pair.student.shape), "teacher")
            tensor.key = template.key
            if not is_loading:
                tensor.replica_id = (*template.replica_id[:-1], 0)  # no other data-parallel rank has it
            sharded[f"{pair.stage}.{pair.name}"] = tensor
        return sharded

    def _keepers(self) -> list[int]:
        """The data-parallel rank that keeps each parameter of a checkpoint: shares of about equal size."""
        sizes = [0] * self.group.size()
        keepers = []
        for pair in self._pairs:
            keepers.append(sizes.index(min(sizes)))
            sizes[keepers[-1]] += pair.student.numel()
        return keepers

    @torch.no_grad()
    def load_sharded_state(self, state: dict[str, Tensor]) -> None:
        for pair in self._pairs:
            if pair.accumulator is not None:
                whole = state[f"{pair.stage}.{pair.name}"]
                pair.accumulator.copy_(whole.view(-1)[pair.start : pair.end])
        self._publish()


def _window(tensors: Sequence[Tensor], start: int, end: int) -> list[Tensor]:
    """Views of what lies between `start` and `end` of flat tensors laid one after the other."""
    parts, offset = [], 0
    for tensor in tensors:
        part = tensor[max(start - offset, 0) : max(end - offset, 0)]
        if len(part):
            parts.append(part)
        offset += len(tensor)
    return parts


class Centre:
    """EMA of the teacher's mean logits, subtracted before its softmax; fp32, split like the vision head's logits.

    Starts at 0; each step's mean over all visual tokens of the global batch is used from the next step on.
    The paper has no centre; the official code uses momentum 0.9. None of this exists when it is off.
    """

    def __init__(self, num_logits: int, momentum: float, device: torch.device) -> None:
        self.momentum = momentum
        self.value_K = torch.zeros(num_logits, dtype=torch.float32, device=device)
        self.sum_K = torch.zeros_like(self.value_K)

    def accumulate(self, teacher_logits_TK: Tensor) -> None:
        """Adds the visual tokens of one micro-batch to this step's sum."""
        self.sum_K += teacher_logits_TK.detach().float().sum(0)

    def finish_step(self, num_visual_tokens: int, group: dist.ProcessGroup, skipped: bool) -> None:
        """Moves the centre after a step, or only forgets the step's sum if it was skipped or saw no image."""
        from laver_megatron.objective.reconstruction import updated_centre

        if not skipped and num_visual_tokens > 0:
            dist.all_reduce(self.sum_K, group=group)
            self.value_K.copy_(updated_centre(self.value_K, self.sum_K / num_visual_tokens, self.momentum))
        self.sum_K.zero_()

    def sharded_state(self, tp_group: dist.ProcessGroup, dp_rank: int) -> ShardedTensor:
        return ShardedTensor.from_rank_offsets(
            "teacher.centre", self.value_K, (0, tp_group.rank(), tp_group.size()), replica_id=dp_rank
        )
