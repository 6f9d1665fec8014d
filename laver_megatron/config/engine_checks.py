"""Whether the engine, Megatron-Core as it is installed, and the hardware can compute a step as the configuration
asks."""

from __future__ import annotations

from collections.abc import Iterator

from laver_megatron.config.fields import Config


def engine_problems(config: Config) -> Iterator[str]:
    """What is wrong with the options of the engine."""
    yield from _overlap_problems(config)
    yield from _recompute_problems(config)


def _overlap_problems(config: Config) -> Iterator[str]:
    engine = config.engine
    if engine.overlap_param_gather and engine.overlap_grad_reduce is False:
        yield (
            "overlap_param_gather needs overlap_grad_reduce, whose buckets it gathers; drop --no-overlap-grad-reduce, "
            "or set --no-overlap-param-gather"
        )
    if engine.ddp_bucket_size is not None and engine.overlap_grad_reduce is False:
        yield (
            f"ddp_bucket_size {engine.ddp_bucket_size} has no use without overlap_grad_reduce: all gradients are "
            "reduced at once; drop one of the two"
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
