"""Checkpoints: student, teacher, optimizer, centre and progress as one state, in Megatron-Core's distributed format.

    RUN_DIR/checkpoints/latest                the newest complete checkpoint's iteration, as text
    RUN_DIR/checkpoints/iter_0000040/         Megatron-Core's files, loadable at any TP x PP x DP
        run.json                              the configuration it was written with
        hf/  encoder/                         config.json, tokenizer, preprocessor: what building the model needs
        manifest.json                         size and checksum of every file

A checkpoint is written into a temporary directory and renamed when it is complete, so that a directory
named `iter_...` is always whole. The teacher is stored once, as its fp32 accumulators.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint import CheckpointException

from laver_megatron.inputs import MANIFEST_FILE, RUN_FILE
from laver_megatron.model.laver import LAVER_PARTS, LaverStage
from laver_megatron.teacher import Centre, TeacherAverage

# What building the model needs besides the weights; copied as they are, never re-saved.
_MODEL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
    "added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json",
)  # fmt: skip


@dataclass
class Progress:
    """Where a run stands. Everything that changes with the step is computed from `iteration`. data_fingerprint
    names the order of packs that `consumed_packs` counts in."""

    iteration: int = 0
    consumed_packs: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped_iterations: int = 0
    data_fingerprint: str = ""


@dataclass
class TrainingState:
    """All that a checkpoint holds of a running trainer."""

    stages: Sequence[LaverStage]
    optimizer: MegatronOptimizer
    teacher: TeacherAverage | None
    centre: Centre | None
    progress: Progress


def sharding_metadata() -> dict:
    """How Megatron-Core lays out sharded state: layers by global number, optimizer states by parameter, so
    that both survive any change of TP, PP and DP."""
    return {
        "non_homogeneous_layers": True,
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _model_state(state: TrainingState, metadata: dict) -> dict:
    return {f"model{i}": stage.sharded_state_dict(metadata=metadata) for i, stage in enumerate(state.stages)}


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
    return {"optimizer": state.optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)}


def save_checkpoint(directory: Path, state: TrainingState, model_dir: Path, encoder_dir: Path, run: dict) -> Path:
    """Writes `directory/iter_...` on all ranks together and returns its path.

    model_dir, encoder_dir: Hugging Face directories whose small files are copied along. run: facts about the
    run (its configuration) that a later start may want to compare with.
    """
    final = directory / f"iter_{state.progress.iteration:07d}"
    temporary = directory / f".{final.name}.incomplete"
    _on_rank_0("make room for the checkpoint", lambda: _start_afresh(directory, temporary))
    metadata = sharding_metadata()
    sharded = _model_state(state, metadata)
    sharded.update(_optimizer_state(state, sharded, metadata, is_loading=False))
    sharded.update(_teacher_state(state, metadata, is_loading=False))
    sharded.update(progress=asdict(state.progress))
    _all_ranks("write the checkpoint", lambda: dist_checkpointing.save(sharded, str(temporary)))

    def describe() -> None:
        _copy_model_files(model_dir, temporary / "hf")
        _copy_model_files(encoder_dir, temporary / "encoder")
        _replace_text(temporary / RUN_FILE, json.dumps(run, indent=1))

    _on_rank_0("write the checkpoint", describe)
    _write_manifest(temporary)
    _on_rank_0("put the checkpoint in place", lambda: _put_in_place(temporary, final, state.progress.iteration))
    return final


def _start_afresh(directory: Path, temporary: Path) -> None:
    for abandoned in directory.glob(".iter_*.incomplete"):  # by a save that was interrupted
        shutil.rmtree(abandoned)
    temporary.mkdir(parents=True)


def _put_in_place(temporary: Path, final: Path, iteration: int) -> None:
    replaced = final.with_name(f".{final.name}.replaced.incomplete")
    if final.exists():  # saved again at the same iteration: the old one goes last
        os.replace(final, replaced)
    os.replace(temporary, final)
    _replace_text(final.with_name("latest"), str(iteration))
    _sync_directory(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def load_checkpoint(path: Path, state: TrainingState, *, weights_only: bool) -> dict:
    """Fills `state` from a checkpoint written at any layout; returns its common facts.

    weights_only (`--finetune`): student weights alone; optimizer, teacher and progress start anew, and parts
    that the checkpoint lacks (a vision head, [MASK]) keep their start values.
    """
    verify_manifest(path)
    metadata = sharding_metadata()
    model_state = _model_state(state, metadata)
    sharded = dict(model_state)
    if not weights_only:
        sharded.update(_optimizer_state(state, model_state, metadata, is_loading=True))
        sharded.update(_teacher_state(state, metadata, is_loading=True))
    may_lack = LAVER_PARTS if weights_only else ()
    _check_keys(sharded, path, may_lack, (*LAVER_PARTS, "teacher.", "optimizer.") if weights_only else ())
    loaded = _all_ranks(f"read the checkpoint {path}", lambda: _load(sharded, path))
    for i, stage in enumerate(state.stages):
        stage.load_state_dict(loaded[f"model{i}"], strict=False)
    if weights_only:
        state.optimizer.reload_model_params()
        if state.teacher is not None:
            state.teacher.copy_student()
        return loaded
    if "optimizer" in loaded:
        state.optimizer.load_state_dict(loaded["optimizer"])
    if state.teacher is not None:
        state.teacher.load_sharded_state(loaded["teacher"])
    if state.centre is not None:
        state.centre.value_K.copy_(loaded["centre"])
    if loaded["progress"]["data_fingerprint"] != state.progress.data_fingerprint:
        raise ValueError(
            f"{path} stands at pack {loaded['progress']['consumed_packs']} of other data: the shards, --seq-length, "
            "--visual-seq-length, --seed, tokenizer or encoder have changed since; --finetune in another --run-dir "
            "starts on the new data with the weights alone"
        )
    for name, value in loaded["progress"].items():
        setattr(state.progress, name, value)
    return loaded


def _load(sharded: dict, path: Path) -> dict:
    # Keys that the checkpoint lacks are dropped; `_check_keys` has judged them.
    loaded, *_ = dist_checkpointing.load(sharded, str(path), strict=StrictHandling.RETURN_UNEXPECTED)
    return loaded


def _check_keys(sharded: dict, path: Path, may_lack: tuple[str, ...], may_ignore: tuple[str, ...]) -> None:
    """Compares what all ranks together ask for with what the checkpoint holds; ValueError if either has more.

    may_lack: beginnings of keys that the checkpoint may be without; may_ignore: of those nobody need ask for.
    """
    stored = _all_ranks(f"read the checkpoint {path}", lambda: set(load_sharded_metadata(str(path))))
    mine = {entry.key for entry in nested_values(extract_sharded_base(load_preprocess(sharded)[0])[0])}
    of_ranks: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(of_ranks, mine)
    asked = set().union(*of_ranks)
    for keys, ignored, problem in (
        (asked - stored, may_lack, "lacks {} of the tensors that this run needs"),
        (stored - asked, may_ignore, "holds {} tensors that this run has no place for"),
    ):
        # Extra states are TransformerEngine's notes for fp8, which nothing here uses.
        wrong = sorted(key for key in keys if not key.startswith(ignored) and "._extra_state" not in key)
        if wrong:
            raise ValueError(
                f"{path} {problem.format(len(wrong))}, such as {', '.join(wrong[:3])}; was it trained with other "
                "parts (--laver, --centre-momentum)? --finetune takes the weights alone"
            )


def _all_ranks(action: str, work: Callable[[], Any]) -> Any:
    """Runs `work` and, if it fails anywhere, fails everywhere with the first reason instead of hanging."""
    result, problem = None, None
    try:
        result = work()
    except (Exception, CheckpointingException, CheckpointException) as error:
        problem = f"{type(error).__name__}: {error}"
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    failed = [(rank, text) for rank, text in enumerate(problems) if text]
    if failed:
        raise ValueError(f"could not {action}: rank {failed[0][0]}: {failed[0][1]}")
    return result


def _on_rank_0(action: str, work: Callable[[], None]) -> None:
    """Runs `work` on rank 0 while the others wait; fails everywhere if it fails there."""
    _all_ranks(action, work if dist.get_rank() == 0 else lambda: None)


def _copy_model_files(source: Path, target: Path) -> None:
    target.mkdir()
    for name in _MODEL_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


# --- manifest: Megatron-Core loads corrupted payload bytes without a word ---


def _checksum(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _my_share(files: list[Path]) -> list[Path]:
    """The ranks of a run divide reading the files among themselves."""
    return files[dist.get_rank() :: dist.get_world_size()]


def _write_manifest(path: Path) -> None:
    files = sorted(p for p in path.rglob("*") if p.is_file())

    def describe() -> dict[str, tuple[int, str]]:
        for file in _my_share(files):
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        return {str(p.relative_to(path)): (p.stat().st_size, _checksum(p)) for p in _my_share(files)}

    mine = _all_ranks("checksum the checkpoint", describe)
    parts: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, mine)

    def write() -> None:
        merged = {name: entry for part in parts for name, entry in part.items()}
        _replace_text(path / MANIFEST_FILE, json.dumps(dict(sorted(merged.items())), indent=1))
        _sync_directory(path)

    _on_rank_0("write the manifest", write)


def verify_manifest(path: Path) -> None:
    """Compares every file's size and checksum with the manifest; ValueError naming the first that differs."""

    def verify() -> None:
        manifest_path = path / MANIFEST_FILE
        if not manifest_path.is_file():
            raise ValueError(f"{path} has no manifest.json: it is not a complete checkpoint of this program")
        try:
            manifest = json.loads(manifest_path.read_text())
        except ValueError as error:
            raise ValueError(f"{manifest_path} is damaged: {error}") from error
        for file in _my_share([path / name for name in manifest]):
            size, checksum = manifest[str(file.relative_to(path))]
            if not file.is_file():
                raise ValueError(f"{file} is missing from the checkpoint")
            if file.stat().st_size != size:
                raise ValueError(f"{file} has {file.stat().st_size} bytes, the manifest says {size}")
            if _checksum(file) != checksum:
                raise ValueError(f"{file} is damaged: its checksum differs from the manifest's")

    _all_ranks(f"verify the checkpoint {path}", verify)


def _replace_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
