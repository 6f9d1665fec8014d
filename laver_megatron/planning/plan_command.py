"""`laver plan`: from flags to a job, its parts checked, and from the job to its plan."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from laver_megatron.config.engine_fields import RECOMPUTED_MODULES
from laver_megatron.config.fields import Config, ConfigError
from laver_megatron.config.modules import MODULES
from laver_megatron.encoders import EncoderShape, encoder_tensor_sizes, open_preprocessor, read_encoder
from laver_megatron.planning.hardware import GIB, GPUS, find_gpu
from laver_megatron.planning.models import (
    MODELS,
    REMARKS,
    REPOSITORIES,
    SIGLIP2,
    SIGLIP2_REPOSITORY,
    encoder_sizes,
    find_model,
)
from laver_megatron.planning.plan import Job, Plan, layout_name
from laver_megatron.planning.plan_report import search_json, search_report
from laver_megatron.planning.search import (
    FIRST,
    LAST,
    Pinned,
    check_possible,
    layout_problems,
    nearest_that_fits,
    search,
)
from laver_megatron.planning.workload import Workload, workload_of
from laver_megatron.program import program, program_parser
from laver_megatron.runtime.exit_status import FAILED

DESCRIPTION = """
Plans a run: which layout on these GPUs is the fastest that fits, what it takes in memory, time and GPU hours, and why
the others are not it. Needs neither weights, data nor GPUs. How it computes and how far it is off: docs/planning.md.
Exits with 1 if nothing fits.
"""

_VISUAL_SLOTS = 128  # visual_seq_length is rounded up to a multiple of this, which every TP divides
_PINNED = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "chunk_layers": "num_layers_per_virtual_pipeline_stage",
    FIRST: FIRST,
    LAST: LAST,
    "micro_batch_size": "micro_batch_size",
}
_MOST = 10**6  # of anything that is counted, but for the iterations
_MOST_ITERATIONS = 10**9


def pinned_fields(arguments: argparse.Namespace) -> Pinned:
    """Fields of Config that the command line gives.

    Raises:
        ConfigError: a number out of range.
    """
    given = {field: getattr(arguments, flag) for flag, field in _PINNED.items()}
    given["recompute_granularity"] = _recomputation(arguments)
    pinned = {field: value for field, value in given.items() if value is not None}
    if pinned.get("recompute_granularity") == "none":
        pinned["recompute_granularity"] = None
    _check_counts({field: value for field, value in pinned.items() if isinstance(value, int)})
    return pinned


def _recomputation(arguments: argparse.Namespace) -> str | None:
    """What --recompute says; None: it is searched. To name modules is to recompute them alone."""
    return arguments.recompute or ("selective" if arguments.recompute_modules else None)


def _check_counts(numbers: dict[str, int]) -> None:
    most = {name: _MOST_ITERATIONS if name == "--train-iters" else _MOST for name in numbers}
    wrong = [f"{name} is {number}, but must be at least 1" for name, number in numbers.items() if number < 1]
    wrong += [
        f"{name} is {number}, but must be at most {most[name]:,}"
        for name, number in numbers.items()
        if number > most[name]
    ]
    if wrong:
        raise ConfigError(wrong)


def make_job(arguments: argparse.Namespace) -> Job:
    """What is to be planned.

    Raises:
        ConfigError: an unknown model or GPU, or a number out of range.
    """
    counts = ("gpus", "seq_length", "global_batch_size", "train_iters", "image_tokens", "documents", "layouts")
    given = {f"--{name.replace('_', '-')}": getattr(arguments, name) for name in counts}
    _check_counts({flag: number for flag, number in given.items() if number is not None})
    gpu = find_gpu(
        arguments.gpu,
        memory_gib=arguments.gpu_memory,
        tflops=arguments.gpu_tflops,
        bandwidth_gb=arguments.bandwidth,
        node_bandwidth_gb=arguments.node_bandwidth,
        node_size=arguments.gpus_per_node,
    )
    shape = find_model(arguments.model)
    encoder, sizes, image_tokens = _encoder(arguments.encoder, arguments.image_tokens)
    workload = _workload(arguments, encoder, image_tokens)
    slots = -(-workload.num_visual_tokens // _VISUAL_SLOTS) * _VISUAL_SLOTS
    base = Config.of(
        load=f"hf:{_directory(arguments.model)}",
        encoder=arguments.encoder or f"models/{SIGLIP2_REPOSITORY.split('/')[1]}",
        data_path=("shards",),
        run_dir=f"runs/{Path(arguments.model).name}",
        seq_length=arguments.seq_length,
        visual_seq_length=min(slots, arguments.seq_length),
        max_image_tokens=arguments.image_tokens if encoder.is_native else None,
        global_batch_size=arguments.global_batch_size,
        train_iters=arguments.train_iters,
        recompute_granularity=None if (kind := _recomputation(arguments)) == "none" else kind,
        recompute_modules=None if arguments.recompute_modules is None else tuple(arguments.recompute_modules),
        laver=not arguments.no_laver,
        freeze=tuple(arguments.freeze),
        bf16=True,
    )
    # What is wrong whatever the layout.
    problems = layout_problems(Job(base, shape, workload, sizes, gpu, 1), base)
    if problems:
        raise ConfigError(problems)
    return Job(base, shape, workload, sizes, gpu, arguments.gpus)


def _workload(arguments: argparse.Namespace, encoder: EncoderShape, image_tokens: int) -> Workload:
    try:
        workload = workload_of(
            seq_length=arguments.seq_length,
            visual_share=arguments.visual_share,
            image_tokens=image_tokens,
            num_documents=arguments.documents,
            attention="mixed",
            encoder=encoder,
        )
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    if not workload.num_images and not arguments.no_laver:
        raise ConfigError(
            ["a visual share of 0 leaves nothing to reconstruct; give a --visual-share above 0, or --no-laver"]
        )
    return workload


def _encoder(directory: str | None, image_tokens: int | None) -> tuple[EncoderShape, dict[str, tuple[int, ...]], int]:
    """Shape, sizes of the tensors and visual tokens of an image. image_tokens: what is asked for."""
    if directory is None:
        assert SIGLIP2.num_tokens is not None
        shape, sizes, tokens = SIGLIP2, encoder_sizes(SIGLIP2), SIGLIP2.num_tokens
    else:
        shape = read_encoder(directory)
        try:
            # Of native resolution, a picture has as many as it is allowed; else as many as the processor makes of all.
            cap = image_tokens if shape.is_native else None
            tokens, sizes = open_preprocessor(directory, cap).most_tokens, encoder_tensor_sizes(directory)
        except ValueError as error:
            raise ConfigError([f"encoder {error}"]) from error
    if image_tokens not in (None, tokens):
        raise ConfigError(
            [
                f"--image-tokens is {image_tokens}, but the encoder makes {tokens} visual tokens of every image; "
                "leave it out, or name another encoder with --encoder"
            ]
        )
    return shape, sizes, tokens


def _directory(model: str) -> str:
    """Where the weights are taken to be: the directory named, or one below models/ with the published name."""
    if model.lower() in REPOSITORIES:
        return f"models/{REPOSITORIES[model.lower()].split('/')[1]}"
    return model


def build_parser() -> argparse.ArgumentParser:
    examples = [
        "--model 72b --gpus 256 --gpu h100-80gb --visual-share 0.6",
        "--model 7b --gpus 16 --gpu a100-80gb --tp 2 --pp 2 --write plan.yaml",
        "--model DIR --gpus 64 --gpu-memory 96 --gpu-tflops 400 --bandwidth 25 --node-bandwidth 450",
    ]
    parser = program_parser("plan", DESCRIPTION, examples)
    add = parser.add_argument_group("what is trained").add_argument
    add("--model", required=True, help=f"{', '.join(MODELS)}, or a directory with config.json")
    add("--encoder", help="directory of the image encoder (default: SigLIP2 so400m, 384 pixels)")
    add("--no-laver", action="store_true", help="plain next-token training")
    add("--freeze", nargs="*", choices=tuple(MODULES), default=["encoder"], help="modules that are not trained")
    add = parser.add_argument_group("on which GPUs").add_argument
    add("--gpus", type=int, required=True, help="how many")
    add("--gpu", help=f"{', '.join(GPUS)}; or another one by the next flags")
    add("--gpu-memory", type=float, metavar="GIB", help="memory of one GPU")
    add("--gpu-tflops", type=float, metavar="TFLOPS", help="its dense bf16 peak")
    add("--bandwidth", type=float, metavar="GB/S", help="of its network, in one direction")
    add("--node-bandwidth", type=float, metavar="GB/S", help="to the GPUs of its machine (default: the known GPU's, "
        "of another one --bandwidth)")  # fmt: skip
    add("--gpus-per-node", type=int, metavar="N", help="GPUs of one machine (default: 8)")
    add = parser.add_argument_group("on which data").add_argument
    add("--seq-length", type=int, default=4096, help="tokens of a pack")
    add("--global-batch-size", type=int, default=512, help="packs of an iteration")
    add("--visual-share", type=float, default=0.5, help="of a pack's tokens")
    add("--image-tokens", type=int, help="visual tokens of an image (default: the encoder's)")
    add("--documents", type=int, help="documents of a pack, which do not see each other (default: one an image)")
    add("--train-iters", type=int, default=6250, help="for the GPU hours")
    layout = parser.add_argument_group("layout", "what is given is not searched")
    layout.add_argument("--tp", type=int, help="tensor_model_parallel_size")
    layout.add_argument("--pp", type=int, help="pipeline_model_parallel_size")
    layout.add_argument("--chunk-layers", type=int, help="num_layers_per_virtual_pipeline_stage")
    layout.add_argument("--decoder-first-pipeline-num-layers", type=int, metavar="N", help="of an uneven split")
    layout.add_argument("--decoder-last-pipeline-num-layers", type=int, metavar="N", help="of an uneven split")
    layout.add_argument("--micro-batch-size", type=int)
    layout.add_argument("--recompute", choices=("none", "selective", "full"))
    layout.add_argument("--recompute-modules", nargs="+", choices=RECOMPUTED_MODULES, help="with --recompute "
        "selective, which they ask for (default: core_attn, which saves little of what GPUs keep)")  # fmt: skip
    add = parser.add_argument_group("output").add_argument
    add("--layouts", type=int, default=8, metavar="N", help="how many to list")
    add("--json", action="store_true", help="print JSON in place of tables")
    add("--write", metavar="FILE", help="write the fastest layout's configuration, for --config of the trainer")
    add("--overwrite", action="store_true", help="replace a file that is there")
    return parser


@program
def main(argv: Sequence[str] | None = None) -> None:
    """Prints the plan. Exits with 2 for what cannot be planned, with 1 if nothing fits."""
    arguments = build_parser().parse_args(argv)
    if arguments.write:
        check_output(Path(arguments.write), overwrite=arguments.overwrite)
    job, pinned = make_job(arguments), pinned_fields(arguments)
    check_possible(job, pinned)
    found = search(job, pinned)
    instead = None if found.fitting else nearest_that_fits(job, pinned)
    if arguments.json:
        print(json.dumps(search_json(job, found, arguments.layouts, instead), indent=1))
    else:
        print(search_report(job, found, arguments.layouts, instead))
    if not found.fitting:
        sys.exit(FAILED)
    if arguments.write:
        command = shlex.join(sys.argv[1:] if argv is None else argv)
        text = plan_yaml(found.fitting[0], command, REMARKS.get(arguments.model.lower(), ""))
        _write(Path(arguments.write), text)


def check_output(file: Path, *, overwrite: bool) -> None:
    """Whether a configuration can be written there.

    Raises:
        ConfigError: the file exists, or its directory does not.
    """
    if file.is_dir():
        raise ConfigError([f"--write {file} is a directory; name a file"])
    if file.exists() and not overwrite:
        raise ConfigError([f"--write {file} exists already; replace it with --overwrite"])
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
        f"# Made by: laver plan {command}\n"
        f"# Predicted: {plan.fullest.memory_bytes / GIB:.1f} GiB on the fullest GPU, {plan.seconds:.2f} s an iteration "
        f"and {plan.gpu_hours:,.0f} GPU hours.\n"
        f"{remark}"
        f"# Check: bash examples/pretrain_laver.sh --config FILE --dry-run {job.num_gpus}\n\n"
    )
    return header + plan.config.to_yaml()
