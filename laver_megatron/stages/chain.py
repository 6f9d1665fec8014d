"""Several stages of training in order, each from the one before: finished ones are skipped, interrupted ones resume.

A stage is a configuration file; `examples/pretrain_laver.sh` runs it, as by hand. All stages are checked together
before the first begins, so that a mistake in the last file does not take days to show.

The baseline arm is the same stages without LaVer: the same files and flags, thus the same data in the same order, the
same seeds, attention and positions, in run directories of their own. Stages that have LaVer off in any case are the
same in both arms up to the first that has not; once finished in the one, they are taken for the other.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path

from laver_megatron.checkpoint.choice import choose
from laver_megatron.checkpoint.directory import RUN_FILE, latest_checkpoint
from laver_megatron.config.checks import check
from laver_megatron.config.command_line import Invocation, read_command_line
from laver_megatron.config.continuity import unasked_changes
from laver_megatron.config.directories import shard_problems
from laver_megatron.config.fields import Config, ConfigError, all_fields
from laver_megatron.config.options import is_required
from laver_megatron.launcher import LAUNCHER, count_processes
from laver_megatron.resilience.signals import STOP_SIGNALS
from laver_megatron.run_log.run_summary import hashed_settings
from laver_megatron.runtime.files import read_object
from laver_megatron.start import HF_PREFIX, FromCheckpoint, find_start, impossible_settings

BASELINE = "-baseline"
# Exit status of a chain that has stopped where it was told to, before its end.
EXIT_UNFINISHED = 3
# A stage has its own in its file, or they follow from the order of the stages and from --runs and --baseline.
_STAGE_FLAGS = (
    "--config", "--run-dir", "--finetune", "--no-finetune", "--laver", "--no-laver", "--print-config",
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """One stage of a chain.

    Attributes:
        file: its configuration file.
        config: what its arguments describe.
        arguments: of the launcher, the file and flags.
        is_shared: whether it is the other arm's.
    """

    file: str
    config: Config
    arguments: tuple[str, ...]
    is_shared: bool = False

    @property
    def name(self) -> str:
        return Path(self.file).stem

    @property
    def checkpoint(self) -> Path | None:
        """The newest whole one, which its next start would go on from. Raises ConfigError as `choose` does."""
        return choose(Path(self.config.run.run_dir) / "checkpoints").checkpoint

    @property
    def iteration(self) -> int:
        """How far it has come; 0 without a checkpoint."""
        return 0 if self.checkpoint is None else int(self.checkpoint.name.removeprefix("iter_"))

    @property
    def is_finished(self) -> bool:
        return self.iteration >= self.config.training.train_iters


def read_stages(
    files: Sequence[str], flags: Sequence[str] = (), *, baseline: bool = False, runs: str | None = None
) -> list[Stage]:
    """The stages that configuration files and flags for all of them describe; the flag --load is the first one's.

    runs: a folder that takes the place of the files' run directories: RUNS/STEM-OF-THE-FILE for each.

    Raises:
        ConfigError: all that is wrong with the files as a chain, whatever is there to start from.
    """
    given = _read_files(files, flags)
    own_dirs = [str(Path(runs) / stage.name) if runs else stage.config.run.run_dir for stage in given]
    stages = _place_stages(given, own_dirs)
    if baseline:
        beside = [f"{os.path.normpath(run_dir)}{BASELINE}" for run_dir in own_dirs]
        num_shared = 0
        while num_shared < len(stages) and _is_shared(stages[num_shared], beside[num_shared]):
            num_shared += 1
        stages = _place_stages(given, own_dirs[:num_shared] + beside[num_shared:], baseline_from=num_shared)
    run_dirs = [os.path.normpath(stage.config.run.run_dir) for stage in stages]
    if len(set(run_dirs)) < len(run_dirs):
        raise ConfigError([f"the run directories of the stages must differ, but they are {', '.join(run_dirs)}"])
    return stages


def _read_files(files: Sequence[str], flags: Sequence[str]) -> list[Stage]:
    """Each file with its flags; ConfigError for what is wrong with one of them, or with two that follow each other."""
    problems = [
        f"{flag} belongs to each stage and cannot be given to all of them; write it in the files"
        + (" (or use --baseline or --runs)" if "laver" in flag or "run-dir" in flag else "")
        for flag in (word.split("=", 1)[0] for word in flags)
        if flag in _STAGE_FLAGS
    ]
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--load", nargs="?")
    later_flags = parser.parse_known_args(flags)[1]
    given: list[Stage] = []
    for number, file in enumerate(files):
        arguments = ["--config", file, *(later_flags if number else flags)]
        try:
            given.append(Stage(file, read_command_line(arguments).config, tuple(arguments)))
        except ConfigError as error:
            problems += error.problems
    if not problems:
        problems = [problem for before, stage in pairwise(given) for problem in _link_problems(before, stage)]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))  # what is wrong with a flag is found with every file
    return given


def _link_problems(before: Stage, stage: Stage) -> list[str]:
    """What keeps a stage from starting from the one before it."""
    config, earlier, file = stage.config, before.config, stage.file
    problems = []
    if _path_within(config.start.load, earlier.run.run_dir) not in _checkpoints_of(earlier):
        problems.append(
            f"{file}: load is {config.start.load}, but the stage before it leaves its last checkpoint in "
            f"{earlier.run.run_dir}/checkpoints; set load to that"
        )
    if not config.start.finetune:
        problems.append(f"{file}: a stage takes only the weights of the one before; set finetune: true")
    then = earlier.flat()
    if None in (config.model.encoder_feature_layer, earlier.model.encoder_feature_layer):
        del then["encoder_feature_layer"]  # the encoder decides; the stage is checked again when it starts
    changes = unasked_changes(config, then, f"the stage before it ({earlier.run.run_dir}) has")
    return [*problems, *(f"{file}: {change}" for change in changes)]


def _checkpoints_of(before: Config) -> set[str]:
    """Where a run leaves checkpoints, below its directory."""
    iterations = {before.training.train_iters}
    if before.run.save_interval is not None:
        iterations.update(range(before.run.save_interval, before.training.train_iters, before.run.save_interval))
    return {"checkpoints", *(f"checkpoints/iter_{iteration:07d}" for iteration in iterations)}


def _path_within(load: str | None, run_dir: str) -> str | None:
    """The rest of `load` if it lies in `run_dir`."""
    if load is None or load.startswith(HF_PREFIX):
        return None
    rest = os.path.relpath(load, run_dir)
    return None if rest.split(os.sep)[0] == os.pardir else rest


def _is_shared(stage: Stage, beside: str) -> bool:
    """Whether a finished stage of the other arm serves the baseline, too; not if the baseline's own was begun."""
    begun = latest_checkpoint(Path(beside) / "checkpoints") is not None
    return not stage.config.objective.laver and not begun and stage.is_finished and not differences(stage)


def _place_stages(given: Sequence[Stage], run_dirs: Sequence[str], *, baseline_from: int | None = None) -> list[Stage]:
    """The stages in their run directories, each one's --load in that of the one before. baseline_from: the first stage
    that is the baseline's own, those before being shared; None: none is."""
    stages = []
    for i, stage in enumerate(given):
        arguments = [*stage.arguments]
        if run_dirs[i] != stage.config.run.run_dir:
            arguments += ["--run-dir", run_dirs[i]]
        if i > 0 and run_dirs[i - 1] != (own_dir := given[i - 1].config.run.run_dir):
            rest = _path_within(stage.config.start.load, own_dir)
            assert rest is not None
            arguments += ["--load", str(Path(run_dirs[i - 1]) / rest)]
        if baseline_from is not None and stage.config.objective.laver:
            arguments.append("--no-laver")
        is_shared = baseline_from is not None and i < baseline_from
        stages.append(Stage(stage.file, read_command_line(arguments).config, tuple(arguments), is_shared))
    return stages


def check_stages(stages: Sequence[Stage], *, dry_run: bool = False) -> None:
    """Checks of all unfinished stages what can be checked before they start. dry_run: also without shards.

    Raises:
        ConfigError: everything found, with the stages' names.
    """
    problems: list[str] = []
    first = stages[0].config
    # Until a stage before has written a checkpoint, its model and encoder say what the later ones will find.
    known = find_start(first)
    model, encoder = (str(path) if path else None for path in (known.model_dir, known.encoder_dir))
    for stage in stages:
        if stage.is_finished:
            continue
        config = stage.config
        if not isinstance(find_start(config), FromCheckpoint):
            config = config.replace(model=config.start.model or model, encoder=config.start.encoder or encoder)
        try:
            # Every stage sees for itself what it can start from, when it starts.
            check(Invocation(config, dry_run=True, dry_run_world_size=_num_processes(stage)))
        except ConfigError as error:
            problems += [f"{stage.name}: {problem}" for problem in error.problems]
        if not dry_run:
            problems += [f"{stage.name}: {problem}" for problem in shard_problems(config)]
    if problems:
        raise ConfigError(problems)


def _num_processes(stage: Stage) -> int | None:
    """How many the launcher will start for a stage on all nodes; None where this machine cannot know."""
    try:
        return prod(count_processes(stage.arguments))
    except ValueError:  # such as `gpu`, on a machine without any
        return None


def differences(stage: Stage) -> list[str]:
    """Settings that change the outcome and are not those of the newest checkpoint; ConfigError if those cannot be."""
    assert stage.checkpoint is not None
    file = stage.checkpoint / RUN_FILE
    written = read_object(file)
    compared = hashed_settings(stage.config.objective.laver) - {"eval_iters"} | {"seed"}
    if problem := impossible_settings(file, written, sorted(compared)):
        raise ConfigError([problem])
    now = json.loads(json.dumps(stage.config.flat()))
    if not now["visual_seq_length"]:  # proposed by the data, which are compared themselves
        del now["visual_seq_length"]
    if now["encoder_feature_layer"] is None:  # the encoder's own
        del now["encoder_feature_layer"]
    # What came after the checkpoint's version was at its default.
    defaults = {name: None if is_required(item) else item.default for name, item in all_fields().items()}
    return [name for name in now if name in compared and now[name] != written.get(name, defaults[name])]


def run_stages(stages: Sequence[Stage]) -> int:
    """Runs what is not finished yet, in order. Returns the exit status: 0 if all stages are finished, that of the
    first one that failed, EXIT_UNFINISHED if one has stopped early (--exit-interval)."""
    for number, stage in enumerate(stages, start=1):
        title = f"stage {number} of {len(stages)}, {stage.name}"
        config = stage.config
        if stage.is_finished:
            shared = ", the same in both arms" if stage.is_shared else ""
            say(f"{title}: finished at iteration {stage.iteration} in {config.run.run_dir}{shared}")
            if changed := differences(stage):
                say(f"{title}: {', '.join(changed)} differ now from what it was run with; remove it to run it again")
            continue
        verb = f"resuming at iteration {stage.iteration}" if stage.iteration else "starting"
        say(f"{title}: {verb} in {config.run.run_dir}")
        if status := _launch(stage.arguments):
            say(f"{title}: ended with exit status {status}; fix what it reported; the same command then resumes")
            return status
        if not stage.is_finished:
            say(
                f"{title}: stopped at iteration {stage.iteration} of {config.training.train_iters}; "
                "the same command resumes"
            )
            return EXIT_UNFINISHED
    return 0


def _launch(arguments: Sequence[str]) -> int:
    """Runs the launcher; its exit status, 128 + n if signal n ended it."""
    # The launcher looks for torchrun and python3: those of this environment, activated or not.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    process = subprocess.Popen(["bash", str(LAUNCHER), *arguments], env={**os.environ, "PATH": path})

    def pass_on(number: int, frame: object) -> None:
        # Ctrl-C reaches the launcher, which shares the terminal, by itself.
        if number != signal.SIGINT:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status


def is_first_node() -> bool:
    """By what the launcher reads."""
    return os.environ.get("NODE_RANK", os.environ.get("SLURM_NODEID", "0")) == "0"


def say(message: str) -> None:
    """One line on the first node."""
    if is_first_node():
        print(message, file=sys.stderr, flush=True)
