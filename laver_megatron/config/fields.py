"""The configuration: one flat frozen dataclass whose fields are the YAML keys and, with dashes, the flags.

Nothing here looks at files, devices or models. `command_line.py` fills a `Config`, `validate.py` judges it.
Every field carries its group, its help text and, where they are few, its choices; the help page, the
type checks and the written YAML are all made from these.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

GROUPS = ("model", "parallel", "data", "laver", "training", "run")
ATTENTIONS = ("mixed", "causal")
POSITIONS = ("2d", "1d", "mrope")
FREEZABLE_MODULES = ("encoder", "connector", "decoder", "heads")
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


def _option(group: str, help_text: str, *, choices: tuple[str, ...] | None = None, **default: Any) -> Any:
    """A dataclass field with what the help page and the type checks need; `default=...` or required."""
    assert group in GROUPS, group
    return field(metadata={"group": group, "help": help_text, "choices": choices}, **default)


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run. Fields without a default must be given."""

    # model
    model: str | None = _option(
        "model",
        "Hugging Face directory with config.json and tokenizer; without it, that "
        "of --load (hf:DIR, or hf/ in the checkpoint)",
        default=None,
    )
    load: str | None = _option(
        "model",
        "where weights come from: hf:DIR (safetensors) or a checkpoint of this "
        "program (its checkpoints/ folder, or one iter_* folder in it)",
        default=None,
    )
    finetune: bool = _option(
        "model",
        "begin the next stage: take only the weights of --load, connector included, and start at iteration 0 with a "
        "new optimizer and, with LaVer, the student's weights for a teacher; a run directory with a checkpoint of its "
        "own goes on from that as ever",
        default=False,
    )
    encoder: str | None = _option(
        "model",
        "Hugging Face directory of the image encoder (docs/encoders.md lists the kinds); without it, encoder/ in the "
        "checkpoint of --load",
        default=None,
    )
    encoder_feature_layer: int | None = _option(
        "model",
        "which of the encoder's hidden states become visual features: 0 is its embedding, -1 its last layer (default: "
        "as is usual for its kind)",
        default=None,
    )
    attention: str = _option(
        "model",
        "of the language stream; mixed: visual tokens also see the rest of their own image; causal: every token sees "
        "only what precedes it. Reconstruction is bidirectional within each image either way",
        choices=ATTENTIONS,
        default="mixed",
    )
    positions: str = _option(
        "model",
        "rotary positions of visual tokens: row and column interleaved over the "
        "frequencies (2d), the token's index (1d), or contiguous sections (mrope)",
        choices=POSITIONS,
        default="2d",
    )
    attention_kernel: str = _option(
        "model",
        "dense: the reference, runs anywhere; flex: FlexAttention, CUDA only; auto: flex on CUDA and dense on CPU",
        choices=("auto", "dense", "flex"),
        default="auto",
    )
    freeze: tuple[str, ...] = _option(
        "model", "modules that are not trained", choices=FREEZABLE_MODULES, default=("encoder",)
    )
    allow_change: tuple[str, ...] = _option(
        "model",
        "settings that may differ from those the checkpoint was trained with; otherwise that is an error",
        choices=CHANGEABLE,
        default=(),
    )

    # parallel
    tensor_model_parallel_size: int = _option("parallel", "ranks that share each layer", default=1)
    pipeline_model_parallel_size: int = _option("parallel", "stages the layers are divided into", default=1)
    num_layers_per_virtual_pipeline_stage: int | None = _option(
        "parallel", "layers of one chunk of the interleaved schedule; none: not interleaved", default=None
    )
    sequence_parallel: bool = _option(
        "parallel", "split activations along the sequence between the tensor-parallel ranks", default=False
    )
    decoder_first_pipeline_num_layers: int | None = _option(
        "parallel", "layers of the first stage of an uneven split", default=None
    )
    decoder_last_pipeline_num_layers: int | None = _option(
        "parallel", "layers of the last stage of an uneven split", default=None
    )
    recompute_granularity: str | None = _option(
        "parallel",
        "what the backward pass computes again to save memory: whole layers (full) or the core attention (selective)",
        choices=("full", "selective"),
        default=None,
    )
    distributed_timeout_minutes: int = _option(
        "parallel", "minutes a collective may take before the run ends", default=10
    )

    # data
    data_path: tuple[str, ...] = _option(
        "data",
        "training data: folders of shards, .parquet indexes (a subset, remote shards), tar files or globs of them",
    )
    data_weights: tuple[float, ...] | None = _option(
        "data",
        "how often each entry of --data-path is repeated in an epoch, such as 1 0.5 2 (default: each once)",
        default=None,
    )
    valid_data_path: tuple[str, ...] | None = _option("data", "held-out data, in the same forms", default=None)
    seq_length: int = _option("data", "tokens of a pack in the language-model stream, visual tokens included")
    visual_seq_length: int = _option(
        "data", "visual tokens a pack can hold; 0: as many as fill the packs best, proposed from the data", default=0
    )
    max_image_tokens: int | None = _option(
        "data",
        "visual tokens of one image at most: larger pictures are shrunk to it for an encoder of native resolution, and "
        "are an error with one of fixed resolution (default: as the encoder's image processor says)",
        default=None,
    )
    shuffle_window: int = _option(
        "data",
        "samples that are shuffled and packed together; more fill packs better and read from more shards at once",
        default=10_000,
    )
    long_samples: str = _option(
        "data",
        "samples longer than a pack: left out and counted (skip), or without their last turns (drop_turns)",
        choices=("skip", "drop_turns"),
        default="skip",
    )
    max_bad_fraction: float = _option(
        "data",
        "share of the samples that may be bad, held twice: against those known to be unusable before training, and "
        "against those that turn out bad while they are read, restarts included; above it the run ends with an error",
        default=0.01,
    )
    shard_cache: str | None = _option(
        "data",
        "folder for copies of remote shards (default: below the system's folder for temporary files)",
        default=None,
    )
    shard_cache_gb: float = _option("data", "GB that this folder may take", default=50.0)
    allow_pipe: bool = _option("data", "shards named `pipe:COMMAND` may run that command in a shell", default=False)
    micro_batch_size: int = _option("data", "packs in one forward pass of one data-parallel replica", default=1)
    global_batch_size: int = _option("data", "packs in one iteration, all replicas together", default=1)
    num_workers: int = _option("data", "background readers of each replica; 0 reads in line", default=2)

    # laver
    laver: bool = _option(
        "laver", "the visual objective; without it, plain next-token training and no teacher", default=True
    )
    preset: str | None = _option(
        "laver",
        "a named set of values: in the file, the file's other values beat it; as a flag, it replaces the "
        "file's preset and beats the file, and other flags beat it",
        choices=tuple(PRESETS),
        default=None,
    )
    mask_ratio: float = _option("laver", "share of visual tokens replaced by [MASK]", default=0.05)
    mask_ratio_schedule: str = _option(
        "laver",
        "constant, or rising from 0 to --mask-ratio along a cosine",
        choices=("constant", "cosine"),
        default="constant",
    )
    mask_sampling: str = _option(
        "laver",
        "bernoulli: every token by its own coin; fixed: floor(ratio * tokens) of every image",
        choices=("bernoulli", "fixed"),
        default="bernoulli",
    )
    ema_momentum: float = _option("laver", "share of the old teacher kept by one update", default=0.95)
    ema_momentum_schedule: str = _option(
        "laver",
        "constant, or rising from --ema-momentum to 1 along a cosine",
        choices=("constant", "cosine"),
        default="constant",
    )
    ema_interval: int | float = _option(
        "laver",
        "iterations between two updates of the teacher, or a share of --train-iters such as 0.02",
        default=1,
    )
    mim_weight: float = _option("laver", "weight of the reconstruction loss", default=1.0)
    gram_weight: float = _option("laver", "weight of the Gram loss", default=1.0)
    gram_loss: str = _option(
        "laver",
        "cga: only similarities above the teacher's count; ga: all count; none",
        choices=("cga", "ga", "none"),
        default="cga",
    )
    gram_reduction: str = _option(
        "laver", "over the pairs of tokens of one image", choices=("mean", "sum"), default="mean"
    )
    student_temperature: float = _option("laver", "temperature of the student's distribution", default=0.1)
    teacher_temperature: float = _option("laver", "temperature of the teacher's distribution", default=0.04)
    centre_momentum: float | None = _option(
        "laver",
        "momentum of the mean taken off the teacher's logits; none: nothing is taken off",
        default=None,
    )
    vision_head_hidden_size: int = _option("laver", "width of the vision head's hidden layers", default=2048)
    vision_head_output_size: int | None = _option(
        "laver", "number of the vision head's logits; none: the model's hidden size", default=None
    )

    # training
    train_iters: int = _option("training", "iterations of the whole run; the schedules end there")
    exit_interval: int | None = _option(
        "training", "save and stop at the first iteration divisible by this", default=None
    )
    lr: float = _option("training", "highest learning rate", default=2e-5)
    min_lr: float = _option("training", "learning rate at the end of the cosine decay", default=0.0)
    lr_warmup_iters: int = _option("training", "iterations of linear warm-up", default=0)
    weight_decay: float = _option(
        "training",
        "decoupled weight decay of matrices; tensors of one dimension (biases, norms, [MASK]) do not decay, nor do "
        "parts of a trained encoder that its features do not depend on",
        default=0.0,
    )
    adam_beta1: float = _option("training", "decay of Adam's first moment", default=0.9)
    adam_beta2: float = _option("training", "decay of Adam's second moment", default=0.999)
    adam_eps: float = _option("training", "added to the denominator of Adam's update", default=1e-8)
    clip_grad: float = _option("training", "largest norm of the gradient; 0 does not clip", default=1.0)
    bf16: bool = _option("training", "compute in bfloat16, with fp32 master weights; otherwise fp32", default=False)
    seed: int = _option("training", "of initial weights, data order and masks", default=1234)
    max_skipped_iterations: int = _option(
        "training",
        "iterations with a NaN or infinite gradient, in a row, after which the run ends with an error",
        default=5,
    )

    # run
    run_dir: str = _option("run", "folder of checkpoints/, metrics.jsonl, curves and the resolved config.yaml")
    save_interval: int | None = _option(
        "run", "iterations between two checkpoints; the last is always saved", default=None
    )
    eval_interval: int | None = _option(
        "run",
        "iterations between two evaluations on --valid-data-path; with it, the last iteration is evaluated, too",
        default=None,
    )
    eval_iters: int = _option("run", "global batches of one evaluation", default=4)
    log_interval: int = _option("run", "iterations between two printed lines; metrics.jsonl has every one", default=1)
    tensorboard: bool = _option("run", "also write TensorBoard events to run_dir/tensorboard", default=False)
    wandb_project: str | None = _option("run", "also log to this Weights & Biases project", default=None)

    def to_yaml(self) -> str:
        """The configuration as YAML, grouped; reading it back gives an equal `Config`."""
        lines = []
        for group in GROUPS:
            lines.append(f"# {group}")
            lines += [_yaml_line(item.name, getattr(self, item.name)) for item in fields_of(group)]
            lines.append("")
        return "\n".join(lines)

    def replace(self, **changes: Any) -> Config:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def fields_of(group: str) -> list[dataclasses.Field[Any]]:
    """The fields of one group, in the order they are declared."""
    return [item for item in dataclasses.fields(Config) if item.metadata["group"] == group]


def field_names() -> tuple[str, ...]:
    """The names of all fields, in the order they are declared."""
    return tuple(item.name for item in dataclasses.fields(Config))


def is_required(item: dataclasses.Field[Any]) -> bool:
    """Whether the field has no default."""
    return item.default is dataclasses.MISSING


@dataclass(frozen=True)
class FieldType:
    """What a field may hold: `scalars`, several of them if `is_list`, None as well if `is_optional`."""

    scalars: tuple[type, ...]
    is_list: bool
    is_optional: bool


def field_types() -> dict[str, FieldType]:
    """The type of every field, read from the annotations of `Config`."""
    return {name: _field_type(hint) for name, hint in typing.get_type_hints(Config).items()}


def _field_type(hint: Any) -> FieldType:
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    plain = tuple(member for member in members if member is not type(None))
    is_list = typing.get_origin(plain[0]) is tuple
    scalars = (typing.get_args(plain[0])[0],) if is_list else plain
    return FieldType(scalars, is_list, is_optional=type(None) in members)


def _yaml_line(name: str, value: Any) -> str:
    if isinstance(value, tuple):
        return f"{name}: [{', '.join(_yaml_scalar(item) for item in value)}]"
    return f"{name}: {_yaml_scalar(value)}"


def _yaml_scalar(value: Any) -> str:
    # A flow list of one element gets the quotes that the element also needs inside longer lists.
    text = yaml.safe_dump([value], default_flow_style=True, width=1_000_000, allow_unicode=True)
    return text.rstrip("\n")[1:-1]
