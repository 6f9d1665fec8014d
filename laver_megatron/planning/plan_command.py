"""The planner's command line: flags to a job, its search, and what comes of it."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from laver_megatron.config.command_line import exit_on_config_error
from laver_megatron.config.fields import ConfigError
from laver_megatron.model.modules import MODULES
from laver_megatron.planning.hardware import GIB, GPUS
from laver_megatron.planning.models import MODELS, REMARKS
from laver_megatron.planning.nearest import check_possible, nearest_that_fits
from laver_megatron.planning.plan import Plan, layout_name
from laver_megatron.planning.plan_report import search_json, search_report
from laver_megatron.planning.planned_job import make_job, pinned_fields
from laver_megatron.planning.planner import search

EXIT_NOTHING_FITS = 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Find the fastest layout of a run that fits, and what it costs, before anything is rented."
    )
    add = parser.add_argument
    add("--model", required=True, help=f"{', '.join(MODELS)}, or a directory with config.json")
    add("--encoder", help="directory of the image encoder (default: SigLIP2 so400m, 384 pixels)")
    add("--gpus", type=int, required=True, help="how many")
    add("--gpu", help=f"{', '.join(GPUS)}; or another one by the next flags")
    add("--gpu-memory", type=float, metavar="GIB", help="memory of one GPU")
    add("--gpu-tflops", type=float, metavar="TFLOPS", help="its dense bf16 peak")
    add("--bandwidth", type=float, metavar="GB/S", help="of its network, in one direction")
    add("--node-bandwidth", type=float, metavar="GB/S", help="to the GPUs of its machine (default: the known GPU's, "
        "of another one --bandwidth)")  # fmt: skip
    add("--gpus-per-node", type=int, metavar="N", help="GPUs of one machine (default: 8)")
    add("--seq-length", type=int, default=4096, help="tokens of a pack (default: %(default)s)")
    add("--global-batch-size", type=int, default=512, help="packs of an iteration (default: %(default)s)")
    add("--visual-share", type=float, default=0.5, help="of a pack's tokens (default: %(default)s)")
    add("--image-tokens", type=int, help="visual tokens of an image (default: the encoder's)")
    add("--documents", type=int, help="documents of a pack, which do not see each other (default: one an image)")
    add("--train-iters", type=int, default=6250, help="for the GPU hours (default: %(default)s)")
    add("--no-laver", action="store_true", help="plain next-token training")
    add("--freeze", nargs="*", choices=tuple(MODULES), default=["encoder"], help="modules that are not trained")
    layout = parser.add_argument_group("layout", "what is given is not searched")
    layout.add_argument("--tp", type=int, help="tensor_model_parallel_size")
    layout.add_argument("--pp", type=int, help="pipeline_model_parallel_size")
    layout.add_argument("--chunk-layers", type=int, help="num_layers_per_virtual_pipeline_stage")
    layout.add_argument("--decoder-first-pipeline-num-layers", type=int, metavar="N", help="of an uneven split")
    layout.add_argument("--decoder-last-pipeline-num-layers", type=int, metavar="N", help="of an uneven split")
    layout.add_argument("--micro-batch-size", type=int)
    layout.add_argument("--recompute", choices=("none", "selective", "full"))
    add("--layouts", type=int, default=8, metavar="N", help="how many to list (default: %(default)s)")
    add("--json", action="store_true", help="print JSON in place of tables")
    add("--write", metavar="FILE", help="write the fastest layout's configuration, for --config of the trainer")
    add("--overwrite", action="store_true", help="replace a file that is there")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the plan; ends with 2 for what cannot be planned, with 1 if nothing fits."""
    arguments = build_parser().parse_args(argv)
    with exit_on_config_error():
        if arguments.write:
            check_output(Path(arguments.write), overwrite=arguments.overwrite)
        job = make_job(arguments)
        pinned = pinned_fields(arguments)
        check_possible(job, pinned)
    found = search(job, pinned)
    instead = None if found.fitting else nearest_that_fits(job, pinned)
    if arguments.json:
        print(json.dumps(search_json(job, found, arguments.layouts, instead), indent=1))
    else:
        print(search_report(job, found, arguments.layouts, instead))
    if not found.fitting:
        sys.exit(EXIT_NOTHING_FITS)
    if arguments.write:
        command = shlex.join(sys.argv[1:] if argv is None else argv)
        with exit_on_config_error():
            _write(
                Path(arguments.write), plan_yaml(found.fitting[0], command, REMARKS.get(arguments.model.lower(), ""))
            )


def check_output(file: Path, *, overwrite: bool) -> None:
    """Whether a configuration can be written there.

    Raises:
        ConfigError: something is there already, or there is no such folder.
    """
    if file.is_dir():
        raise ConfigError([f"--write {file} is a directory; name a file"])
    if file.exists() and not overwrite:
        raise ConfigError([f"--write {file} is there already; replace it with --overwrite"])
    if not file.parent.is_dir():
        raise ConfigError([f"--write {file}: there is no directory {file.parent}; make it first"])
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ConfigError([f"--write {file}: it may not be written there"])


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text)
    except OSError as error:
        raise ConfigError([f"--write {file}: {error.strerror}"]) from error
    print(f"wrote {file}", file=sys.stderr)


def plan_yaml(plan: Plan, command: str, remark: str = "") -> str:
    """The configuration of a layout, with a header that says what it is and how to check it."""
    job = plan.job
    remark = "".join(f"# {line}\n" for line in textwrap.wrap(remark, 118))
    header = (
        f"# {layout_name(plan.config, job.num_gpus)} on {job.num_gpus} x {job.gpu.name}.\n"
        f"# Made by: python tools/plan.py {command}\n"
        f"# Predicted: {plan.fullest.memory_bytes / GIB:.1f} GiB on the fullest GPU, {plan.seconds:.2f} s an iteration "
        f"and {plan.gpu_hours:,.0f} GPU hours.\n"
        f"{remark}"
        f"# Check: bash examples/pretrain_laver.sh --config FILE --dry-run {job.num_gpus}\n\n"
    )
    return header + plan.config.to_yaml()
