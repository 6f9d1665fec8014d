"""The files of a sweep: a configuration for each run, a manifest, and the scripts that run them."""

from __future__ import annotations

import csv
import io
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from laver_megatron.launcher import LAUNCHER
from laver_megatron.run_log.run_summary import FILE_NAME, MANIFEST, config_hash
from laver_megatron.runtime.files import new_directory
from laver_megatron.studies.sweep import SweepRun

_NO_WORD = re.compile(r"[^A-Za-z0-9._-]+")  # what SLURM would read as the end of a name, or as an option
# The scripts read the first three columns.
COLUMNS = (
    "name", "num_gpus", "num_nodes", "model", "arm", "seed", "amount", "N", "train_iters", "tokens", "visual_tokens",
    "flops", "laver_overhead", "epochs", "lr", "config_hash",
)  # fmt: skip

_RUN_SH = """\
#!/usr/bin/env bash
# Runs this sweep on this machine, one run after the other, the cheapest first: all of manifest.csv, or those named.
#   bash {output}/run.sh [NAME ...]
# Finished runs are skipped, interrupted ones go on from their last checkpoint: the same command does what is left.
set -uo pipefail
cd {directory} || exit 1
if [[ ! -r {output}/{manifest} ]]; then
  echo "sweep: no {manifest} in "{output}", where this sweep was made" >&2
  exit 1
fi
trap 'exit 130' INT
trap 'exit 143' TERM
unknown=()
for wanted in "$@"; do
  tail -n +2 {output}/{manifest} | cut -d, -f1 | grep -qxF -- "$wanted" || unknown+=("$wanted")
done
if ((${{#unknown[@]}})); then
  echo "sweep: no run ${{unknown[*]}} in {manifest}; its first column names the runs" >&2
  exit 2
fi
is_finished() {{ grep -qs '"state": "finished"' {output}/runs/"$1"/{summary}; }}
left=()
while IFS=, read -r name num_gpus num_nodes _ <&3; do
  (($# == 0)) || [[ " $* " == *" $name "* ]] || continue
  if is_finished "$name"; then
    echo "sweep: $name is finished" >&2
  elif ((num_nodes > 1)); then
    echo "sweep: $name needs $num_nodes nodes; submit.sh starts it" >&2
    left+=("$name")
  else
    echo "sweep: $name begins or goes on" >&2
    NPROC_PER_NODE=$num_gpus bash {launcher} --config {output}/configs/"$name".yaml 3<&-
    is_finished "$name" || left+=("$name")
  fi
done 3< <(tail -n +2 {output}/{manifest})
if ((${{#left[@]}})); then
  echo "sweep: not finished: ${{left[*]}}" >&2
  exit 1
fi
if (($#)); then
  echo "sweep: finished: $*" >&2
else
  echo "sweep: all runs are finished" >&2
fi
"""

_ARRAY_SH = """\
#!/usr/bin/env bash
#SBATCH --job-name={job}
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={output}/slurm-%A_%a.txt
# One run of the sweep: the line of manifest.csv that SLURM_ARRAY_TASK_ID says, from 1. submit.sh submits it; a run that
# was interrupted goes on from its last checkpoint when it is submitted, or requeued, again.
set -euo pipefail
cd {directory}
IFS=, read -r name num_gpus num_nodes _ < <(tail -n +$((SLURM_ARRAY_TASK_ID + 1)) {output}/{manifest})
if grep -qs '"state": "finished"' {output}/runs/"$name"/{summary}; then
  echo "sweep: $name is finished"
  exit 0
fi
export NPROC_PER_NODE=$((num_gpus / num_nodes))
srun --ntasks-per-node=1 bash {launcher} --config {output}/configs/"$name".yaml
"""

_SUBMIT_SH = """\
#!/usr/bin/env bash
# Submits the sweep as SLURM arrays, one for each number of nodes; further arguments go to sbatch:
#   bash {output}/submit.sh --partition=gpu --account=mine --time=2-0
# Finished runs end at once, so the same command again does what is left (cancel what still waits first).
set -euo pipefail
cd {directory}
{arrays}
"""


def write_sweep(runs: Sequence[SweepRun], output: Path, gpus_per_node: int) -> None:
    """Writes configs/NAME.yaml, manifest.csv, run.sh, array.sh and submit.sh; all of it or nothing.

    Raises:
        ValueError: runs whose GPUs do not fill whole nodes.
        OSError: the directory cannot be written.
    """
    nodes = [num_nodes(run, gpus_per_node) for run in runs]
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    names = {
        "output": shlex.quote(str(output)),
        "directory": shlex.quote(os.getcwd()),
        "launcher": shlex.quote(str(LAUNCHER)),
        "manifest": MANIFEST,
        "summary": FILE_NAME,
        "job": _NO_WORD.sub("-", output.absolute().name),
        "arrays": "\n".join(_array_commands(runs, nodes, shlex.quote(str(output)))),
    }
    with new_directory(output) as place:
        (place / "configs").mkdir()
        for run in runs:
            (place / "configs" / f"{run.name}.yaml").write_text(_config_text(run, output))
        (place / MANIFEST).write_text(_manifest_text(runs, nodes))
        for name, text in (("run.sh", _RUN_SH), ("array.sh", _ARRAY_SH), ("submit.sh", _SUBMIT_SH)):
            (place / name).write_text(text.format(**names))


def num_nodes(run: SweepRun, gpus_per_node: int) -> int:
    """How many nodes a run's GPUs fill. Raises ValueError if the last would not be full."""
    num_gpus = run.size.num_gpus
    if gpus_per_node < 1:
        raise ValueError(f"--gpus-per-node {gpus_per_node}: a node has at least one")
    if num_gpus > gpus_per_node and num_gpus % gpus_per_node:
        raise ValueError(
            f"{run.size.name}: {num_gpus} GPUs do not fill whole nodes of {gpus_per_node}; use --num-gpus "
            f"{-(-num_gpus // gpus_per_node) * gpus_per_node}, or say what a node has with --gpus-per-node"
        )
    return max(1, num_gpus // gpus_per_node)


def _config_text(run: SweepRun, output: Path) -> str:
    return (
        f"# {run.name}: N {run.size.num_parameters:,}, {run.tokens:,} tokens, {run.flops:.4e} FLOPs at its end.\n"
        f"# Made with {output / MANIFEST}, for {run.size.num_gpus} processes.\n\n{run.config.to_yaml()}"
    )


def _manifest_text(runs: Sequence[SweepRun], nodes: Sequence[int]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for run, number in zip(runs, nodes, strict=True):
        training, size = run.config.training, run.size
        writer.writerow([
            run.name, size.num_gpus, number, size.name, run.arm, training.seed, run.amount, size.num_parameters,
            training.train_iters, run.tokens, run.visual_tokens, run.flops, run.laver_overhead, f"{run.epochs:.4f}",
            training.lr, config_hash(run.config),
        ])  # fmt: skip
    return text.getvalue()


def _array_commands(runs: Sequence[SweepRun], nodes: Sequence[int], output: str) -> Iterator[str]:
    """One array for each kind of allocation. output: as the shell reads it."""
    lines: dict[tuple[int, int], list[str]] = {}
    for line, (number, run) in enumerate(zip(nodes, runs, strict=True), start=1):
        lines.setdefault((number, run.size.num_gpus // number), []).append(str(line))
    for (number, per_node), tasks in sorted(lines.items()):
        array = ",".join(tasks)
        yield f'sbatch --nodes={number} --gpus-per-node={per_node} --array={array} "$@" {output}/array.sh'
