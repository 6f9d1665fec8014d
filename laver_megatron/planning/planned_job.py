"""From the planner's flags to a job: the model, its encoder, the packs and the GPUs, each checked."""

from __future__ import annotations

import argparse
from pathlib import Path

from laver_megatron.config.fields import Config, ConfigError
from laver_megatron.encoders import EncoderShape, encoder_tensor_sizes, open_preprocessor, read_encoder
from laver_megatron.planning.hardware import find_gpu
from laver_megatron.planning.layouts import FIRST, LAST, Pinned, layout_problems
from laver_megatron.planning.models import REPOSITORIES, SIGLIP2, SIGLIP2_REPOSITORY, encoder_sizes, find_model
from laver_megatron.planning.plan import Job
from laver_megatron.planning.workload import Workload, workload_of

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
_MOST = 10**6  # of anything that is counted, but for the iterations
_MOST_ITERATIONS = 10**9


def pinned_fields(arguments: argparse.Namespace) -> Pinned:
    """Fields of Config that the command line gives.

    Raises:
        ConfigError: a number that cannot be.
    """
    given = {field: getattr(arguments, flag) for flag, field in _PINNED.items()}
    pinned = {field: value for field, value in given.items() if value is not None}
    if pinned.get("recompute_granularity") == "none":
        pinned["recompute_granularity"] = None
    _check_counts({field: value for field, value in pinned.items() if isinstance(value, int)})
    return pinned


def _check_counts(numbers: dict[str, int]) -> None:
    wrong = []
    for name, number in numbers.items():
        most = _MOST_ITERATIONS if name == "--train-iters" else _MOST
        if number < 1:
            wrong.append(f"{name} is {number}, but must be at least 1")
        elif number > most:
            wrong.append(f"{name} is {number}, but must be at most {most:,}")
    if wrong:
        raise ConfigError(wrong)


def make_job(arguments: argparse.Namespace) -> Job:
    """What is to be planned.

    Raises:
        ConfigError: a model, GPU or number that cannot be.
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
