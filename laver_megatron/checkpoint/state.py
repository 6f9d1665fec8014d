"""Checkpoints: student, teacher, optimizer, centre and progress as one state, in Megatron-Core's distributed format.

A checkpoint is written into a temporary directory and renamed when it is complete, so that a directory
named `iter_...` is always whole. The teacher is stored once, as its fp32 accumulators.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from megatron.core.optimizer import MegatronOptimizer

from laver_megatron.checkpoint.directory import RUN_FILE, has_encoder, iteration_directory, set_latest
from laver_megatron.checkpoint.manifest import Entry, check_files, describe, files_of, read_manifest, write_manifest
from laver_megatron.checkpoint.progress import Progress
from laver_megatron.config.modules import MODULES
from laver_megatron.hf.files import copy_model_files
from laver_megatron.hf.shape import TEXT_PART, VISION_PART
from laver_megatron.model.laver import LaverStage
from laver_megatron.model.teacher import Centre, TeacherAverage
from laver_megatron.runtime.engine import Stored, load_sharded, stored_tensors
from laver_megatron.runtime.files import put_in_place, sync_directory, sync_file, write_text
from laver_megatron.runtime.ranks import all_ranks, gathered, num_ranks, on_rank_0, rank
from laver_megatron.runtime.sharded_state import sharding_metadata

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


def save_checkpoint(directory: Path, state: TrainingState, model_dir: Path, encoder_dir: Path, run: dict) -> Path:
    """Writes `directory/iter_...` on all ranks together and returns its path.

    Args:
        model_dir, encoder_dir: Hugging Face directories whose small files are copied along.
        run: the run's configuration, with which a later start is compared.
    """
    final = iteration_directory(directory, state.progress.iteration)
    temporary = directory / f".{final.name}.incomplete"
    on_rank_0("make room for the checkpoint", lambda: _make_temporary(directory, temporary))
    metadata = sharding_metadata()
    sharded = _model_state(state.stages, metadata)
    sharded.update(_optimizer_state(state, sharded, metadata, is_loading=False))
    sharded.update(_teacher_state(state, metadata, is_loading=False))
    sharded.update(progress=gathered(asdict(state.progress))[0])  # each rank's clock says something else
    all_ranks("write the checkpoint", lambda: dist_checkpointing.save(sharded, str(temporary)))

    def describe_run() -> None:
        copy_model_files(model_dir, temporary / "hf", TEXT_PART)
        copy_model_files(encoder_dir, temporary / "encoder", VISION_PART)
        write_text(temporary / RUN_FILE, json.dumps(run, indent=1))

    on_rank_0("write the checkpoint", describe_run)
    _write_manifest(temporary)

    def put_final_name() -> None:
        put_in_place(temporary, final)
        set_latest(directory, state.progress.iteration)
        sync_directory(directory)

    on_rank_0("put the checkpoint in place", put_final_name)
    return final


def _make_temporary(directory: Path, temporary: Path) -> None:
    for abandoned in directory.glob(".iter_*"):  # by a save that was interrupted
        shutil.rmtree(abandoned)
    temporary.mkdir(parents=True)


def load_checkpoint(path: Path, state: TrainingState) -> None:
    """Fills `state` from a checkpoint written at any layout, to resume exactly.

    Raises:
        ValueError: damaged files, tensors that either side has no counterpart for, other data.
    """
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


def start_from_weights(path: Path, state: TrainingState, *, take_teacher: bool) -> None:
    """Fills the student from a checkpoint; optimizer and progress stay new. Parts that the checkpoint lacks (a
    vision head, [MASK]; encoder and connector of a text-only one) keep their start values.

    take_teacher: the teacher is the checkpoint's, where it has one, instead of a copy of the student.
    """
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


def _write_manifest(path: Path) -> None:
    files = _my_share(files_of(path))

    def describe_files() -> dict[str, Entry]:
        for file in files:
            sync_file(file)
        return {str(file.relative_to(path)): describe(file) for file in files}

    parts = gathered(all_ranks("checksum the checkpoint", describe_files))
    merged = {name: entry for part in parts for name, entry in part.items()}
    on_rank_0("write the manifest", lambda: write_manifest(path, merged))


def verify_manifest(path: Path) -> None:
    """Compares every file's size and checksum with the manifest; ValueError naming the first that differs."""

    def verify() -> None:
        check_files(path, _my_share(list(read_manifest(path).items())))

    all_ranks(f"verify the checkpoint {path}", verify)


def _my_share(items: list[Item]) -> list[Item]:
    """The ranks of a run divide reading the files among themselves."""
    return items[rank() :: num_ranks()]
