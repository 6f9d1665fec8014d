"""The sizes of a sweep: what is asked for, and a configuration with its model, encoder and GPUs for each size.

A size is a configuration: a separate file, or the base file with a model's directory. All sizes read the same packs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from laver_megatron.config.command_line import read_command_line
from laver_megatron.config.fields import Config, ConfigError, fields_of
from laver_megatron.data.batch.data_spec import DataSpec
from laver_megatron.data.batch.pack_reader import PackReader, open_reader
from laver_megatron.encoders import open_preprocessor, read_encoder
from laver_megatron.flops.step import ModelFlops, decoder_layer_flops, run_flops
from laver_megatron.hf.shape import ModelShape, read_model_shape
from laver_megatron.hf.tokenizer import load_tokenizer
from laver_megatron.run_log.run_summary import hashed_settings
from laver_megatron.shards.subset import read_manifest
from laver_megatron.start import HF_PREFIX, find_start
from laver_megatron.studies.sweep_options import NAME, SweepOptions, is_yaml

_SET_BY_THE_SWEEP = (
    "--config", "--load", "--model", "--run-dir", "--train-iters", "--exit-interval", "--seed", "--laver", "--no-laver",
    "--print-config", "--dry-run",
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """A name and what all runs of this size have in common."""

    name: str
    config: Config
    num_gpus: int
    model_dir: Path
    encoder_dir: Path

    @cached_property
    def shape(self) -> ModelShape:
        return read_model_shape(self.model_dir)

    @cached_property
    def num_parameters(self) -> int:
        return language_model_parameters(self.shape)

    def flops(self, config: Config) -> ModelFlops:
        """Of a run of this size. config: that of its arm, which may have another vision head."""
        return run_flops(config, self.shape, read_encoder(self.encoder_dir))


def language_model_parameters(shape: ModelShape) -> int:
    """N as the registry counts it: decoder with its norms, embedding, and LM head where it is not tied."""
    hidden = shape.hidden_size
    qkv_bias = (shape.num_attention_heads + 2 * shape.num_query_groups) * shape.kv_channels
    # A weight is one multiplication and one addition for a token.
    layer = decoder_layer_flops(shape) // 2 + qkv_bias + 2 * hidden
    words = shape.vocab_size * hidden
    return shape.num_layers * layer + hidden + words * (1 if shape.tie_word_embeddings else 2)


def read_sizes(options: SweepOptions) -> list[Size]:
    """The sizes in the order of their parameters.

    Raises:
        ConfigError: files and flags that cannot be read; models that are named twice; runs without validation; data
            that differ between the sizes.
    """
    if problems := [*_option_problems(options)]:
        raise ConfigError(problems)
    gpus = options.num_gpus * (len(options.models) if len(options.num_gpus) == 1 else 1)
    sizes: list[Size] = []
    for i, model in enumerate(options.models):
        try:
            sizes.append(_read_size(model, options, gpus[i] if gpus else None))
        except ConfigError as error:
            problems += [f"{model}: {problem}" for problem in error.problems]
    problems += [f"two models have the name {name}" for name in _repeated([size.name for size in sizes])]
    problems += _differing_data(sizes)
    problems += [
        f"{size.name}: without eval_interval and valid_data_path its runs leave no validation loss to fit; set both "
        "(the last iteration is always validated)"
        for size in sizes
        if size.config.run.eval_interval is None or not size.config.data.valid_data_path
    ]
    if options.lr_exponent is not None and len(rates := {size.config.training.lr for size in sizes}) > 1:
        problems.append(f"--lr-exponent starts from one learning rate, but the models' files have {sorted(rates)}")
    if problems:
        raise ConfigError(problems)
    return sorted(sizes, key=lambda size: size.num_parameters)


def _option_problems(options: SweepOptions) -> Iterator[str]:
    for flag in (word.split("=", 1)[0] for word in options.flags):
        if flag in _SET_BY_THE_SWEEP:
            yield f"{flag} is the sweep's to set, by --models, --arms, --seeds, --output and the amounts"
    if min(options.num_gpus, default=1) < 1:
        yield f"--num-gpus {min(options.num_gpus)}: a run needs at least one"
    if len(options.num_gpus) not in (0, 1, len(options.models)):
        yield f"--num-gpus has {len(options.num_gpus)} numbers for {len(options.models)} models; give one, or all"
    for name, values in (("--models", options.models), ("--seeds", options.seeds)):
        if twice := _repeated([str(value) for value in values]):
            yield f"{name} names {', '.join(twice)} twice: its runs would be the same"
    if (lowest := min(options.seeds, default=0)) < 0:
        yield f"--seeds {lowest}: a seed must not be negative"
    if options.lr_warmup_share is not None and not 0 <= options.lr_warmup_share < 1:
        yield f"--lr-warmup-share is {options.lr_warmup_share}, but must be at least 0 and below 1"
    if not 0 < options.max_epochs < math.inf:
        yield f"--max-epochs is {options.max_epochs}, but must be finite and above 0"
    if options.lr_exponent is not None and not math.isfinite(options.lr_exponent):
        yield f"--lr-exponent is {options.lr_exponent}, but must be finite"
    yield from _amount_problems(options.amount_kind, options.amounts)
    if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())):
        yield (
            f"--output {options.output} exists already; name another (the registry takes the runs of several "
            "sweeps together), or remove it with the runs in it"
        )


def _amount_problems(kind: str, amounts: Sequence[str]) -> Iterator[str]:
    if kind == "subsets":
        yield from _subset_problems(amounts)
    else:
        kind_of_number = "integer" if kind == "iterations" else "number"
        bad = [amount for amount in amounts if not _is_amount(amount, whole=kind == "iterations")]
        yield from (f"--{kind} {amount}: must be a positive {kind_of_number}" for amount in bad)
        if bad:
            return
    labels = [amount_label(kind, amount) for amount in amounts]
    for label in _repeated(labels):
        named = ", ".join(amount for amount, other in zip(amounts, labels, strict=True) if other == label)
        yield f"--{kind} {named}: all would be {label} in the names of the runs; leave out all but one"


def _repeated(names: Sequence[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})


def amount_label(kind: str, amount: str) -> str:
    """An amount as part of a run's name: a subset's file name, a number with as many digits as it has."""
    if kind == "subsets":
        return Path(amount).stem
    number = float(amount)
    digits = f"{number:g}" if float(f"{number:g}") == number else repr(number).removesuffix(".0")
    return f"{kind}{digits}".replace("+", "")


def _is_amount(text: str, *, whole: bool) -> bool:
    try:
        number = float(text)
    except ValueError:
        return False
    return math.isfinite(number) and number > 0 and (number.is_integer() or not whole)


def _subset_problems(paths: Sequence[str]) -> Iterator[str]:
    """Subsets are nested if they are of one index and one seed."""
    origins: dict[tuple[str, int], str] = {}
    for path in paths:
        try:
            manifest = read_manifest(Path(path))
        except (ValueError, OSError) as error:
            yield f"--subsets: {error}"
        else:
            origins.setdefault((manifest.of_fingerprint, manifest.seed), path)
    if len(origins) > 1:
        yield (
            f"--subsets {', '.join(origins.values())} are not nested: they are of other data or of another seed; make "
            "all with one --index and one --seed of `laver shards subset`"
        )


def _read_size(model: str, options: SweepOptions, num_gpus: int | None) -> Size:
    path = Path(model)
    is_file = is_yaml(model)
    name = path.stem if is_file else Path(model.rstrip("/")).name
    if not NAME.fullmatch(name):
        problem = f"the name {name!r} would be part of file names; use letters, digits, dot, dash, underscore"
        raise ConfigError([problem])
    if not is_file and options.base is None:
        raise ConfigError(["a model's directory needs --base FILE.yaml, which says how to train it"])
    arguments = ["--config", model] if is_file else ["--config", str(options.base), "--load", f"{HF_PREFIX}{model}"]
    placeholders = ["--run-dir", str(options.output / "runs" / name), "--train-iters", "1"]
    config = read_command_line([*arguments, *options.flags, *placeholders]).config
    layout = config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size
    start = find_start(config)
    if start.model_dir is None or start.encoder_dir is None:
        parts = {"model (or load hf:DIR)": start.model_dir, "encoder": start.encoder_dir}
        raise ConfigError([f"{part} is missing" for part, directory in parts.items() if directory is None])
    read_model_shape(start.model_dir)
    encoder = read_encoder(start.encoder_dir)
    config = config.replace(encoder_feature_layer=encoder.feature_layer(config.model.encoder_feature_layer))
    return Size(name, config, num_gpus or layout, start.model_dir, start.encoder_dir)


def _differing_data(sizes: Sequence[Size]) -> Iterator[str]:
    """Sizes are compared at equal data, so these must be the same to the last pack."""
    names = {item.name for item in fields_of("data")} & hashed_settings(laver=True) | {"valid_data_path"}
    for name in sorted(names):
        values = {str(size.config.flat()[name]): size.name for size in sizes}
        if len(values) > 1:
            found = ", ".join(f"{value} ({size})" for value, size in values.items())
            yield f"the models' files must read the same data, but {name} is {found}"


def varying_settings(sizes: Sequence[Size]) -> list[str]:
    """Settings by which the sizes differ in more than size, rate and layout."""
    of_a_size = {"load", "model", "encoder", "finetune", "train_iters", "lr", "min_lr", "decoupled_lr"}
    of_a_size |= {"lr_warmup_iters", "lr_wsd_decay_iters"}
    names = hashed_settings(laver=True) - of_a_size
    return [name for name in sorted(names) if len({repr(size.config.flat()[name]) for size in sizes}) > 1]


def with_visual_budget(sizes: Sequence[Size]) -> list[Size]:
    """All sizes with one visual_seq_length: where it is 0, what the data propose, divisible by every size's ranks."""
    first = sizes[0]
    if first.config.data.visual_seq_length:
        return list(sizes)
    ranks = math.lcm(*(size.config.parallel.tensor_model_parallel_size for size in sizes))
    reader = open_training_data(first, first.config.replace(tensor_model_parallel_size=ranks))
    budget = reader.visual_seq_length
    reader.close()
    return [replace(size, config=size.config.replace(visual_seq_length=budget)) for size in sizes]


def open_training_data(size: Size, config: Config) -> PackReader:
    """A reader of the training data of a run of this size. Raises ConfigError for data that cannot be opened."""
    try:
        preprocessor = open_preprocessor(size.encoder_dir, config.data.max_image_tokens)
        spec = DataSpec.of(config, config.data.data_path, training=True)
        return open_reader(spec, load_tokenizer(size.model_dir), preprocessor)
    except (ValueError, OSError) as error:
        raise ConfigError([f"{size.name}: {error}"]) from None
