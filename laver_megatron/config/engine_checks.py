"""Whether the engine, Megatron-Core as it is installed, and the hardware can compute a step as the configuration
asks."""

from __future__ import annotations

from collections.abc import Iterator

from laver_megatron.config.capabilities import AMPERE, BLACKWELL, HOPPER, Capabilities
from laver_megatron.config.fields import Config, default_of
from laver_megatron.config.refused import REFUSED
from laver_megatron.hf.shape import ModelShape

_WIDEST_FLASH_HEAD = 128


def engine_problems(
    config: Config,
    capabilities: Capabilities | None = None,
    shape: ModelShape | None = None,
    num_replicas: int | None = None,
) -> Iterator[str]:
    """What is wrong with the options of the engine. capabilities: of the machine; None: unknown. So are the shape and
    the number of data-parallel replicas."""
    if config.model.attention_kernel == "flash":
        yield from flash_problems(config, shape, capabilities)
    elif config.model.attention_kernel == "flex" and capabilities and capabilities.compute_capability is None:
        yield "attention_kernel flex needs CUDA (it has no backward pass on CPU); use auto or dense"
    yield from _overlap_problems(config, capabilities, num_replicas)
    yield from _recompute_problems(config)
    for name, refusal in REFUSED.items():
        if (value := config.flat()[name]) in refusal.values:
            yield f"{name} {'on' if value is True else value} is not supported: {refusal.why}; {refusal.remedy}"
    yield from _fp8_problems(config)
    yield from _optimizer_problems(config)
    if capabilities is not None:
        yield from _machine_problems(config, capabilities)


def flash_problems(config: Config, shape: ModelShape | None, capabilities: Capabilities | None) -> Iterator[str]:
    """Why attention kernel flash cannot compute a run; shape and capabilities None leave out what depends on them."""
    if capabilities is not None and capabilities.compute_capability is None:
        yield "attention_kernel flash needs CUDA; use auto or dense"
        return
    if capabilities is not None and capabilities.compute_capability < AMPERE:  # type: ignore[operator]
        found = ".".join(map(str, capabilities.compute_capability))  # type: ignore[arg-type]
        yield f"attention_kernel flash needs a GPU of compute capability 8.0, but this has {found}; use flex"
    if not config.training.bf16:
        yield "attention_kernel flash computes in 16 bits; set --bf16, or use auto"
    if shape is not None and (shape.kv_channels % 8 or shape.kv_channels > _WIDEST_FLASH_HEAD):
        yield (
            f"attention_kernel flash takes heads of a multiple of 8 up to {_WIDEST_FLASH_HEAD} wide, but the model's "
            f"are {shape.kv_channels}; use flex"
        )


def _fp8_problems(config: Config) -> Iterator[str]:
    training, data = config.training, config.data
    if training.fp8_format is None:
        if training.teacher_fp8:
            yield "teacher_fp8 needs fp8_format, which says the format; set --fp8-format hybrid, or drop it"
        if training.fp8_recipe != default_of("fp8_recipe"):
            yield (
                f"fp8_recipe {training.fp8_recipe} has no use without fp8_format; set --fp8-format hybrid, or drop it"
            )
        return
    if not training.bf16:
        yield f"fp8_format {training.fp8_format} needs bf16, in which all else is computed; set --bf16"
    if training.teacher_fp8 and not config.objective.laver:
        yield "teacher_fp8 is set, but without LaVer there is no teacher; drop it"
    if training.fp8_recipe == "delayed" and "layernorm" in (config.engine.recompute_modules or ()):
        yield "fp8_recipe delayed cannot recompute layernorm; use tensorwise, or other recompute_modules"
    ranks = config.parallel.tensor_model_parallel_size if config.parallel.sequence_parallel else 1
    visual = data.visual_seq_length if config.objective.laver else 0
    lengths = {"seq_length + visual_seq_length": data.seq_length + visual}
    if training.teacher_fp8 and visual:
        lengths["visual_seq_length"] = visual
    multiple = 32 if training.fp8_recipe == "mxfp8" else 16
    if visual or not config.objective.laver:  # 0: the data propose it
        for name, length in lengths.items():
            tokens = length * data.micro_batch_size // ranks
            if tokens % multiple:
                yield (
                    f"FP8 multiplies multiples of {multiple} tokens with recipe {training.fp8_recipe}, but {name} "
                    f"{length} x micro_batch_size {data.micro_batch_size} / {ranks} ranks is {tokens}; change them"
                )


def _optimizer_problems(config: Config) -> Iterator[str]:
    if not config.training.use_precision_aware_optimizer:
        return
    if config.objective.laver:
        yield (
            "use_precision_aware_optimizer keeps no fp32 master weights, but the teacher averages them; drop it, or "
            "train with --no-laver"
        )
    if not config.training.bf16:
        yield "use_precision_aware_optimizer keeps what bf16 weights lack of fp32; set --bf16, or drop it"


def _machine_problems(config: Config, capabilities: Capabilities) -> Iterator[str]:
    training, found = config.training, capabilities.compute_capability
    asked = {
        f"fp8_format {training.fp8_format}": training.fp8_format is not None,
        "use_precision_aware_optimizer": training.use_precision_aware_optimizer,
    }
    for name in (name for name, is_asked in asked.items() if is_asked):
        if found is None:
            yield f"{name} needs a GPU, and none is here; drop it"
        elif capabilities.transformer_engine is None:
            yield f"{name} needs TransformerEngine; pip install 'laver_megatron[gpu]', or use the Dockerfile"
        elif capabilities.transformer_engine < (2, 1):
            have = ".".join(map(str, capabilities.transformer_engine))
            yield f"{name} needs TransformerEngine 2.1 or newer, but {have} is installed; update it"
    if training.fp8_format is None or found is None:
        return
    shown = ".".join(map(str, found))
    if found < (8, 9):
        yield f"fp8_format {training.fp8_format} needs a GPU of compute capability 8.9, but this has {shown}; drop it"
    elif training.fp8_recipe == "blockwise" and found < HOPPER:
        yield f"fp8_recipe blockwise needs Hopper (compute capability 9.0), but this GPU has {shown}; use tensorwise"
    elif training.fp8_recipe == "mxfp8" and found < BLACKWELL:
        yield f"fp8_recipe mxfp8 needs Blackwell (compute capability 10.0), but this GPU has {shown}; use blockwise"


def overlaps(config: Config, *, on_cuda: bool, num_replicas: int) -> tuple[bool, bool]:
    """Whether gradients are reduced beside the backward pass, and parameters gathered beside the forward pass. Where
    the run leaves it open, they are on CUDA where there is more than one replica."""
    reduce, gather = config.engine.overlap_grad_reduce, config.engine.overlap_param_gather
    by_default = on_cuda and num_replicas > 1
    reduces = by_default or bool(gather) if reduce is None else reduce
    return reduces, (by_default and reduces) if gather is None else gather


def _overlap_problems(config: Config, capabilities: Capabilities | None, num_replicas: int | None) -> Iterator[str]:
    engine = config.engine
    if engine.overlap_param_gather and engine.overlap_grad_reduce is False:
        yield (
            "overlap_param_gather needs overlap_grad_reduce, whose buckets it gathers; drop --no-overlap-grad-reduce, "
            "or set --no-overlap-param-gather"
        )
    # What is not known is taken to be as the option needs it.
    on_cuda = capabilities is None or capabilities.compute_capability is not None
    reduces, _ = overlaps(config, on_cuda=on_cuda, num_replicas=2 if num_replicas is None else num_replicas)
    if engine.ddp_bucket_size is not None and not reduces:
        why = "" if engine.overlap_grad_reduce is False else ", which is off here unless it is asked for"
        yield (
            f"ddp_bucket_size {engine.ddp_bucket_size} has no use without overlap_grad_reduce{why}: all gradients are "
            "reduced at once; set --overlap-grad-reduce, or drop it"
        )


def _recompute_problems(config: Config) -> Iterator[str]:
    modules, granularity = config.engine.recompute_modules, config.parallel.recompute_granularity
    if modules is None:
        return
    named = " ".join(modules) or "nothing"
    if granularity != "selective":
        yield (
            f"recompute_modules ({named}) are those of recompute_granularity selective, but it is "
            f"{granularity or 'none'}; set --recompute-granularity selective, or drop them"
        )
    elif not modules:
        yield "recompute_modules is empty, so recompute_granularity selective recomputes nothing; drop both"
