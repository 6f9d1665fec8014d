"""The configuration: frozen dataclasses, one a section, whose fields are the YAML keys and, with dashes, the flags.

Nothing here looks at files, devices or models. `command_line.py` fills a `Config`, `checks.py` judges it.
Every field carries its help text and, where it has them, its choices and the range of its values; the help page, the
type and range checks, the JSON schema and the written YAML are all made from these. YAML and flags are flat: a key
belongs to one section, and its section is not written.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from laver_megatron.config.engine_fields import EngineConfig
from laver_megatron.config.modules import MODULES
from laver_megatron.config.options import (
    ABOVE_ZERO,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    FieldType,
    field_type,
    option,
    yaml_line,
)
from laver_megatron.config.reliability_fields import ReliabilityConfig
from laver_megatron.config.training_fields import TrainingConfig

ATTENTIONS = ("mixed", "causal")
POSITIONS = ("2d", "1d", "mrope")
# What the tensors of a checkpoint do not show: a later stage changes it only where it is asked to.
CHANGEABLE = ("attention", "positions", "encoder_feature_layer")

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # The method as the paper prints it.
    "paper": {
        "mask_sampling": "bernoulli",
        "mask_ratio_schedule": "constant",
        "ema_momentum_schedule": "constant",
        "centre_momentum": None,
        "ema_interval": 1,
        "gram_loss": "cga",
        "gram_reduction": "mean",
        "positions": "2d",
    },
    # The settings of the published code's second stage; the loss stays ours: clipped, one image at a time.
    "official-settings": {
        "mask_sampling": "fixed",
        "mask_ratio": 0.05,
        "mask_ratio_schedule": "cosine",
        "centre_momentum": 0.9,
        "ema_momentum": 0.95,
        "ema_momentum_schedule": "cosine",
        "ema_interval": 0.02,
        "gram_loss": "cga",
        "positions": "mrope",
    },
}


class ConfigError(ValueError):
    """Everything that is wrong with what the user gave, in one exception: `problems`, one sentence each."""

    def __init__(self, problems: typing.Sequence[str]) -> None:
        assert problems, "a ConfigError needs at least one problem"
        self.problems = tuple(problems)
        noun = "problem" if len(self.problems) == 1 else "problems"
        lines = "".join(f"\n  - {problem}" for problem in self.problems)
        super().__init__(f"{len(self.problems)} {noun} in the configuration:{lines}")


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """Where a run begins: weights, and the directories that say what they belong to."""

    model: str | None = option(
        "Hugging Face directory with config.json and tokenizer; without it, that "
        "of --load (hf:DIR, or hf/ in the checkpoint)",
        default=None,
    )
    load: str | None = option(
        "where weights come from: hf:DIR (safetensors) or a checkpoint of this "
        "program (its checkpoints/ folder, or one iter_* folder in it)",
        default=None,
    )
    finetune: bool = option(
        "begin the next stage: take only the weights of --load, connector included, and start at iteration 0 with a "
        "new optimizer and, with LaVer, the student's weights for a teacher; a run directory with a checkpoint of its "
        "own is resumed from it",
        default=False,
    )
    encoder: str | None = option(
        "Hugging Face directory of the image encoder (docs/encoders.md lists the kinds); without it, encoder/ in the "
        "checkpoint of --load",
        default=None,
    )
    allow_change: tuple[str, ...] = option(
        "settings that may differ from those the checkpoint was trained with; otherwise that is an error",
        choices=CHANGEABLE,
        default=(),
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What of the model is a choice, and which parts of it train."""

    encoder_feature_layer: int | None = option(
        "which of the encoder's hidden states become visual features: 0 is its embedding, -1 its last layer (default: "
        "as is usual for its kind)",
        default=None,
    )
    attention: str = option(
        "of the language stream; mixed: visual tokens also see the rest of their own image; causal: every token sees "
        "only what precedes it. Reconstruction is bidirectional within each image either way",
        choices=ATTENTIONS,
        default="mixed",
    )
    positions: str = option(
        "rotary positions of visual tokens: row and column interleaved over the "
        "frequencies (2d), the token's index (1d), or contiguous sections (mrope)",
        choices=POSITIONS,
        default="2d",
    )
    attention_kernel: str = option(
        "dense: the reference, runs anywhere; flex: FlexAttention, CUDA only; flash: FlashAttention, CUDA and bf16 "
        "only; auto: flash on CUDA where it can compute the run, else flex; dense on CPU",
        choices=("auto", "dense", "flex", "flash"),
        default="auto",
    )
    freeze: tuple[str, ...] = option("modules that are not trained", choices=tuple(MODULES), default=("encoder",))


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the processes divide the model. Names are Megatron-Core's."""

    tensor_model_parallel_size: int = option("ranks that share each layer", valid=POSITIVE, default=1)
    pipeline_model_parallel_size: int = option("stages the layers are divided into", valid=POSITIVE, default=1)
    num_layers_per_virtual_pipeline_stage: int | None = option(
        "layers of one chunk of the interleaved schedule; none: not interleaved", valid=POSITIVE, default=None
    )
    sequence_parallel: bool = option(
        "split activations along the sequence between the tensor-parallel ranks", default=False
    )
    decoder_first_pipeline_num_layers: int | None = option(
        "layers of the first stage of an uneven split", valid=POSITIVE, default=None
    )
    decoder_last_pipeline_num_layers: int | None = option(
        "layers of the last stage of an uneven split", valid=POSITIVE, default=None
    )
    recompute_granularity: str | None = option(
        "what the backward pass computes again to save memory: whole layers (full), or --recompute-modules (selective; "
        "its default saves memory with attention kernel dense alone)",
        choices=("full", "selective"),
        default=None,
    )
    distributed_timeout_minutes: int | None = option(
        "minutes a collective may take before the run ends; the watchdog's limits, such as --step-timeout-minutes, are "
        "then at most 80% of it (default: two minutes more than the longest of these)",
        valid=POSITIVE,
        default=None,
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a run reads, and how samples become packs and batches."""

    data_path: tuple[str, ...] = option(
        "training data: folders of shards, .parquet indexes (a subset, remote shards), tar files or globs of them"
    )
    data_weights: tuple[float, ...] | None = option(
        "how often each entry of --data-path is repeated in an epoch, such as 1 0.5 2 (default: each once)",
        default=None,
    )
    valid_data_path: tuple[str, ...] | None = option("held-out data, in the same forms", default=None)
    seq_length: int = option("tokens of a pack in the language-model stream, visual tokens included", valid=POSITIVE)
    visual_seq_length: int = option(
        "visual tokens a pack can hold; 0: as many as fill the packs best, proposed from the data",
        valid=NOT_NEGATIVE,
        default=0,
    )
    max_image_tokens: int | None = option(
        "visual tokens of one image at most: larger pictures are shrunk to it for an encoder of native resolution, and "
        "are an error with one of fixed resolution (default: as the encoder's image processor says)",
        valid=POSITIVE,
        default=None,
    )
    shuffle_window: int = option(
        "samples that are shuffled and packed together; more fill packs better and read from more shards at once",
        valid=POSITIVE,
        default=10_000,
    )
    long_samples: str = option(
        "samples longer than a pack: left out and counted (skip), or without their last turns (drop_turns)",
        choices=("skip", "drop_turns"),
        default="skip",
    )
    max_bad_fraction: float = option(
        "share of the samples that may be bad, held twice: against those known to be unusable before training, and "
        "against those that turn out bad while they are read, restarts included; above it the run ends with an error",
        valid=SHARE,
        default=0.01,
    )
    shard_cache: str | None = option(
        "folder for copies of remote shards (default: below the system's folder for temporary files)", default=None
    )
    shard_cache_gb: float = option("GB that this folder may take", valid=ABOVE_ZERO, default=50.0)
    allow_pipe: bool = option("shards named `pipe:COMMAND` may run that command in a shell", default=False)
    micro_batch_size: int = option("packs in one forward pass of one data-parallel replica", valid=POSITIVE, default=1)
    global_batch_size: int = option("packs in one iteration, all replicas together", valid=POSITIVE, default=1)
    num_workers: int = option("background readers of each replica; 0 reads in line", valid=NOT_NEGATIVE, default=2)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The visual objective: masks, teacher, losses, vision head."""

    laver: bool = option("the visual objective; without it, plain next-token training and no teacher", default=True)
    preset: str | None = option(
        "a named set of values: in the file, the file's other values beat it; as a flag, it replaces the "
        "file's preset and beats the file, and other flags beat it",
        choices=tuple(PRESETS),
        default=None,
    )
    mask_ratio: float = option("share of visual tokens replaced by [MASK]", valid=SHARE, default=0.05)
    mask_ratio_schedule: str = option(
        "constant, or rising from 0 to --mask-ratio along a cosine", choices=("constant", "cosine"), default="constant"
    )
    mask_sampling: str = option(
        "bernoulli: every token by its own coin; fixed: floor(ratio * tokens) of every image",
        choices=("bernoulli", "fixed"),
        default="bernoulli",
    )
    ema_momentum: float = option("share of the old teacher kept by one update", valid=SHARE, default=0.95)
    ema_momentum_schedule: str = option(
        "constant, or rising from --ema-momentum to 1 along a cosine",
        choices=("constant", "cosine"),
        default="constant",
    )
    ema_interval: int | float = option(
        "iterations between two updates of the teacher, or a share of --train-iters such as 0.02", default=1
    )
    mim_target: str = option(
        "what the vision head predicts at masked tokens: the teacher's output for them (latent), their features from "
        "the encoder, or their normalised pixels; the last two are controls, which need one pipeline stage",
        choices=("latent", "features", "pixels"),
        default="latent",
    )
    mim_loss: str | None = option(
        "between prediction and target: cross-entropy, of a latent target alone, or smooth-l1 (default: cross-entropy "
        "for latent, smooth-l1 for features and pixels)",
        choices=("cross-entropy", "smooth-l1"),
        default=None,
    )
    mim_weight: float = option("weight of the reconstruction loss", valid=NOT_NEGATIVE, default=1.0)
    gram_weight: float = option("weight of the Gram loss", valid=NOT_NEGATIVE, default=1.0)
    gram_loss: str = option(
        "cga: only similarities above the teacher's count; ga: all count; none",
        choices=("cga", "ga", "none"),
        default="cga",
    )
    gram_reduction: str = option("over the pairs of tokens of one image", choices=("mean", "sum"), default="mean")
    student_temperature: float = option("temperature of the student's distribution", valid=ABOVE_ZERO, default=0.1)
    teacher_temperature: float = option("temperature of the teacher's distribution", valid=ABOVE_ZERO, default=0.04)
    centre_momentum: float | None = option(
        "momentum of the mean taken off the teacher's logits; none: nothing is taken off", valid=SHARE, default=None
    )
    vision_head_hidden_size: int = option("width of the vision head's hidden layers", valid=POSITIVE, default=2048)
    vision_head_output_size: int | None = option(
        "number of the vision head's outputs; none: the model's hidden size, or the size of --mim-target's features or "
        "pixels",
        valid=POSITIVE,
        default=None,
    )

    @property
    def reconstruction_loss(self) -> str:
        """`mim_loss`, or what it is by default."""
        return self.mim_loss or ("cross-entropy" if self.mim_target == "latent" else "smooth-l1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What a run writes, and how often."""

    run_dir: str = option("folder of checkpoints/, metrics.jsonl, curves and the resolved config.yaml")
    arm: str | None = option("name of the run's arm in a study, for `laver fit --arm-by arm`", default=None)
    save_interval: int | None = option(
        "iterations between two checkpoints; the last is always saved", valid=POSITIVE, default=None
    )
    eval_interval: int | None = option(
        "iterations between two evaluations on --valid-data-path; with it, the last iteration is evaluated, too",
        valid=POSITIVE,
        default=None,
    )
    eval_iters: int = option("global batches of one evaluation", valid=POSITIVE, default=4)
    log_interval: int = option(
        "iterations between two printed lines; metrics.jsonl has every one", valid=POSITIVE, default=1
    )
    tensorboard: bool = option("also write TensorBoard events to run_dir/tensorboard", default=False)
    wandb_project: str | None = option("also log to this Weights & Biases project", default=None)
    peak_tflops: float | None = option(
        "dense TFLOP/s of a device, of which MFU and HFU are shares (default: the data sheet's of a known GPU in bf16)",
        valid=ABOVE_ZERO,
        default=None,
    )
    profile: bool = option(
        "profile a few iterations on one process of each pipeline stage: where the time goes, a Chrome trace and, on "
        "CUDA, a memory snapshot, in run_dir/profile",
        default=False,
    )
    profile_step_start: int = option("iterations before the profiled ones", valid=NOT_NEGATIVE, default=10)
    profile_step_end: int = option(
        "the last profiled iteration; a checkpoint ends the profile earlier", valid=POSITIVE, default=12
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run, by section."""

    start: StartConfig
    model: ModelConfig
    parallel: ParallelConfig
    engine: EngineConfig
    data: DataConfig
    objective: ObjectiveConfig
    training: TrainingConfig
    run: RunConfig
    reliability: ReliabilityConfig

    @classmethod
    def of(cls, **values: Any) -> Config:
        """A configuration from flat values by name, as YAML and flags have them. Fields without a default must be
        given."""
        unknown = values.keys() - section_of().keys()
        assert not unknown, f"no such fields: {sorted(unknown)}"
        given: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
        for name, value in values.items():
            given[section_of()[name]][name] = value
        return cls(**{section: kind(**given[section]) for section, kind in SECTIONS.items()})

    def flat(self) -> dict[str, Any]:
        """All values by name, without their sections: what `of` takes."""
        return {name: value for section in SECTIONS for name, value in vars(getattr(self, section)).items()}

    def replace(self, **changes: Any) -> Config:
        """A copy with some fields, named without their sections, changed."""
        return Config.of(**{**self.flat(), **changes})

    def to_yaml(self) -> str:
        """The configuration as YAML, grouped; reading it back gives an equal `Config`."""
        values, lines = self.flat(), []
        for section in SECTIONS:
            lines.append(f"# {section}")
            lines += [yaml_line(item.name, values[item.name]) for item in fields_of(section)]
            lines.append("")
        return "\n".join(lines)


SECTIONS: Mapping[str, Any] = {
    "start": StartConfig,
    "model": ModelConfig,
    "parallel": ParallelConfig,
    "engine": EngineConfig,
    "data": DataConfig,
    "objective": ObjectiveConfig,
    "training": TrainingConfig,
    "run": RunConfig,
    "reliability": ReliabilityConfig,
}


def fields_of(section: str) -> tuple[dataclasses.Field[Any], ...]:
    """The fields of one section, in the order they are declared."""
    return dataclasses.fields(SECTIONS[section])


@cache
def section_of() -> Mapping[str, str]:
    """The section of every field."""
    return {item.name: section for section in SECTIONS for item in fields_of(section)}


def all_fields() -> dict[str, dataclasses.Field[Any]]:
    """Every field by its name, in the order they are declared."""
    return {item.name: item for section in SECTIONS for item in fields_of(section)}


def default_of(name: str) -> Any:
    """What a field is where nothing is said of it."""
    return all_fields()[name].default


def field_types() -> dict[str, FieldType]:
    """The type of every field, read from the annotations of the sections."""
    hints = {name: hint for kind in SECTIONS.values() for name, hint in typing.get_type_hints(kind).items()}
    return {name: field_type(hint) for name, hint in hints.items()}
