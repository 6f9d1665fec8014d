"""The runs of a sweep: sizes x amounts x arms x seeds, with their iterations, tokens and exact FLOPs.

An amount is a number of iterations or tokens, a compute budget, or a nested subset of the data. All arms read the same
packs; a compute budget gives each of them as many iterations as it pays for, LaVer's overhead charged.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from laver_megatron.config.checks import check
from laver_megatron.config.command_line import Invocation
from laver_megatron.config.fields import Config, ConfigError
from laver_megatron.encoders import read_encoder, with_target_size
from laver_megatron.run_log.run_summary import config_hash
from laver_megatron.studies.arms import Arm, equal_arms, read_arms
from laver_megatron.studies.iteration_counts import IterationCounts
from laver_megatron.studies.observations import first_few
from laver_megatron.studies.sweep_options import SweepOptions
from laver_megatron.studies.sweep_sizes import (
    Size,
    amount_label,
    open_training_data,
    read_sizes,
    with_visual_budget,
)


@dataclass(frozen=True)
class SweepRun:
    """One run: its configuration, and what it will have seen and cost when it is finished.

    Attributes:
        amount: what was asked for, a number or a subset's path.
        tokens, visual_tokens, flops, laver_overhead: as its summary will say, unless samples turn out bad.
        epochs: how often it goes through its data.
    """

    name: str
    config: Config
    size: Size
    arm: str
    amount: str
    tokens: int
    visual_tokens: int
    flops: int
    laver_overhead: int
    epochs: float


def sweep_runs(options: SweepOptions) -> list[SweepRun]:
    """All runs, the cheapest first. Writes nothing except the counts that are kept beside an index.

    Raises:
        ConfigError: everything that keeps runs from being made or from starting; data that cannot be opened; amounts
            beyond the data or below one iteration; runs that would be the same.
    """
    arms = read_arms(options)
    sizes = read_sizes(options)
    if equal := list(dict.fromkeys(problem for size in sizes for problem in equal_arms(arms, size.config))):
        raise ConfigError(equal)
    sizes = with_visual_budget(sizes)
    maker = _RunMaker(options, sizes)
    runs = [
        run
        for size in sizes
        for amount in options.amounts
        for arm in arms
        for seed in options.seeds or (size.config.training.seed,)
        if (run := maker.make(size, amount, arm, seed))
    ]
    problems = [*maker.problems, *_duplicates(runs)]
    problems = problems or [*_start_problems(runs)]
    if problems:
        raise ConfigError(problems)
    return sorted(runs, key=lambda run: run.flops)


class _RunMaker:
    """Makes runs one by one. problems: of those that cannot be made."""

    def __init__(self, options: SweepOptions, sizes: Sequence[Size]) -> None:
        self.options, self.smallest = options, sizes[0]
        self._problems: dict[str, list[str]] = {}
        self._data: dict[tuple[object, ...], IterationCounts] = {}

    @property
    def problems(self) -> Iterator[str]:
        return _grouped(self._problems)

    def make(self, size: Size, amount: str, arm: Arm, seed: int) -> SweepRun | None:
        """None, and a problem, where the data do not hold the amount or it is below one iteration."""
        options = self.options
        config = with_target_size(arm.configured(size.config), read_encoder(size.encoder_dir)).replace(seed=seed)
        if options.amount_kind == "subsets":
            config = config.replace(data_path=(amount,), data_weights=None)
        name = f"{size.name}-{amount_label(options.amount_kind, amount)}-{arm.name}-seed{seed}"
        data = self._counts_of(size, config)
        try:
            num_iterations = self._num_iterations(size, config, data, amount)
        except ValueError as error:
            self._problems.setdefault(str(error), []).append(name)
            return None
        cost, counts = data.flops(size.flops(config), config, num_iterations), data.counts(num_iterations)
        return SweepRun(
            name=name,
            config=self._configured(size, config, name, num_iterations),
            size=size,
            arm=arm.name,
            amount=amount,
            tokens=counts["num_tokens"],
            visual_tokens=counts["num_visual_tokens"],
            flops=cost.total,
            laver_overhead=cost.laver_overhead,
            epochs=data.epochs(num_iterations),
        )

    def _num_iterations(self, size: Size, config: Config, data: IterationCounts, amount: str) -> int:
        """How many iterations an amount is. Raises ValueError if there are none, or too little data."""
        kind, epochs = self.options.amount_kind, self.options.max_epochs
        most = data.iterations_in(epochs)
        if kind == "subsets":
            if number := data.iterations_in(1):
                return number
            batch = config.data.global_batch_size
            raise ValueError(f"its packs are fewer than one iteration's {batch}; choose more samples")
        counts: dict[str, Callable[[int], int]] = {
            "iterations": lambda number: number,
            "tokens": lambda number: data.counts(number)["num_tokens"],
            "flops": lambda number: data.flops(size.flops(config), config, number).total,
        }
        count, unit = counts[kind], {"flops": "FLOPs"}.get(kind, kind)
        number = nearest(count, float(amount), unit, most + 1)
        if number > most:
            held = f"{data.epoch_tokens:,} tokens in {data.iterations_in(1):,} iterations"
            noun = "epoch" if epochs == 1 else "epochs"
            within = f"at most {count(most):.6g} {unit}" if most else "a smaller global_batch_size"
            raise ValueError(
                f"{float(amount):g} {unit} are more than {epochs:g} {noun} of the data hold (an epoch has {held}); use "
                f"{within}, more data, or --max-epochs to see samples again"
            )
        return number

    def _configured(self, size: Size, config: Config, name: str, num_iterations: int) -> Config:
        options = self.options
        config = config.replace(train_iters=num_iterations, run_dir=str(options.output / "runs" / name))
        if options.lr_warmup_share is not None:
            config = config.replace(lr_warmup_iters=round(options.lr_warmup_share * num_iterations))
        if options.lr_exponent is not None:
            ratio = (size.num_parameters / self.smallest.num_parameters) ** -options.lr_exponent
            # Four digits are readable, and more precise than any rate needs to be.
            # The image encoder and the connector keep theirs: the encoder is the same at all sizes.
            names = ("lr", "min_lr") + (("decoupled_lr",) if config.training.decoupled_lr is not None else ())
            rates = {name: config.flat()[name] * ratio for name in names}
            config = config.replace(**{name: float(f"{rate:.4g}") for name, rate in rates.items()})
        return config

    def _counts_of(self, size: Size, config: Config) -> IterationCounts:
        # The rest of what packs and areas depend on is the same for all sizes.
        key = (size.model_dir, size.encoder_dir, config.model.attention, config.data.data_path, config.training.seed)
        if key not in self._data:
            reader = open_training_data(size, config)
            self._data[key] = IterationCounts(reader, config, read_encoder(size.encoder_dir).window_tokens)
            reader.close()
        return self._data[key]


def nearest(count: Callable[[int], int], amount: float, unit: str, most: int) -> int:
    """The number of iterations up to `most` whose count, which rises, is nearest to an amount.

    Raises:
        ValueError: the amount is less than one iteration.
    """
    if amount < count(1):
        raise ValueError(
            f"{amount:.4g} {unit} are less than one iteration, which has {count(1):.4g}; use at least that, "
            "or a smaller global_batch_size"
        )
    above = 1
    while above < most and count(above) < amount:  # doubling, because counting far into the data takes long
        above = min(2 * above, most)
    above = bisect_left(range(above), amount, lo=above // 2, key=count)
    below = above - 1
    return below if below and amount - count(below) <= count(above) - amount else above


def _duplicates(runs: Sequence[SweepRun]) -> Iterator[str]:
    """Runs with one configuration and seed, which the registry would refuse."""
    same: dict[tuple[str, int], list[SweepRun]] = {}
    for run in runs:
        same.setdefault((config_hash(run.config), run.config.training.seed), []).append(run)
    # Every size, arm and seed has the amounts that are too close; one of them is named.
    by_amounts: dict[tuple[str, ...], list[str]] = {}
    for runs_alike in same.values():
        if len(runs_alike) > 1:
            amounts = tuple(run.amount for run in runs_alike)
            by_amounts.setdefault(amounts, []).append(" and ".join(run.name for run in runs_alike))
    for cases in by_amounts.values():
        more = f" (as {len(cases) - 1} more)" if len(cases) > 1 else ""
        yield f"{cases[0]} would be the same run{more}; leave out all but one of their amounts or models"


def _start_problems(runs: Sequence[SweepRun]) -> Iterator[str]:
    """What --dry-run would say, each problem once."""
    found: dict[str, list[str]] = {}
    for run in runs:
        try:
            check(Invocation(run.config, dry_run=True, dry_run_world_size=run.size.num_gpus))
        except ConfigError as error:
            for problem in error.problems:
                found.setdefault(problem, []).append(run.name)
    yield from _grouped(found)


def _grouped(problems: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Each problem once, with the first of the runs that have it."""
    for problem, names in problems.items():
        yield f"{first_few(names, 1)}: {problem}"
