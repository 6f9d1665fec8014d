"""Prints published training runs on H100 and A100, language models alone, beside the times that the planner predicts.

    python tools/benchmarks/published.py

The sources give seconds per iteration, and the layout: NVIDIA/dgxc-benchmarking, release 25.02.01 to 25.04.01
(llama3.1, nemotron, nemo_megatron: README.md of each), bf16 on DGX H100, NeMo; and table 5 of Korthikanti et al.,
"Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198), A100-80GB, Megatron-LM.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from laver_megatron.config.fields import Config
from laver_megatron.flops.step import model_flops
from laver_megatron.hf.shape import ModelShape
from laver_megatron.planning.hardware import GPUS
from laver_megatron.planning.memory import fullest_state
from laver_megatron.planning.throughput import (
    FULL_OVERLAP,
    NO_OVERLAP,
    Overlap,
    seconds_of_stage,
    sent_bytes,
    stage_work,
)
from laver_megatron.planning.workload import Workload


@dataclass(frozen=True)
class PublishedRun:
    """A run and its measured seconds per iteration. tp, pp, context: its layout; chunk_layers: of a virtual stage;
    is_fitted: whether the planner's constants were fitted to it; the others only check them."""

    name: str
    gpu: str
    num_gpus: int
    shape: ModelShape
    seq_length: int
    global_batch_size: int
    seconds: float
    source: str
    tp: int = 1
    pp: int = 1
    context: int = 1
    chunk_layers: int | None = None
    micro_batch_size: int = 1
    recompute: str | None = None
    overlap: Overlap = FULL_OVERLAP
    is_fitted: bool = False

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.seq_length * self.global_batch_size / self.seconds / self.num_gpus


def predicted_seconds(run: PublishedRun) -> float:
    """What the planner's model says of a published run."""
    config = Config.of(
        data_path=("none",),
        run_dir="none",
        train_iters=1,
        laver=False,
        bf16=True,
        seq_length=run.seq_length,
        tensor_model_parallel_size=run.tp,
        pipeline_model_parallel_size=run.pp,
        num_layers_per_virtual_pipeline_stage=run.chunk_layers,
        sequence_parallel=run.tp > 1,
        micro_batch_size=run.micro_batch_size,
        global_batch_size=run.global_batch_size,
        recompute_granularity=run.recompute,
    )
    replicas = run.num_gpus // (run.tp * run.pp * run.context)
    num_micro_batches = run.global_batch_size // (replicas * run.micro_batch_size)
    work = Workload(run.seq_length, 0, 1, 1, "causal", None)
    model = model_flops(run.shape)
    longest = 0.0
    for stage in {0, run.pp - 1}:
        # Ranks that share a sequence divide gradients and optimizer between them like replicas.
        dp = replicas * run.context
        state = fullest_state(config, run.shape, None, {}, dp, stage)
        computed = stage_work(config, run.shape, model, work, stage, context_ranks=run.context)
        sent = sent_bytes(config, run.shape, work, state, dp, num_micro_batches, stage, context_ranks=run.context)
        seconds = seconds_of_stage(
            config, run.shape, computed, sent, state, GPUS[run.gpu], dp, num_micro_batches, run.overlap
        )
        longest = max(longest, seconds.total)
    return longest


def _shape(layers: int, hidden: int, ffn: int, heads: int, groups: int, words: int, head_size: int = 128) -> ModelShape:
    return ModelShape(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=head_size,
        vocab_size=words,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        tie_word_embeddings=False,
        max_position_embeddings=1 << 20,
    )


def _ungated(hidden: int) -> int:
    """Width of the gated MLP that has as many values as one of two matrices, four times as wide as the model."""
    return 4 * hidden * 2 // 3


LLAMA_8B = _shape(32, 4096, 14336, 32, 8, 128256)
LLAMA_70B = _shape(80, 8192, 28672, 64, 8, 128256)
# 126 layers of two less than the 128 places of 64 chunks: embedding and loss take one place each.
LLAMA_405B = _shape(128, 16384, 53248, 128, 8, 128256)
NEMOTRON_15B = _shape(32, 6144, _ungated(6144), 48, 8, 256000)
NEMOTRON_340B = _shape(96, 18432, _ungated(18432), 96, 8, 256000, 192)
GPT_175B = _shape(96, 12288, _ungated(12288), 96, 96, 51200)
GPT_22B = _shape(48, 6144, _ungated(6144), 64, 64, 51200, 96)
GPT_530B = _shape(105, 20480, _ungated(20480), 128, 128, 51200, 160)
GPT_1T = _shape(128, 25600, _ungated(25600), 160, 160, 51200, 160)


_LLAMA, _NEMOTRON, _GPT = (f"dgxc-benchmarking, {name}" for name in ("llama3.1", "nemotron", "nemo_megatron"))
_KORTHIKANTI = "arXiv 2205.05198, table 5"


def _h100(
    name: str, num_gpus: int, shape: ModelShape, seq: int, batch: int, seconds: float, source: str, **layout: Any
) -> PublishedRun:
    return PublishedRun(name, "h100-80gb", num_gpus, shape, seq, batch, seconds, source, **layout)


def _a100(name: str, num_gpus: int, shape: ModelShape, batch: int, seconds: float, **layout: Any) -> PublishedRun:
    return PublishedRun(
        name, "a100-80gb", num_gpus, shape, 2048, batch, seconds, _KORTHIKANTI, tp=8, overlap=NO_OVERLAP, **layout
    )


_8B = {"context": 2}
_70B = {"tp": 4, "pp": 4, "context": 2, "chunk_layers": 4}
_405B = {"tp": 8, "pp": 8, "context": 2, "chunk_layers": 2}
_15B = {"tp": 4, "micro_batch_size": 4}
_175B = {"tp": 4, "pp": 8, "chunk_layers": 1}

RUNS = (
    _h100("Llama-3.1-8B", 8, LLAMA_8B, 8192, 128, 12.27, _LLAMA, **_8B, is_fitted=True),
    _h100("Llama-3.1-8B", 128, LLAMA_8B, 8192, 2048, 12.33, _LLAMA, **_8B),
    _h100("Llama-3.1-70B", 64, LLAMA_70B, 8192, 128, 14.66, _LLAMA, **_70B),
    _h100("Llama-3.1-70B", 2048, LLAMA_70B, 8192, 4096, 14.66, _LLAMA, **_70B),
    _h100("Llama-3.1-405B", 512, LLAMA_405B, 8192, 256, 19.78, _LLAMA, **_405B),
    _h100("Llama-3.1-405B", 2048, LLAMA_405B, 8192, 1024, 19.87, _LLAMA, **_405B),
    _h100("Nemotron-4-15B", 16, NEMOTRON_15B, 4096, 64, 2.812, _NEMOTRON, **_15B, is_fitted=True),
    _h100("Nemotron-4-15B", 2048, NEMOTRON_15B, 4096, 8192, 2.887, _NEMOTRON, **_15B),
    _h100("Nemotron-4-340B", 128, NEMOTRON_340B, 4096, 32, 4.61, _NEMOTRON, tp=8, pp=8, chunk_layers=1),
    _h100("GPT-175B", 128, GPT_175B, 2048, 256, 8.309, _GPT, **_175B),
    _h100("GPT-175B", 2048, GPT_175B, 2048, 4096, 8.49, _GPT, **_175B),
    _a100("GPT-22B", 8, GPT_22B, 4, 1.10, micro_batch_size=4, recompute="selective"),
    _a100("GPT-22B", 8, GPT_22B, 4, 1.42, micro_batch_size=4, recompute="full"),
    _a100("GPT-175B", 64, GPT_175B, 64, 13.75, pp=8, chunk_layers=4, recompute="selective", is_fitted=True),
    _a100("GPT-175B", 64, GPT_175B, 64, 18.13, pp=8, chunk_layers=4, recompute="full"),
    _a100("GPT-530B", 280, GPT_530B, 280, 37.83, pp=35, chunk_layers=1, recompute="selective"),
    _a100("GPT-530B", 280, GPT_530B, 280, 49.05, pp=35, chunk_layers=1, recompute="full"),
    _a100("GPT-1T", 512, GPT_1T, 512, 71.49, pp=64, recompute="selective"),
    _a100("GPT-1T", 512, GPT_1T, 512, 94.42, pp=64, recompute="full"),
)


def comparison() -> list[str]:
    """The table of docs/planning.md, in Markdown."""
    lines = [
        "| run | GPUs | layout | recomputed | published tokens/s/GPU | predicted | ratio | source |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in RUNS:
        predicted = run.seq_length * run.global_batch_size / predicted_seconds(run) / run.num_gpus
        published = run.tokens_per_second_per_gpu
        virtual = f" VPP of {run.chunk_layers}" if run.chunk_layers else ""
        context = f" CP{run.context}" if run.context > 1 else ""
        lines.append(
            f"| {run.name}{' (fitted)' if run.is_fitted else ''} | {run.num_gpus} {run.gpu} | TP{run.tp} PP{run.pp}"
            f"{virtual}{context}, micro-batch {run.micro_batch_size} | {run.recompute or 'nothing'} | "
            f"{published:,.0f} | {predicted:,.0f} | {predicted / published:.2f} | {run.source} |"
        )
    return lines


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()  # --help
    print("\n".join(comparison()))


if __name__ == "__main__":
    main()
