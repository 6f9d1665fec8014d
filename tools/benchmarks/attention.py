"""The attention kernels over the packs of the step benchmark, beside plain causal SDPA; Markdown on standard output.

    python -m tools.benchmarks.attention                    `dense` and what else runs on the CPU, two CPU shapes
    python -m tools.benchmarks.attention --quick            a tiny shape, two rounds: does it run?
    python -m tools.benchmarks.attention --device cuda --bf16 --shapes 0.5b 7b-width --lengths 4096 8192

One layer's core attention, forward alone and forward with backward, on the mask of the language stream and on that of
language and reconstruction stream together, as a student with LaVer has it. All take turns within every round; ratios
are taken within a round, and their median and range are printed.

Letters: B packs, L tokens, A query heads, G key/value heads, D head width.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from laver_megatron.config.fields import ModelConfig
from laver_megatron.model.attention import SpanAttention
from laver_megatron.model.spans import concatenate_spans, language_spans, reconstruction_spans, span_area
from laver_megatron.runtime.backend import use_backend
from tools.benchmarks import report
from tools.benchmarks.plain_steps import wait_for
from tools.benchmarks.step_shapes import SHAPES, StepShape, make_packs

KERNELS = tuple(
    kernel
    for item in fields(ModelConfig)
    if item.name == "attention_kernel"
    for kernel in item.metadata["choices"]
    if kernel != "auto"
)
CPU_SHAPES = ("h512-l4-s512", "h256-l4-s2048")
PLAIN = "causal"


@dataclass(frozen=True)
class Stream:
    """Spans `[B, 2, L]` of a micro-batch, the lengths of its parts, and the pairs inside the mask."""

    name: str
    spans_B2L: Tensor
    segments: tuple[int, ...]
    area: int


@dataclass
class Contender:
    """One kernel on one stream; seconds of a call by round.

    Attributes:
        attend: from query `[L, B, A, D]`, key and value `[L, B, G, D]` and spans to the context `[L, B, A * D]`.
        area: pairs of a query and a key that the task has.
        first: forward on spans that no call has seen: what the kernel makes of them once a micro-batch is in it.
        peak_bytes: of forward and backward above the inputs; CUDA alone.
    """

    name: str
    attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    area: int
    forward: list[float] = field(default_factory=list)
    both: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    peak_bytes: int | None = None


def streams_of(shape: StepShape) -> list[Stream]:
    """The language stream alone, and with the reconstruction stream behind it. Padding is no work."""
    packs = make_packs(shape, shape.micro_batch_size)
    language = language_spans(packs.document_BS, packs.image_BS, "mixed")
    image_BV = torch.full((shape.micro_batch_size, shape.visual_seq_length), -1)
    num_visual = shape.num_images * shape.image_tokens
    image_BV[:, :num_visual] = torch.arange(num_visual) // shape.image_tokens
    both = concatenate_spans(language, reconstruction_spans(image_BV))
    counted_BS = packs.document_BS >= 0
    counted_BL = torch.cat([counted_BS, image_BV >= 0], dim=1)
    lengths = (shape.seq_length, shape.visual_seq_length)
    return [
        Stream("language", language, lengths[:1], span_area(language, counted_BS)),
        Stream("language and reconstruction", both, lengths, span_area(both, counted_BL)),
    ]


def of_length(shape: StepShape, seq_length: int) -> StepShape:
    """The same heads and images on packs of another length, with as large a share of visual tokens."""
    num_images = max(round(shape.num_images * seq_length / shape.seq_length), 1)
    return replace(shape, seq_length=seq_length, num_images=num_images)


def flops_of(shape: StepShape, area: int, *, backward: bool) -> int:
    """Two matrix products forward and four backward; scores computed again in the backward pass are no work."""
    width = shape.hidden_size // shape.num_attention_heads
    return (12 if backward else 4) * area * shape.num_attention_heads * width


def plain_causal(device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """SDPA with its own causal mask; on CUDA its flash kernel or an error."""

    def attend(query_LBAD: Tensor, key_LBGD: Tensor, value_LBGD: Tensor, _: Tensor) -> Tensor:
        heads = [x.permute(1, 2, 0, 3) for x in (query_LBAD, key_LBGD, value_LBGD)]
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if device.type == "cuda" else nullcontext():
            context_BALD = scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        return context_BALD.permute(2, 0, 1, 3).flatten(2)

    return attend


def contenders_of(
    stream: Stream, kernels: Sequence[str], device: torch.device, *, has_flash: bool = True
) -> list[Contender]:
    """Plain causal attention over as many tokens in one document, and the kernels. has_flash: plain flash can take the
    dtype, which on CUDA excludes fp32."""
    num_packs, _, length = stream.spans_B2L.shape
    plain = Contender(PLAIN, plain_causal(device), num_packs * length * (length + 1) // 2)
    ours = [
        Contender(kernel, SpanAttention(SimpleNamespace(), 1, kernel=kernel, segments=stream.segments), stream.area)
        for kernel in kernels
    ]
    return [plain, *ours] if has_flash else ours


class Task:
    """Random inputs of one shape and stream, and calls of contenders on them."""

    def __init__(self, shape: StepShape, stream: Stream, device: torch.device, dtype: torch.dtype, calls: int) -> None:
        self.device, self.calls, self.spans_B2L = device, calls, stream.spans_B2L.to(device)
        num_packs, _, length = stream.spans_B2L.shape
        width = shape.hidden_size // shape.num_attention_heads
        generator = torch.Generator().manual_seed(0)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(length, num_packs, *sizes, generator=generator).to(device, dtype)

        heads = (shape.num_attention_heads, shape.num_query_groups, shape.num_query_groups)
        self.inputs = [normal(number, width).requires_grad_() for number in heads]
        self.gradient = normal(shape.hidden_size)

    def forward(self, contender: Contender) -> None:
        with torch.no_grad():
            contender.attend(*self.inputs, self.spans_B2L)

    def both(self, contender: Contender) -> None:
        torch.autograd.grad(contender.attend(*self.inputs, self.spans_B2L), self.inputs, self.gradient)

    def first(self, contender: Contender) -> None:
        spans_B2L = self.spans_B2L.clone()
        with torch.no_grad():
            contender.attend(*self.inputs, spans_B2L)

    def seconds(self, work: Callable[[Contender], None], contender: Contender, calls: int) -> float:
        """Of one of `calls` calls in a row, which the device takes without waiting for the host between them."""
        started = wait_for(self.device)
        for _ in range(calls):
            work(contender)
        return (wait_for(self.device) - started) / calls

    def peak_bytes(self, contender: Contender) -> int | None:
        if self.device.type != "cuda":
            return None
        wait_for(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self.both(contender)
        return torch.cuda.max_memory_allocated(self.device) - before


def _needs_cuda(contender: Contender, task: Task) -> bool:
    return task.device.type != "cuda" and contender.name not in (PLAIN, "dense")


def measure(task: Task, contenders: Sequence[Contender], rounds: int, *, must_run: bool) -> dict[str, str]:
    """Times all in turns. Returns why those that cannot run here cannot; must_run: raise it instead."""
    refused: dict[str, str] = {}
    for contender in contenders:
        report.progress(f"{contender.name}: {'not on a CPU' if _needs_cuda(contender, task) else 'warming up'}")
        try:
            if _needs_cuda(contender, task):
                raise NotImplementedError(f"{contender.name} needs CUDA")
            task.both(contender)  # compiles what is compiled
            task.forward(contender)
            contender.peak_bytes = task.peak_bytes(contender)
        except (ValueError, RuntimeError, NotImplementedError, ImportError) as error:
            if must_run or contender.name in (PLAIN, "dense"):
                raise
            refused[contender.name] = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
    report.progress(f"{report.count(rounds, 'round')} of {len(contenders) - len(refused)}")
    for _ in range(rounds):
        for contender in contenders:
            if contender.name in refused:
                continue
            contender.forward.append(task.seconds(task.forward, contender, task.calls))
            contender.both.append(task.seconds(task.both, contender, task.calls))
            contender.first.append(task.seconds(task.first, contender, 1))
    return refused


def section(shape: StepShape, stream: Stream, done: Sequence[Contender], refused: dict[str, str]) -> str:
    """The table of one shape and stream."""
    plain = next((contender for contender in done if contender.name == PLAIN), None)
    rows = []
    for contender in done:
        if contender.name in refused:
            continue
        row = [contender.name]
        for seconds, backward in ((contender.forward, False), (contender.both, True)):
            speed = flops_of(shape, contender.area, backward=backward) / median(seconds) / 1e12
            row += [report.spread([1e3 * second for second in seconds], ".3f"), f"{speed:.4g}"]
            if plain is not None:
                over = plain.area / contender.area
                row.append(report.ratio(plain.forward if not backward else plain.both, seconds, over=over))
        made = [max(a - b, 0.0) for a, b in zip(contender.first, contender.forward, strict=True)]
        row.append(report.spread([1e3 * second for second in made], ".3f"))
        row.append("" if contender.peak_bytes is None else f"{contender.peak_bytes / 2**20:.0f}")
        rows.append(row)
    against = ["speed / `causal`"] if plain is not None else []
    head = ["kernel", "forward, ms", "TFLOP/s", *against, "forward and backward, ms", "TFLOP/s", *against]
    width = shape.hidden_size // shape.num_attention_heads
    square = stream.spans_B2L.shape[0] * stream.spans_B2L.shape[2] ** 2
    facts = (
        f"{shape.num_attention_heads} heads of {width}, {shape.num_query_groups} of keys and values, "
        f"{stream.spans_B2L.shape[2]} tokens, {report.count(shape.num_images, 'image')} of "
        f"{shape.grid_side}x{shape.grid_side}; "
        f"{stream.area / square:.3f} of the square are inside the mask."
    )
    table = report.table([*head, "made once a micro-batch, ms", "peak memory, MiB"], rows)
    not_run = [f"- `{name}` does not run here: {reason}" for name, reason in refused.items()]
    return "\n\n".join([f"## {shape.name}, S {shape.seq_length}, {stream.name}", facts, table, *not_run])


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=tuple(SHAPES), help=f"default: {' '.join(CPU_SHAPES)}")
    add("--lengths", nargs="+", type=int, help="tokens of a pack (default: the shape's)")
    add("--kernels", nargs="+", choices=KERNELS, help="default: all, and the report says which cannot run")
    add("--rounds", type=int, default=7, help="measurements of each (default: 7)")
    add("--calls", type=int, help="calls in a row of one measurement (default: 1; on CUDA 10)")
    add("--threads", type=int, default=1, help="threads of torch (default: 1)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--bf16", action="store_true", help="in bf16 (default: fp32, which flash kernels on CUDA do not take)")
    add("--quick", action="store_true", help="one tiny shape, two rounds")
    add("--output", type=Path, help="a file for the report (default: standard output)")
    options = parser.parse_args(argv)
    if options.quick:
        options.shapes, options.rounds = options.shapes or ["tiny"], 2
    options.shapes = options.shapes or list(CPU_SHAPES)
    options.calls = options.calls or (10 if options.device == "cuda" else 1)
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    device = report.chosen_device(use_backend().device, options.device)
    on_gpus = [kernel for kernel in options.kernels or () if kernel != "dense"]
    if on_gpus and device.type != "cuda":
        sys.exit(f"--kernels {' '.join(on_gpus)} need CUDA; leave them out, or use --device cuda")
    torch.set_num_threads(options.threads)
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    sections = [_legend(options)]
    for key in options.shapes:
        for length in options.lengths or [SHAPES[key].seq_length]:
            shape = of_length(SHAPES[key], length)
            for stream in streams_of(shape):
                task = Task(shape, stream, device, dtype, options.calls)
                has_flash = device.type == "cpu" or options.bf16
                contenders = contenders_of(stream, options.kernels or KERNELS, device, has_flash=has_flash)
                refused = measure(task, contenders, options.rounds, must_run=options.kernels is not None)
                sections.append(section(shape, stream, contenders, refused))
    report.write("Attention kernels", device, sections, options.output)


def _legend(options: argparse.Namespace) -> str:
    own = "its flash kernel (FlashAttention 2)" if options.device == "cuda" else "its CPU kernel"
    return "\n".join(
        [
            f"- `{PLAIN}`: PyTorch's SDPA, {own}, causal over as many tokens in one document: what there is to reach; "
            "the others: `--attention-kernel`",
            f"- {'bf16' if options.bf16 else 'fp32'}; median (range) of {options.rounds} rounds of "
            f"{report.count(options.calls, 'call')}, in turns; ratios also of each one's fastest round",
            "- TFLOP/s: pairs inside the mask alone, 4 FLOPs for each value of a head forward and 12 with the backward "
            f"pass; `speed / {PLAIN}` is the ratio of these",
            "- made once a micro-batch, for all layers: what forward takes longer on spans that it has not seen",
        ]
    )


if __name__ == "__main__":
    main()
