"""tools/make_sweep.py: its options; planning a sweep, writing it, and saying what it is."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from laver_megatron.run_log.run_summary import MANIFEST
from laver_megatron.studies.points import NEEDED_DISTINCT
from laver_megatron.studies.sweep import PlannedRun, plan_sweep
from laver_megatron.studies.sweep_files import write_sweep
from laver_megatron.studies.sweep_sizes import AMOUNT_KINDS, ARMS, SweepSettings, varying_settings

_FAR = 0.02  # from an amount, as a share of it: worth a word


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add(
        "--models", nargs="+", required=True, metavar="MODEL",
        help="the sizes: configuration files of their own, or Hugging Face directories to be trained by --base",
    )  # fmt: skip
    add("--base", metavar="FILE", help="configuration of those models that are directories")
    amounts = parser.add_mutually_exclusive_group(required=True)
    amounts.add_argument("--iterations", nargs="+", metavar="N", help="amounts of data, in iterations")
    amounts.add_argument("--tokens", nargs="+", metavar="D", help="amounts of data, in tokens of the language stream")
    amounts.add_argument(
        "--flops", nargs="+", metavar="C",
        help="compute budgets: every size and arm gets the number of iterations that comes nearest",
    )  # fmt: skip
    amounts.add_argument(
        "--subsets", nargs="+", metavar="FILE",
        help="nested subsets (tools/subset_shards.py), of which each run sees one epoch",
    )  # fmt: skip
    add("--output", type=Path, required=True, metavar="DIR", help="where configurations, scripts and runs go")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="with and without LaVer (default: both)")
    add("--seeds", nargs="+", type=int, default=[], metavar="N", help="(default: the configuration's)")
    add("--max-epochs", type=float, default=1.0, metavar="E", help="how often a run may see the data (default: 1)")
    add(
        "--num-gpus", nargs="+", type=int, default=[], metavar="N",
        help="for each model, or one number for all (default: TP x PP of each)",
    )  # fmt: skip
    add("--gpus-per-node", type=int, default=8, metavar="N", help="(default: 8)")
    add(
        "--lr-exponent", type=float, metavar="P",
        help="the learning rate falls as N to the power -P, from the smallest model's (default: as configured)",
    )  # fmt: skip
    add("--lr-warmup-share", type=float, metavar="S", help="warm-up as a share of each run's iterations")


def make_sweep(options: argparse.Namespace, flags: Sequence[str]) -> None:
    """Plans and writes what the options say. flags: of the trainer, for all runs.

    Raises:
        ValueError, OSError: as `plan_sweep` and `write_sweep`.
    """
    (kind,) = (kind for kind in AMOUNT_KINDS if getattr(options, kind))
    settings = SweepSettings(
        models=tuple(options.models),
        amount_kind=kind,
        amounts=tuple(getattr(options, kind)),
        output=options.output,
        base=options.base,
        arms=tuple(options.arms),
        seeds=tuple(options.seeds),
        num_gpus=tuple(options.num_gpus),
        max_epochs=options.max_epochs,
        lr_exponent=options.lr_exponent,
        lr_warmup_share=options.lr_warmup_share,
        flags=tuple(flags),
    )
    runs = plan_sweep(settings)
    write_sweep(runs, options.output, options.gpus_per_node)
    print(table(runs))
    for note in notes(runs, kind):
        print(f"note: {note}", file=sys.stderr)
    output = options.output
    here, on_slurm = (f"bash {shlex.quote(str(output / name))}" for name in ("run.sh", "submit.sh"))
    print(f"{len(runs)} runs in {output / MANIFEST}; {here} runs them here, {on_slurm} on SLURM")


def table(runs: Sequence[PlannedRun]) -> str:
    """The runs for people, the cheapest first."""
    width = max(len(run.name) for run in runs)
    lines = [f"{'run':<{width}}  {'N':>9}  {'GPUs':>5}  {'iterations':>10}  {'tokens':>9}  {'FLOPs':>9}  {'epochs':>6}"]
    lines += [
        f"{run.name:<{width}}  {run.size.num_parameters:>9.4g}  {run.size.num_gpus:>5}  "
        f"{run.config.training.train_iters:>10,}  {run.tokens:>9.4g}  {run.flops:>9.4g}  {run.epochs:>6.2f}"
        for run in runs
    ]
    total = sum(run.flops for run in runs)
    overhead = sum(run.laver_overhead for run in runs)
    return "\n".join([*lines, f"together {total:.4g} FLOPs, of which LaVer's overhead is {overhead / total:.1%}"])


def notes(runs: Sequence[PlannedRun], kind: str) -> list[str]:
    """What a reader should know before so much is computed."""
    found = []
    sizes = list({run.size.name: run.size for run in runs}.values())
    for what, number in (("sizes", len(sizes)), ("amounts", len({run.amount for run in runs}))):
        if number < NEEDED_DISTINCT:
            found.append(f"{number} {what}; fitting a law needs {NEEDED_DISTINCT} (tools/fit_scaling_law.py)")
    repeated = [run for run in runs if run.epochs > 1]
    if repeated:
        most = max(run.epochs for run in repeated)
        found.append(f"{len(repeated)} runs see samples again (up to {most:.1f} epochs): repeated tokens count in D")
    if any(run.config.run.save_interval is None for run in runs):
        found.append("without save_interval, an interrupted run begins anew")
    if varying := varying_settings(sizes):
        found.append(f"the models' files also differ in {', '.join(varying)}, which a law takes for noise")
    if kind in ("tokens", "flops"):
        off = {run.name: abs(getattr(run, kind) / float(run.amount) - 1) for run in runs}
        if far := [name for name in off if off[name] > _FAR]:
            worst = max(far, key=off.__getitem__)
            found.append(f"whole iterations miss the amount of {len(far)} runs by up to {off[worst]:.1%} ({worst})")
    return found
