"""`laver sweep`: the runs of a scaling study."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from laver_megatron.program import program, program_parser
from laver_megatron.run_log.run_summary import MANIFEST
from laver_megatron.studies.observations import NEEDED_DISTINCT
from laver_megatron.studies.sweep_options import LAVER_AND_BASELINE, SweepOptions

if TYPE_CHECKING:
    from laver_megatron.studies.sweep import SweepRun

DESCRIPTION = """
Makes the runs of a scaling study or an ablation: sizes x amounts of data or compute x arms (LaVer on and off, or any
named overrides of the configuration) x seeds.

Any flag of `laver train` that is not an option here goes to all runs. What comes out: configs/NAME.yaml,
manifest.csv (N, tokens and exact FLOPs of every run, before it has run), run.sh for one machine, and submit.sh, which
submits array.sh to SLURM. The same command again does what is left. Then fit: `laver fit --registry
DIR/runs --arm-by arm --output LAW`. The data are opened and their tokens counted, which is kept beside their index.
"""
EXAMPLES = [
    "--models examples/scaling/{0.5b,1.5b,3b,7b}.yaml --tokens 2e8 5e8 1e9 --output runs/sweep",
    "--models examples/scaling/{0.5b,1.5b,3b,7b}.yaml --flops 1e19 3e19 1e20 --output runs/iso",
    "--base base.yaml --models MODEL_DIR ... --subsets s1.parquet s2.parquet --output runs/sub",
    "--models one.yaml --tokens 2e8 --seeds 1 2 3 --arms arms.yaml --output runs/ablation",
]
_FAR = 0.02  # from an amount, as a share of it: worth a note


@program
def main(argv: Sequence[str] | None = None) -> None:
    """Reads the options and makes the sweep."""
    parser = build_parser()
    options, flags = parser.parse_known_args(argv, SweepOptions())
    options.flags = flags
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    make_sweep(options)


def build_parser() -> argparse.ArgumentParser:
    """The parser; defaults are those of SweepOptions."""
    parser = program_parser(
        "sweep",
        DESCRIPTION,
        EXAMPLES,
        usage="%(prog)s --models MODEL [MODEL ...] (--iterations|--tokens|--flops|--subsets) X [X ...] --output DIR "
        "[options below] [--any-field value ...]",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--models", nargs="+", required=True, metavar="MODEL",
        help="the sizes: configuration files, or Hugging Face directories to be trained by --base")  # fmt: skip
    add("--base", metavar="FILE", help="configuration of those models that are directories")
    amounts = parser.add_mutually_exclusive_group(required=True).add_argument
    amounts("--iterations", nargs="+", metavar="N", help="amounts of data, in iterations")
    amounts("--tokens", nargs="+", metavar="D", help="amounts of data, in tokens of the language stream")
    amounts("--flops", nargs="+", metavar="C",
        help="compute budgets: every size and arm gets the number of iterations that comes nearest")  # fmt: skip
    amounts("--subsets", nargs="+", metavar="FILE",
        help="nested subsets (laver shards subset), of which each run sees one epoch")  # fmt: skip
    add("--output", type=Path, required=True, metavar="DIR", help="where configurations, scripts and runs go")
    add("--arms", nargs="+", metavar="ARM",
        help=f"{' and '.join(LAVER_AND_BASELINE)}, or YAML files of NAME: {{FIELD: VALUE}}")  # fmt: skip
    add("--arm", action="append", metavar="NAME=FIELD:VALUE,...",
        help="one more arm, such as mim=gram_loss:none; without --arms these are all")  # fmt: skip
    add("--seeds", nargs="+", type=int, metavar="N", help="(default: the configuration's)")
    add("--max-epochs", type=float, metavar="E", help="how often a run may see the data (default: 1)")
    add("--num-gpus", nargs="+", type=int, metavar="N",
        help="for each model, or one number for all (default: TP x PP of each)")  # fmt: skip
    add("--gpus-per-node", type=int, metavar="N", help="(default: 8)")
    add("--lr-exponent", type=float, metavar="P",
        help="the rate falls as N to the power -P, from the smallest model's (default: as configured)")  # fmt: skip
    add("--lr-warmup-share", type=float, metavar="S", help="warm-up as a share of each run's iterations")
    return parser


def make_sweep(options: SweepOptions) -> None:
    """Works out the runs, writes them, and prints a table and notes."""
    from laver_megatron.studies.sweep import sweep_runs
    from laver_megatron.studies.sweep_files import write_sweep

    runs, output = sweep_runs(options), options.output
    write_sweep(runs, output, options.gpus_per_node)
    print(table(runs))
    for note in notes(runs, options.amount_kind):
        print(f"note: {note}", file=sys.stderr)
    here, on_slurm = (f"bash {shlex.quote(str(output / name))}" for name in ("run.sh", "submit.sh"))
    print(f"{_counted(len(runs), 'run')} in {output / MANIFEST}; {here} runs them here, {on_slurm} on SLURM")


def table(runs: Sequence[SweepRun]) -> str:
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


def notes(runs: Sequence[SweepRun], kind: str) -> Iterator[str]:
    """What a reader should know before so much is computed."""
    from laver_megatron.studies.sweep_sizes import varying_settings

    sizes = list({run.size.name: run.size for run in runs}.values())
    for what, number in (("size", len(sizes)), ("amount", len({run.amount for run in runs}))):
        if number < NEEDED_DISTINCT:
            yield f"{_counted(number, what)}; fitting a law needs {NEEDED_DISTINCT} (tools/fit_scaling_law.py)"
    if repeated := [run.epochs for run in runs if run.epochs > 1]:
        epochs = f"up to {max(repeated):.1f} epochs"
        yield f"samples are seen again in {_counted(len(repeated), 'run')} ({epochs}): repeated tokens count in D"
    if any(run.config.run.save_interval is run.config.reliability.save_interval_minutes is None for run in runs):
        yield "without save_interval and save_interval_minutes, an interrupted run begins anew"
    if varying := varying_settings(sizes):
        yield f"the models' files also differ in {', '.join(varying)}, which a law takes for noise"
    if kind in ("tokens", "flops"):
        off = {run.name: abs(getattr(run, kind) / float(run.amount) - 1) for run in runs}
        if far := [name for name in off if off[name] > _FAR]:
            worst = max(far, key=off.__getitem__)
            yield f"whole iterations miss the amount of {_counted(len(far), 'run')} by up to {off[worst]:.1%} ({worst})"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
