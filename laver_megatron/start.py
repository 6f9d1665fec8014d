"""Where a run begins: one of four kinds, which say what is wrong, describe themselves and fill the state.

    Resume              a checkpoint, continued exactly where it stood
    CheckpointWeights   the weights of a checkpoint, with a new optimizer and a new place in the data
    HuggingFace         a text-only Qwen2.5, or a LaVer export
    Nowhere             --load is missing or names nothing that is there; its problems say so

A run directory with checkpoints of its own is resumed from the newest of them, whatever --load says.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from laver_megatron.checkpoint.choice import choose
from laver_megatron.checkpoint.directory import RUN_FILE, has_encoder, is_converted
from laver_megatron.config.fields import CHANGEABLE, Config, all_fields, field_types
from laver_megatron.hf.shape import is_laver_export
from laver_megatron.objective.schedules import ema_interval_steps, ema_momentum, learning_rate, mask_ratio
from laver_megatron.runtime.files import read_object

if TYPE_CHECKING:
    from laver_megatron.checkpoint.state import TrainingState

HF_PREFIX = "hf:"
HEAD_SIZES = ("vision_head_hidden_size", "vision_head_output_size")
# What a run that goes on from a checkpoint compares with its own settings.
_COMPARED = (
    *CHANGEABLE, *HEAD_SIZES, "mim_target", "laver", "freeze", "centre_momentum", "seq_length", "visual_seq_length",
    "seed", "train_iters",
)  # fmt: skip
_LAVER_NAMES = ("[MASK]", "vision head")


@dataclass(frozen=True, kw_only=True)
class Start:
    """What all kinds have.

    Attributes:
        model_dir: directory of the decoder's config.json and tokenizer; None if the configuration names none.
        encoder_dir: directory of the image encoder's config.json and preprocessor; None likewise.
        brings_encoder: whether the encoder's weights come with the others.
        is_own: whether they lie in the run's own directory.
    """

    model_dir: Path | None
    encoder_dir: Path | None
    brings_encoder: bool = False
    is_own: bool = False

    @property
    def directory(self) -> Path | None:
        """What the weights lie in; None where there is nothing."""
        raise NotImplementedError

    @property
    def model_of_weights(self) -> Path | None:
        """The directory whose config.json is that of the weights."""
        return self.directory

    @property
    def takes_weights_alone(self) -> bool:
        """Whether optimizer and place in the data start fresh, so that only settings of the model must agree."""
        return True

    def problems(self, config: Config, *, dry_run: bool) -> Iterator[str]:
        """What is wrong with the weights to start from. A dry run does not ask for the weights themselves."""
        raise NotImplementedError

    def trained_with(self) -> tuple[dict[str, Any] | None, str]:
        """The settings that the weights were trained with, as far as they are known, and what is wrong with the file
        that says so; None for a text-only model, which was trained elsewhere."""
        return None, ""

    def with_data_settings(self, config: Config) -> Config:
        """The configuration with what the data would propose again set as in the run that is resumed."""
        return config

    def fill(self, state: TrainingState, config: Config) -> None:
        """Fills student, teacher, optimizer and progress. Collective.

        Raises:
            ValueError: files that cannot be read or do not fit the run.
        """
        raise NotImplementedError

    def messages(self, config: Config, iteration: int) -> Iterator[str]:
        """Lines for people, once the state is filled. iteration: how many are done."""
        if note := self.taken_over(config):
            yield note
        if note := self.encoder_note(config):
            yield note

    def taken_over(self, config: Config) -> str:
        """What a run that takes weights alone takes over, initialises and leaves behind; empty when resuming."""
        then = self.trained_with()[0] if self.takes_weights_alone else None
        if then is None:
            return ""
        taken = ["encoder", "connector"] * self.brings_encoder + ["decoder"]
        made = [] if self.brings_encoder else ["connector"]
        made += ["optimizer", "place in the data"]
        left = []
        if config.objective.laver:
            (taken if then["laver"] else made).extend(_LAVER_NAMES)
            if config.start.finetune or not then["laver"]:
                made.append("teacher (the student's weights)")
        elif then["laver"]:
            left = [*_LAVER_NAMES, "teacher"]
        parts = (("taken over", taken), ("new", made), ("left behind", left))
        return "; ".join(f"{what}: {', '.join(names)}" for what, names in parts if names)

    def encoder_note(self, config: Config) -> str:
        """That an --encoder is not what is read where the weights bring their own; empty elsewhere."""
        if config.start.encoder is None or not self.brings_encoder:
            return ""
        return (
            f"the image encoder is that of {self.encoder_dir}, weights and all; "
            f"--encoder {config.start.encoder} was only compared with it by its settings"
        )


@dataclass(frozen=True, kw_only=True)
class FromCheckpoint(Start):
    """A checkpoint of this program."""

    checkpoint: Path
    passed_over: tuple[str, ...] = ()  # what is wrong with newer ones, which are not taken

    @property
    def directory(self) -> Path:
        return self.checkpoint

    def messages(self, config: Config, iteration: int) -> Iterator[str]:
        for problem in self.passed_over:
            yield f"WARNING: NOT THE NEWEST CHECKPOINT: {problem}; going back to {self.checkpoint}"
        yield from super().messages(config, iteration)

    @property
    def model_of_weights(self) -> Path:
        return self.checkpoint / "hf"

    def problems(self, config: Config, *, dry_run: bool) -> Iterator[str]:
        if config.start.finetune and not self.is_own and not self.brings_encoder:
            yield text_only_problem(config.start.load)

    def trained_with(self) -> tuple[dict[str, Any] | None, str]:
        return read_run(self.checkpoint)


@dataclass(frozen=True, kw_only=True)
class Resume(FromCheckpoint):
    """Continues a checkpoint to the last bit."""

    @property
    def takes_weights_alone(self) -> bool:
        return False

    def with_data_settings(self, config: Config) -> Config:
        """With visual_seq_length 0, which asks for a proposal, that of the checkpoint, whose place in the data counts
        packs of that size."""
        if config.data.visual_seq_length:
            return config
        then, problem = read_run(self.checkpoint)
        if problem:
            raise ValueError(problem)
        return config.replace(visual_seq_length=then["visual_seq_length"])

    def fill(self, state: TrainingState, config: Config) -> None:
        from laver_megatron.checkpoint.state import load_checkpoint  # here: checks need not wait for Megatron-Core

        load_checkpoint(self.checkpoint, state, verify=False)  # `agree_on_start` did

    def messages(self, config: Config, iteration: int) -> Iterator[str]:
        yield from super().messages(config, iteration)
        if note := self.schedule_note(config, iteration):
            yield note

    def schedule_note(self, config: Config, iteration: int) -> str:
        """That a run is resumed with another --train-iters, and what its schedules give for the next iteration now and
        gave before; empty where nothing changes."""
        train_iters = config.training.train_iters
        then = read_run(self.checkpoint)[0].get("train_iters", train_iters)
        if then == train_iters or iteration >= train_iters:
            return ""
        old, new = _schedules(config, iteration, then), _schedules(config, iteration, train_iters)
        changed = [f"{name} {new[name]:.6g} instead of {old[name]:.6g}" for name in new if old[name] != new[name]]
        same = f"for now the same learning rate {new['learning rate']:.6g}"
        return (
            f"--train-iters is {train_iters}, but {self.checkpoint} was written with {then}, and the schedules "
            f"end there: iteration {iteration + 1} has {', '.join(changed) or same}"
        )


def _schedules(config: Config, iteration: int, train_iters: int) -> Mapping[str, float]:
    """What the schedules of a run of that length say of an iteration."""
    training, objective = config.replace(train_iters=train_iters).training, config.objective
    values = {"learning rate": learning_rate(iteration, training)}
    if objective.laver:
        values |= {
            "mask ratio": mask_ratio(iteration, objective, train_iters),
            "EMA momentum": ema_momentum(iteration, objective, train_iters),
            "EMA interval": ema_interval_steps(objective, train_iters),
        }
    return values


@dataclass(frozen=True, kw_only=True)
class CheckpointWeights(FromCheckpoint):
    """Takes the student's weights of a checkpoint, because it has nothing else (it was converted) or because --finetune
    asks for them; without --finetune the teacher's, too."""

    def fill(self, state: TrainingState, config: Config) -> None:
        from laver_megatron.checkpoint.state import start_from_weights

        start_from_weights(self.checkpoint, state, take_teacher=not config.start.finetune, verify=False)


@dataclass(frozen=True, kw_only=True)
class HuggingFace(Start):
    """A Hugging Face directory: a text-only Qwen2.5, or a LaVer export, which brings its encoder and, with its training
    state, [MASK], vision head, teacher and centre."""

    hf_dir: Path
    is_export: bool

    @property
    def directory(self) -> Path:
        return self.hf_dir

    def problems(self, config: Config, *, dry_run: bool) -> Iterator[str]:
        if config.start.finetune and not self.is_export and (self.hf_dir / "config.json").is_file():
            yield text_only_problem(config.start.load)
        if not dry_run:
            from laver_megatron.hf.safetensors_reader import weight_problems  # torch: the planner needs none

            yield from weight_problems("load", self.hf_dir)

    def trained_with(self) -> tuple[dict[str, Any] | None, str]:
        return read_export(self.hf_dir) if self.is_export else (None, "")

    def fill(self, state: TrainingState, config: Config) -> None:
        from laver_megatron.hf.direct_start import load_hugging_face, load_teacher
        from laver_megatron.runtime.sharded_state import sharding_metadata

        load_hugging_face(state.stages, self.hf_dir, sharding_metadata())
        state.optimizer.reload_model_params()
        if state.teacher is not None:
            state.teacher.copy_student()
            if not config.start.finetune:
                load_teacher(state.teacher, state.centre, self.hf_dir, sharding_metadata())

    def messages(self, config: Config, iteration: int) -> Iterator[str]:
        from laver_megatron.hf.parts import has_training_state

        if config.objective.laver and self.is_export and not has_training_state(self.hf_dir):
            yield f"{self.hf_dir} brings no training state: [MASK], vision head and teacher are initialised"
        yield from super().messages(config, iteration)


@dataclass(frozen=True, kw_only=True)
class Nowhere(Start):
    """Nothing to start from."""

    @property
    def directory(self) -> None:
        return None

    def problems(self, config: Config, *, dry_run: bool) -> Iterator[str]:
        load = config.start.load
        if load is None:
            yield (
                "load is missing: weights come from --load hf:DIR or --load CHECKPOINTS "
                f"(there is no checkpoint in {config.run.run_dir}/checkpoints to resume from)"
            )
        elif load == HF_PREFIX:
            yield f"load {HF_PREFIX} names no directory; write --load {HF_PREFIX}DIR"
        elif not dry_run and not Path(load).is_dir():
            yield f"load {load}: no such directory"
        elif not dry_run and (Path(load) / "config.json").is_file():
            yield f"load {load}: this is a Hugging Face directory; write --load {HF_PREFIX}{load}"
        elif not dry_run:
            yield (
                f"load {load}: not a checkpoint; expected a checkpoints/ folder with complete "
                "iter_* folders, or one of these, which has hf/config.json"
            )


def find_start(config: Config, damaged: Mapping[Path, str] = MappingProxyType({})) -> Start:
    """Follows --load, --model, --encoder and the run directory.

    damaged: checkpoints that are known to be damaged, and why; they are passed over.

    Raises:
        ConfigError: there are checkpoints, and none is whole; or the newest is not, and --strict-load is set.
    """
    strict = config.reliability.strict_load
    load = config.start.load
    encoder_dir = Path(config.start.encoder) if config.start.encoder else None
    model_dir = Path(config.start.model) if config.start.model else None
    found = own = choose(Path(config.run.run_dir) / "checkpoints", strict=strict, damaged=damaged)
    is_hugging_face = load is not None and load.startswith(HF_PREFIX)
    if own.checkpoint is None and load is not None and not is_hugging_face:
        found = choose(Path(load), strict=strict, damaged=damaged)
    if (checkpoint := found.checkpoint) is not None:
        brings_encoder = has_encoder(checkpoint)
        is_new = is_converted(checkpoint) or (config.start.finetune and own.checkpoint is None)
        kind: type[FromCheckpoint] = CheckpointWeights if is_new else Resume
        return kind(
            checkpoint=checkpoint,
            passed_over=found.passed_over,
            is_own=own.checkpoint is not None,
            model_dir=checkpoint / "hf",
            encoder_dir=checkpoint / "encoder" if brings_encoder else encoder_dir,
            brings_encoder=brings_encoder,
        )
    if load is None or not is_hugging_face or load == HF_PREFIX:
        return Nowhere(model_dir=model_dir, encoder_dir=encoder_dir)
    hf_dir = Path(load.removeprefix(HF_PREFIX))
    is_export = is_laver_export(hf_dir)
    return HuggingFace(
        hf_dir=hf_dir,
        is_export=is_export,
        model_dir=model_dir or hf_dir,
        encoder_dir=hf_dir if is_export else encoder_dir,
        brings_encoder=is_export,
    )


def text_only_problem(load: str | None) -> str:
    """Why --finetune does not start from a language model alone."""
    return (
        f"finetune needs a model with a trained connector, but {load} is text only: it brings no "
        "encoder and no connector; load what an earlier stage has trained (RUN_DIR/checkpoints) or a LaVer export, "
        "or drop --finetune to begin with a new connector, best with --freeze encoder decoder at first"
    )


def read_run(checkpoint: Path) -> tuple[dict[str, Any], str]:
    """The configuration a checkpoint was written with (of a converted one what is known of it), and what is wrong
    with its file."""
    file = checkpoint / RUN_FILE
    if not file.is_file():
        return {}, f"{file} does not exist, so it is unknown what the checkpoint was trained with; copy it whole"
    try:
        known = read_object(file)
    except ValueError as error:
        return {}, str(error)
    if wrong := [name for name in _COMPARED if name in known and not _is_possible(name, known[name])]:
        said = ", ".join(f"{name} is {reprlib.repr(known[name])}" for name in wrong)
        return {}, f"{file} says what no run can have: {said}; copy the checkpoint again"
    if known.get("weights_only") is True:
        known["laver"] = "vision_head_output_size" in known
    return known, ""


def _is_possible(name: str, value: Any) -> bool:
    """Whether a setting can have a value, by its type and range."""
    valid = all_fields()[name].metadata["range"]
    return field_types()[name].holds(value) and (value is None or valid is None or valid.holds(value))


def read_export(directory: Path) -> tuple[dict[str, Any], str]:
    """What a LaVer export was trained with, and what is wrong with its files."""
    from laver_megatron.hf.parts import parts_of_hugging_face, settings_of_export

    try:
        known: dict[str, Any] = asdict(settings_of_export(directory))
        head = parts_of_hugging_face(directory).vision_head
    except ValueError as error:
        return {}, str(error)
    known["laver"] = head is not None
    if head is not None:
        known.update(zip(HEAD_SIZES, head, strict=True))
    return known, ""
