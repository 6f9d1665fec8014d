"""The planner's command line: flags to a job, its search, and what comes of it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from laver_megatron.command_line import exit_on_config_error
from laver_megatron.config import FREEZABLE_MODULES, Config, ConfigError
from laver_megatron.encoders import encoder_tensor_sizes, open_preprocessor, read_encoder
from laver_megatron.scaling.hardware import GIB, GPUS, find_gpu
from laver_megatron.scaling.layouts import FIRST, LAST, Pinned, layout_problems
from laver_megatron.scaling.models import (
    MODELS,
    REPOSITORIES,
    SIGLIP2,
    SIGLIP2_REPOSITORY,
    encoder_sizes,
    find_model,
)
from laver_megatron.scaling.nearest import check_possible, nearest_that_fits
from laver_megatron.scaling.plan import Job, Plan, layout_name
from laver_megatron.scaling.plan_report import search_json, search_report
from laver_megatron.scaling.planner import search
from laver_megatron.scaling.workload import workload_of

EXIT_NOTHING_FITS = 1
_VISUAL_SLOTS = 128  # visual_seq_length is rounded up to a multiple of this, which every TP divides
_PINNED = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "chunk_layers": "num_layers_per_virtual_pipeline_stage",
    FIRST: FIRST,
    LAST: LAST,
    "micro_batch_size": "micro_batch_size",
    "recompute": "recompute_granularity",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Find the fastest layout of a run that fits, and what it costs, before anything is rented."
    )
    add = parser.add_argument
    add("--model", required=True, help=f"{', '.join(MODELS)}, or a directory with config.json")
    add("--encoder", help="directory of the image encoder (default: SigLIP2 so400m, 384 pixels)")
    add("--gpus", type=int, required=True, help="how many")
    add("--gpu", help=f"{', '.join(GPUS)}; or another one by the next three flags")
    add("--gpu-memory", type=float, metavar="GIB", help="memory of one GPU")
    add("--gpu-tflops", type=float, metavar="TFLOPS", help="its dense bf16 peak")
    add("--bandwidth", type=float, metavar="GB/S", help="of its network, in one direction")
    add("--gpus-per-node", type=int, metavar="N", help="GPUs of one machine (default: 8)")
    add("--seq-length", type=int, default=4096, help="tokens of a pack (default: %(default)s)")
    add("--global-batch-size", type=int, default=512, help="packs of an iteration (default: %(default)s)")
    add("--visual-share", type=float, default=0.5, help="of a pack's tokens (default: %(default)s)")
    add("--image-tokens", type=int, help="visual tokens of an image (default: the encoder's)")
    add("--documents", type=int, help="documents of a pack, which do not see each other (default: one an image)")
    add("--train-iters", type=int, default=6250, help="for the GPU hours (default: %(default)s)")
    add("--no-laver", action="store_true", help="plain next-token training")
    add("--freeze", nargs="*", choices=FREEZABLE_MODULES, default=["encoder"], help="modules that are not trained")
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
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the plan; ends with 2 for what cannot be planned, with 1 if nothing fits."""
    arguments = build_parser().parse_args(argv)
    with exit_on_config_error():
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
        Path(arguments.write).write_text(plan_yaml(found.fitting[0], " ".join(argv or sys.argv[1:])))
        print(f"wrote {arguments.write}", file=sys.stderr)


def pinned_fields(arguments: argparse.Namespace) -> Pinned:
    """Fields of Config that the command line gives."""
    given = {field: getattr(arguments, flag) for flag, field in _PINNED.items()}
    pinned = {field: value for field, value in given.items() if value is not None}
    if pinned.get("recompute_granularity") == "none":
        pinned["recompute_granularity"] = None
    wrong = [f"{name} is {value}, but must be at least 1" for name, value in pinned.items() if _is_below_one(value)]
    if wrong:
        raise ConfigError(wrong)
    return pinned


def _is_below_one(value: Any) -> bool:
    return isinstance(value, int) and value < 1


def make_job(arguments: argparse.Namespace) -> Job:
    """What is to be planned.

    Raises:
        ConfigError: a model, GPU or number that cannot be.
    """
    counts = ("gpus", "seq_length", "global_batch_size", "train_iters", "image_tokens", "documents", "layouts")
    wrong = [name for name in counts if getattr(arguments, name) is not None and getattr(arguments, name) < 1]
    if wrong:
        raise ConfigError(
            [f"--{name.replace('_', '-')} is {getattr(arguments, name)}, but must be at least 1" for name in wrong]
        )
    gpu = find_gpu(
        arguments.gpu,
        memory_gib=arguments.gpu_memory,
        tflops=arguments.gpu_tflops,
        bandwidth_gb=arguments.bandwidth,
        node_size=arguments.gpus_per_node,
    )
    shape = find_model(arguments.model)
    encoder, sizes, image_tokens = _encoder(arguments.encoder)
    image_tokens = arguments.image_tokens or image_tokens
    images = max(int(arguments.visual_share * arguments.seq_length / image_tokens), 1)
    try:
        workload = workload_of(
            seq_length=arguments.seq_length,
            visual_share=arguments.visual_share,
            image_tokens=image_tokens,
            num_documents=arguments.documents or images,
            attention="mixed",
            encoder=encoder,
        )
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    base = Config(
        load=f"hf:{_directory(arguments.model)}",
        encoder=arguments.encoder or f"models/{SIGLIP2_REPOSITORY.split('/')[1]}",
        data_path=("shards",),
        run_dir=f"runs/{Path(arguments.model).name}",
        seq_length=arguments.seq_length,
        visual_seq_length=min(-(-workload.num_visual_tokens // _VISUAL_SLOTS) * _VISUAL_SLOTS, arguments.seq_length),
        global_batch_size=arguments.global_batch_size,
        train_iters=arguments.train_iters,
        laver=not arguments.no_laver,
        freeze=tuple(arguments.freeze),
        bf16=True,
    )
    job = Job(base, shape, workload, sizes, gpu, arguments.gpus)
    # What is wrong whatever the layout.
    problems = layout_problems(Job(base, shape, workload, sizes, gpu, 1), base)
    if problems:
        raise ConfigError(problems)
    return job


def _encoder(directory: str | None) -> tuple[Any, dict[str, tuple[int, ...]], int]:
    """Shape, sizes of the tensors and visual tokens of an image."""
    if directory is None:
        assert SIGLIP2.num_tokens is not None
        return SIGLIP2, encoder_sizes(SIGLIP2), SIGLIP2.num_tokens
    shape = read_encoder(directory)
    try:
        tokens = shape.num_tokens or open_preprocessor(directory).most_tokens
        return shape, encoder_tensor_sizes(directory), tokens
    except ValueError as error:
        raise ConfigError([f"encoder {error}"]) from error


def _directory(model: str) -> str:
    """Where the weights are taken to be: the directory named, or one below models/ with the published name."""
    if model.lower() in REPOSITORIES:
        return f"models/{REPOSITORIES[model.lower()].split('/')[1]}"
    return model


def plan_yaml(plan: Plan, command: str) -> str:
    """The configuration of a layout, with a header that says what it is and how to check it."""
    job = plan.job
    header = (
        f"# {layout_name(plan.config, job.num_gpus)} on {job.num_gpus} x {job.gpu.name}.\n"
        f"# Made by: python tools/plan.py {command}\n"
        f"# Predicted: {plan.fullest.memory_bytes / GIB:.1f} GiB on the fullest GPU, {plan.seconds:.2f} s an iteration "
        f"and {plan.gpu_hours:,.0f} GPU hours.\n"
        f"# Check: bash examples/pretrain_laver.sh --config FILE --dry-run {job.num_gpus}\n\n"
    )
    return header + plan.config.to_yaml()
