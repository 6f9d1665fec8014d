"""Checkpoints: student, teacher, optimizer, centre and progress as one state, in Megatron-Core's distributed format.

The teacher is stored once, as its fp32 accumulators. How a checkpoint gets onto the disk says `saver.py`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from megatron.core.optimizer import MegatronOptimizer

from laver_megatron.checkpoint.directory import has_encoder
from laver_megatron.checkpoint.manifest import check_files, read_manifest
from laver_megatron.checkpoint.progress import Progress
from laver_megatron.config.modules import MODULES
from laver_megatron.model.laver import LaverStage
from laver_megatron.model.teacher import Centre, TeacherAverage
from laver_megatron.runtime.engine import Stored, load_sharded, stored_tensors
from laver_megatron.runtime.pickles import read_metadata
from laver_megatron.runtime.ranks import all_ranks, gathered, num_ranks, rank
from laver_megatron.runtime.sharded_state import sharding_metadata
from laver_megatron.runtime.terminal import printable

Item = TypeVar("Item")
_PER_PARAMETER = ("param", "exp_avg", "exp_avg_sq")  # what a checkpoint has of the optimizer's state of each parameter


@dataclass
class TrainingState:
    """All that a checkpoint holds of a running trainer."""

    stages: Sequence[LaverStage]
    optimizer: MegatronOptimizer
    teacher: TeacherAverage | None
    centre: Centre | None
    progress: Progress


def _model_state(stages: Sequence[LaverStage], metadata: dict) -> dict:
    return {f"model{i}": stage.sharded_state_dict(metadata=metadata) for i, stage in enumerate(stages)}


def _teacher_state(state: TrainingState, metadata: dict, is_loading: bool) -> dict:
    sharded: dict = {}
    if state.teacher is not None and (accumulators := state.teacher.sharded_state(metadata, is_loading)):
        sharded["teacher"] = accumulators
    if state.centre is not None:
        dp_rank = parallel_state.get_data_parallel_rank()
        sharded["centre"] = state.centre.sharded_state(parallel_state.get_tensor_model_parallel_group(), dp_rank)
    return sharded


def _optimizer_state(state: TrainingState, model_state: dict, metadata: dict, is_loading: bool) -> dict:
    if state.optimizer.is_stub_optimizer:
        return {}
    # Megatron's optimizer knows its parameters by the sharded tensors of the chunks it was built from.
    sharded = state.optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)
    if not is_loading and not sharded.get("param_state", True):
        # Nothing trains here. An empty entry would count as a setting, in which the ranks must not differ.
        del sharded["param_state"]
    return {"optimizer": sharded}


def state_to_save(state: TrainingState) -> dict:
    """Everything of a running trainer as one sharded state. Collective."""
    metadata = sharding_metadata()
    sharded = _model_state(state.stages, metadata)
    sharded.update(_optimizer_state(state, sharded, metadata, is_loading=False))
    sharded.update(_teacher_state(state, metadata, is_loading=False))
    sharded.update(progress=gathered(asdict(state.progress))[0])  # each rank's clock says something else
    return sharded


def load_checkpoint(path: Path, state: TrainingState, *, verify: bool = True) -> None:
    """Fills `state` from a checkpoint written at any layout, to resume exactly. verify: compare checksums first.

    Raises:
        ValueError: damaged files, tensors that either side has no counterpart for, other data.
    """
    if verify:
        verify_manifest(path)
    metadata = sharding_metadata()
    sharded = _model_state(state.stages, metadata)
    sharded.update(_optimizer_state(state, sharded, metadata, is_loading=True))
    sharded.update(_teacher_state(state, metadata, is_loading=True))
    _check_keys(sharded, path, may_ignore=_moments_of_idle_parameters(state.stages))
    loaded = all_ranks(f"read the checkpoint {path}", lambda: load_sharded(sharded, path))
    _fill_stages(state.stages, loaded)
    if "optimizer" in loaded:
        _take_settings_of_this_run(loaded["optimizer"], state.optimizer)
        state.optimizer.load_state_dict(loaded["optimizer"])
    _fill_teacher(state, loaded)
    if loaded["progress"]["data_fingerprint"] != state.progress.data_fingerprint:
        raise ValueError(
            f"{path} is at pack {loaded['progress']['consumed_packs']} of other data: the shards, --seq-length, "
            "--visual-seq-length, --max-image-tokens, --shuffle-window, --data-weights, --long-samples, --seed, "
            "tokenizer or encoder have changed since; --finetune in another --run-dir starts on the new data with the "
            "weights alone"
        )
    for name, value in loaded["progress"].items():
        setattr(state.progress, name, value)


def _take_settings_of_this_run(loaded: dict, optimizer: MegatronOptimizer) -> None:
    """Parameter groups as this run has them, at the checkpoint's count of steps: rates, decay and betas are settings,
    and the checkpoint may have been written with other ones, or without groups for parts of the model."""
    steps = max(group["step"] for group in loaded["optimizer"]["param_groups"])
    loaded["optimizer"]["param_groups"] = [
        {name: value for name, value in group.items() if name != "params"} | {"step": steps}
        for group in optimizer.param_groups
    ]


def start_from_weights(path: Path, state: TrainingState, *, take_teacher: bool, verify: bool = True) -> None:
    """Fills the student from a checkpoint; optimizer and progress stay new. Parts that the checkpoint lacks (a
    vision head, [MASK]; encoder and connector of a text-only one) keep their start values.

    verify: compare checksums first.
    take_teacher: the teacher is the checkpoint's, where it has one, instead of a copy of the student.
    """
    if verify:
        verify_manifest(path)
    may_lack = MODULES["heads"]
    if not has_encoder(path):
        may_lack += MODULES["encoder"] + MODULES["connector"]
    load_weights(state.stages, path, may_lack=may_lack)
    state.optimizer.reload_model_params()
    if state.teacher is None:
        return
    state.teacher.copy_student()
    stored = _stored(path)
    if take_teacher and any(key.startswith("teacher.decoder.") for key in stored):
        sharded = _teacher_state(state, sharding_metadata(), is_loading=True)
        if "teacher.centre" not in stored:
            sharded.pop("centre", None)
        _fill_teacher(state, all_ranks(f"read the checkpoint {path}", lambda: load_sharded(sharded, path)))


def load_weights(stages: Sequence[LaverStage], path: Path, *, may_lack: tuple[str, ...] = ()) -> None:
    """Fills the student's weights of all stages; may_lack: beginnings of keys that then stay as they are."""
    sharded = _model_state(stages, sharding_metadata())
    _check_keys(sharded, path, may_lack, (*MODULES["heads"], "teacher.", "optimizer."))
    _fill_stages(stages, all_ranks(f"read the checkpoint {path}", lambda: load_sharded(sharded, path)))


def _fill_stages(stages: Sequence[LaverStage], loaded: dict) -> None:
    for i, stage in enumerate(stages):
        stage.load_state_dict(loaded[f"model{i}"], strict=False)


def _fill_teacher(state: TrainingState, loaded: dict) -> None:
    if state.teacher is not None:
        state.teacher.load_sharded_state(loaded["teacher"])
    if state.centre is not None and "centre" in loaded:
        state.centre.value_K.copy_(loaded["centre"])


def _stored(path: Path) -> dict[str, Stored]:
    return all_ranks(f"read the checkpoint {path}", lambda: stored_tensors(path))


def _moments_of_idle_parameters(stages: Sequence[LaverStage]) -> tuple[str, ...]:
    """Keys that the optimizer has of a trained encoder's parameters that its features do not depend on, in checkpoints
    of versions in which these decayed. Nothing is lost with them: the moments are those of a gradient of 0."""
    mine: list[str] = []
    for encoder in filter(None, (stage.encoder for stage in stages)):
        trains = {name: parameter.requires_grad for name, parameter in encoder.named_parameters()}
        if any(trains.values()):
            idle = [name for name in trains if not trains[name]]
            mine += [f"optimizer.state.{kind}.encoder.{name}" for kind in _PER_PARAMETER for name in idle]
    return tuple(key for part in gathered(mine) for key in part)


def _check_keys(sharded: dict, path: Path, may_lack: tuple[str, ...] = (), may_ignore: tuple[str, ...] = ()) -> None:
    """Compares what all ranks together ask for with what the checkpoint holds; ValueError if either has more.

    may_lack: beginnings of keys that the checkpoint may be without; may_ignore: of those nobody need ask for.
    """
    stored = _stored(path)
    mine = {}
    for entry in nested_values(extract_sharded_base(load_preprocess(sharded)[0])[0]):
        is_tensor = isinstance(entry, ShardedTensor)
        mine[entry.key] = Stored(tuple(entry.global_shape), entry.dtype) if is_tensor else Stored()
    wanted = {key: it for part in gathered(mine) for key, it in part.items()}
    _check_sizes(path, stored, wanted)
    asked = wanted.keys()
    for keys, ignored, problem in (
        (asked - stored.keys(), may_lack, "lacks {} of the tensors that this run needs"),
        (stored.keys() - asked, may_ignore, "holds {} tensors that this run has no place for"),
    ):
        # Extra states are TransformerEngine's notes for fp8, which nothing here uses.
        wrong = sorted(key for key in keys if not key.startswith(ignored) and "._extra_state" not in key)
        if wrong:
            raise ValueError(
                f"{path} {problem.format(len(wrong))}, such as {', '.join(wrong[:3])}; was it trained with other "
                "parts (--laver, --centre-momentum, an --encoder-feature-layer further down in a trained encoder)? "
                "--finetune takes the weights alone"
            )


def _check_sizes(path: Path, stored: dict[str, Stored], wanted: dict[str, Stored]) -> None:
    """ValueError naming the tensors that are of another size, or numbers of another kind, than this run's. Floating
    types may differ: values are converted. (Megatron-Core lets the rows of an embedding differ without a word.)"""
    wrong = []
    for key in sorted(stored.keys() & wanted.keys()):
        theirs, ours = stored[key], wanted[key]
        if theirs.size is None or ours.size is None or theirs.dtype is None or ours.dtype is None:
            continue
        if theirs.size != ours.size:
            wrong.append(f"{key} is {list(theirs.size)}, here {list(ours.size)}")
        elif theirs.dtype.is_floating_point != ours.dtype.is_floating_point:
            wrong.append(f"{key} is {theirs.dtype}, here {ours.dtype}")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(
            f"{path} holds {len(wrong)} tensors of another size or kind than this run needs: "
            f"{'; '.join(wrong[:5])}{more}. The model it was written with is another: start from its own config.json"
        )


def verify_manifest(path: Path) -> None:
    """Compares every file's size and checksum with the manifest, and looks whether `.metadata` name files of the
    checkpoint alone; ValueError naming the first that is wrong."""
    all_ranks(f"verify the checkpoint {path}", lambda: _check_my_share(path))


def whole_problem(path: Path) -> str:
    """What `verify_manifest` says, the same on all ranks; empty if the checkpoint is whole."""
    try:
        _check_my_share(path)
        mine = ""
    except (ValueError, OSError) as error:
        mine = printable(str(error))
    return "; ".join(dict.fromkeys(filter(None, gathered(mine))))


def _check_my_share(path: Path) -> None:
    check_files(path, _my_share(list(read_manifest(path).items())))
    if rank() == 0:
        read_metadata(path)


def _my_share(items: list[Item]) -> list[Item]:
    """The ranks of a run divide reading the files among themselves."""
    return items[rank() :: num_ranks()]
