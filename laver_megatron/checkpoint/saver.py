"""Saving: one checkpoint at a time on its way to the disk, while training goes on, and its publication by all ranks.

A checkpoint is written into a temporary directory and renamed when every rank has written its part, so that a
directory named `iter_...` is always whole. What goes before a rename is flushed to the disk before it.
"""

import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from laver_megatron.checkpoint.about import ABOUT_FILE, about
from laver_megatron.checkpoint.directory import RUN_FILE, iteration_directory, iteration_of, set_latest
from laver_megatron.checkpoint.manifest import describe, write_manifest
from laver_megatron.checkpoint.retention import delete_superfluous
from laver_megatron.checkpoint.state import TrainingState, state_to_save
from laver_megatron.checkpoint.writer import RankWriter, needed
from laver_megatron.config.reliability_fields import ReliabilityConfig
from laver_megatron.hf.files import copy_model_files
from laver_megatron.hf.shape import TEXT_PART, VISION_PART
from laver_megatron.runtime.engine import finish_save, plan_save
from laver_megatron.runtime.files import put_in_place, sync_directory, sync_file, write_json, write_text
from laver_megatron.runtime.ranks import all_ranks, gathered, on_every_rank, on_rank_0, rank
from laver_megatron.runtime.terminal import say

_LOOK_SECONDS = 10.0


class Saver:
    """Writes checkpoints of a run into its checkpoints/ folder. All methods but `close` are collective.

    Args:
        model_dir, encoder_dir: Hugging Face directories whose small files are copied along. They are read now: after a
            resume they belong to a checkpoint, which may be deleted before the next save.
        run: the run's configuration, with which a later start is compared.
        settings: whether training goes on meanwhile, what a failure means, which checkpoints stay.
        losses: gives the losses of the validations so far, by iteration.
    """

    def __init__(
        self,
        directory: Path,
        model_dir: Path,
        encoder_dir: Path,
        run: Mapping[str, Any],
        settings: ReliabilityConfig,
        losses: Callable[[], Mapping[int, float]] = dict,
    ) -> None:
        self.directory, self.settings = directory, settings
        self._run, self._losses = run, losses
        self._model_files = _read_model_files(model_dir, encoder_dir) if rank() == 0 else {}
        self._writer: RankWriter | None = None
        self._final = directory
        self._started = 0.0
        self.stopped_seconds = 0.0  # how long training stood still for the last save

    def save(self, state: TrainingState, *, last: bool) -> None:
        """Begins a checkpoint, after the one before is published. last: it is on the disk when this returns, and a
        failure is an error whatever the settings say."""
        self._publish(must=False)
        self._started = time.perf_counter()
        try:
            self._begin(state, background=self.settings.async_save and not last)
        except (OSError, ValueError) as error:
            self._fail(error, must=last)
            return
        self.stopped_seconds = time.perf_counter() - self._started
        if last or not self.settings.async_save:
            self._publish(must=last)

    @property
    def is_writing(self) -> bool:
        """Whether this rank has something on its way to the disk."""
        return self._writer is not None and not self._writer.is_written

    def publish(self) -> None:
        """Waits for a checkpoint that is on its way, and gives it its name."""
        self._publish(must=False)

    def publish_when_written(self) -> None:
        """At a step's end: gives the checkpoint its name if all ranks have written their parts of it."""
        if self._writer is not None and on_every_rank(self._writer.is_written):
            self._publish(must=False)

    def close(self) -> None:
        """Gives up what is not on the disk yet."""
        if self._writer is not None:
            self._writer.abandon()

    @property
    def _temporary(self) -> Path:
        return self._final.with_name(f".{self._final.name}.incomplete")

    def _begin(self, state: TrainingState, *, background: bool) -> None:
        self._final = iteration_directory(self.directory, state.progress.iteration)
        temporary = self._temporary
        on_rank_0("make room for the checkpoint", lambda: _make_temporary(self.directory, temporary))
        progress = vars(state.progress)
        told = about(progress) if rank() == 0 else {}  # now: progress goes on

        def small_files() -> list[Path]:
            return self._write_small_files(temporary, told) if rank() == 0 else []

        planned = plan_save(state_to_save(state), temporary)
        buckets = planned.writer.write_buckets
        num_bytes = sum(gathered(sum(tensor.nbytes for *_, (_, tensors) in buckets for _, tensor in tensors)))
        on_rank_0("write the checkpoint", lambda: _check_space(temporary, num_bytes))
        # The copy may need more memory than one of the hosts has.
        self._writer = all_ranks(
            "copy what the checkpoint holds",
            lambda: RankWriter(planned, temporary, background=background, small_files=small_files),
        )
        self._writer.start()

    def _write_small_files(self, directory: Path, told: dict[str, Any]) -> list[Path]:
        for name, content in self._model_files.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(content)
        write_text(directory / RUN_FILE, json.dumps(self._run, indent=1))
        write_json(directory / ABOUT_FILE, told)
        return [directory / name for name in (*self._model_files, RUN_FILE, ABOUT_FILE)]

    def _publish(self, *, must: bool) -> None:
        if self._writer is None:
            return
        # Each look is a collective of its own: none waits longer for a disk. A rank that has written waits there, one
        # that writes waits for its thread, and the watchdog tells them apart.
        began = time.perf_counter()
        while not on_every_rank(self._writer.wait(_LOOK_SECONDS)):
            pass
        try:
            self._finish(self._writer)
        except (OSError, ValueError) as error:
            self._fail(error, must=must)
            return
        finally:
            self._writer = None
        self.stopped_seconds += time.perf_counter() - began
        seconds = time.perf_counter() - self._started
        aside = f", training stood still for {self.stopped_seconds:.1f} s" if self.settings.async_save else ""
        say(f"saved {self._final} in {seconds:.1f} s{aside}")

    def _finish(self, writer: RankWriter) -> None:
        all_ranks(f"write the checkpoint {self._final}", writer.raise_error)
        places, entries = gathered(writer.places), gathered(writer.entries)

        def give_name() -> None:
            temporary = self._temporary
            finish_save(writer.planned, places, temporary)
            known = {name: entry for part in entries for name, entry in part.items()}
            for name in (".metadata", "metadata.json"):
                sync_file(temporary / name)
                known[name] = describe(temporary / name)
            for folder in (path for path in temporary.rglob("*") if path.is_dir()):
                sync_directory(folder)
            write_manifest(temporary, known)  # flushed, with the directory itself
            put_in_place(temporary, self._final)
            set_latest(self.directory, iteration_of(self._final))
            sync_directory(self.directory)

        on_rank_0(f"put the checkpoint {self._final} in place", give_name)
        on_rank_0("delete old checkpoints", self._delete_old)

    def _delete_old(self) -> None:
        delete_superfluous(self.directory, self._final, self.settings, self._losses())

    def _fail(self, error: OSError | ValueError, *, must: bool) -> None:
        """Removes what has been written at once; then raises the error, or says it."""
        on_rank_0("remove the unfinished checkpoint", lambda: shutil.rmtree(self._temporary, ignore_errors=True))
        if must or self.settings.save_failure == "stop" or isinstance(error, ValueError):
            raise error
        say(f"WARNING: NO CHECKPOINT was written: {error}; training goes on (--save-failure continue)")


def save_checkpoint(
    directory: Path, state: TrainingState, model_dir: Path, encoder_dir: Path, run: Mapping[str, Any]
) -> Path:
    """Writes `directory/iter_...` on all ranks together and returns its path."""
    Saver(directory, model_dir, encoder_dir, run, ReliabilityConfig()).save(state, last=True)
    return iteration_directory(directory, state.progress.iteration)


def _read_model_files(model_dir: Path, encoder_dir: Path) -> dict[str, bytes]:
    """The small files of a checkpoint's hf/ and encoder/, by their paths in it.

    Raises:
        ValueError: a directory without a config.json.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy_model_files(model_dir, Path(folder) / "hf", TEXT_PART)
        copy_model_files(encoder_dir, Path(folder) / "encoder", VISION_PART)
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        contents = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    for directory, part in ((model_dir, "hf"), (encoder_dir, "encoder")):
        if f"{part}/config.json" not in contents:
            raise ValueError(
                f"{directory} has no config.json, without which no checkpoint can be loaded; copy it again"
            )
    return contents


def _make_temporary(directory: Path, temporary: Path) -> None:
    for abandoned in directory.glob(".iter_*"):  # by a save that was interrupted
        if abandoned.is_dir() and not abandoned.is_symlink():
            shutil.rmtree(abandoned)
        else:
            abandoned.unlink()
    temporary.mkdir(parents=True)


def _check_space(directory: Path, num_bytes: int) -> None:
    """Raises OSError if it is known beforehand that the disk is too small."""
    if shutil.disk_usage(directory).free < num_bytes:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}; {needed(num_bytes, directory)}", str(directory))
