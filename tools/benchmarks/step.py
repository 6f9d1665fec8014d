"""One training step (forward, backward, optimizer), ours beside others, in one process; Markdown on standard output.

    python -m tools.benchmarks.step                          the three CPU shapes, with one and with two threads
    python -m tools.benchmarks.step --shapes h512-l4-s512 --threads 1 --contenders lm qwen --rounds 15
    python -m tools.benchmarks.step --quick                  a tiny shape, two rounds: does it run?
    python -m tools.benchmarks.step --device cuda --bf16 --shapes 1.5b --one-at-a-time

The steps take turns within every round, so that what disturbs the machine disturbs all of them; ratios are taken
within a round, and their median and range are printed. `CONTENDERS` says what is compared.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils import logging as transformers_logging

from laver_megatron.flops.step import document_area, model_flops, step_flops
from laver_megatron.hf.shape import read_model_shape
from laver_megatron.runtime.backend import shut_down_parallelism, use_backend
from tools.benchmarks import report
from tools.benchmarks.memory import peak_of_steps
from tools.benchmarks.our_step import OurStep, make_config, make_trainer, timed_overhead, use_packs, write_model
from tools.benchmarks.plain_steps import MatrixProducts, OfficialReadingStep, QwenStep, wait_for
from tools.benchmarks.step_shapes import SHAPES, StepShape

CONTENDERS = {
    "products": "bare matrix products (torch.mm) of the LM step's shapes, forward and backward: the machine's speed",
    "qwen": "Hugging Face Qwen2ForCausalLM on the same tokens as text: SDPA, its own loss, fused AdamW, clipping",
    "text": "ours, `--no-laver`, on packs of text alone: what `qwen` computes",
    "lm": "ours, `--no-laver`, on the packs with images: connector, mixed attention, labels on text",
    "laver": "ours, with LaVer",
    "official": "a reading of the official LaVer step in plain PyTorch (not its code): doubled batch, whole-sequence "
    "teacher, eager attention over an explicit mask, full fp32 logits, one Gram matrix over all patches",
}
CPU_SHAPES = ("h512-l4-s512", "h512-l8-s1024", "h256-l4-s2048")


@dataclass
class Contender:
    """A step, its FLOPs by the convention of `flops/step.py` (or as counted, see `counted`), and seconds by round."""

    name: str
    step: Callable[[], None]
    flops: int
    counted: bool = False
    seconds: list[float] = field(default_factory=list)
    overhead: list[float] = field(default_factory=list)  # shares of the step
    peak_bytes: int | None = None  # measured in this process


class Bench:
    """The contenders of one shape on one device, built when first asked for."""

    def __init__(self, shape: StepShape, directory: Path, device: torch.device, *, bf16: bool) -> None:
        self.shape, self.directory, self.device, self.bf16 = shape, directory, device, bf16
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self.lm_parts: dict[str, int] = {}  # FLOPs of the step of `lm`
        self.too_large: list[str] = []  # contenders that the device's memory does not hold
        self._ours: dict[bool, Any] = {}

    def trainer(self, laver: bool) -> Any:
        """The LM-only trainer serves both kinds of packs."""
        if laver not in self._ours:
            if not (self.directory / "model").exists():
                write_model(self.shape, self.directory, self.dtype)
            config = make_config(self.shape, self.directory, laver=laver, bf16=self.bf16)
            self._ours[laver] = make_trainer(config, self.shape)
        return self._ours[laver]

    def build(self, name: str) -> Contender:
        if name == "products":
            products = MatrixProducts(self.shape, self.device, self.dtype)
            return Contender(name, products, products.flops)
        if name == "qwen":
            return Contender(name, QwenStep(self.shape, self.device, self.dtype), self._qwen_flops())
        if name == "official":
            official = OfficialReadingStep(self.shape, self.device, self.dtype)
            counter = FlopCounterMode(display=False)
            with counter:
                official()
            return Contender(name, official, counter.get_total_flops(), counted=True)
        trainer = self.trainer(name == "laver")
        ours = OurStep(use_packs(trainer, self.shape.with_images(0)) if name == "text" else trainer, name)
        flops = ours.flops()
        if name == "lm":
            self.lm_parts = flops.parts
        return Contender(name, ours, flops.total)

    def _qwen_flops(self) -> int:
        if not (self.directory / "model").exists():
            write_model(self.shape, self.directory, self.dtype)
        shape = self.shape
        step = step_flops(
            model_flops(read_model_shape(self.directory / "model")),
            num_tokens=shape.num_tokens,
            lm_span_area=shape.num_packs * document_area(shape.seq_length, [], "causal"),
            laver=False,
        )
        return step.total

    def forget(self) -> None:
        """Frees the trainers and leaves their parallel groups."""
        self._ours.clear()
        shut_down_parallelism()
        gc.collect()


def time_step(contender: Contender, device: torch.device) -> None:
    with timed_overhead() as overhead:
        started = wait_for(device)
        contender.step()
        seconds = wait_for(device) - started
    contender.seconds.append(seconds)
    contender.overhead.append(sum(overhead.values()) / seconds)


def run_rounds(contenders: Sequence[Contender], num_rounds: int, device: torch.device) -> None:
    """Two steps each to warm up, then rounds, in each of which another begins."""
    for contender in contenders:
        report.progress(f"{contender.name}: warming up")
        contender.step()
        contender.step()
    report.progress(f"{', '.join(contender.name for contender in contenders)}: {report.count(num_rounds, 'round')}")
    for number in range(num_rounds):
        first = number % len(contenders)
        for contender in [*contenders[first:], *contenders[:first]]:
            time_step(contender, device)


def measure(bench: Bench, names: Sequence[str], num_rounds: int, *, one_at_a_time: bool) -> dict[str, Contender]:
    """Timed contenders by name. one_at_a_time: each is freed before the next is built, where the memory does not hold
    all of them; ratios are then of rounds that lie apart."""
    if not one_at_a_time:
        contenders = [bench.build(name) for name in names]
        run_rounds(contenders, num_rounds, bench.device)
        return {contender.name: contender for contender in contenders}
    done, on_cuda = {}, bench.device.type == "cuda"
    for name in names:
        before = torch.cuda.memory_allocated(bench.device) if on_cuda else 0
        try:
            contender = bench.build(name)
            if on_cuda:
                torch.cuda.reset_peak_memory_stats(bench.device)
            run_rounds([contender], num_rounds, bench.device)
            if on_cuda:
                contender.peak_bytes = torch.cuda.max_memory_allocated(bench.device) - before
            contender.step = lambda: None
            done[name] = contender
        except torch.OutOfMemoryError:
            bench.too_large.append(name)
        contender = None
        bench.forget()
        if on_cuda:
            torch.cuda.empty_cache()
    return done


def report_shape(
    shape: StepShape, done: dict[str, Contender], lm_parts: dict[str, int], memory: dict[str, int], threads: int
) -> str:
    """A heading, the table, and what follows from it."""
    rate = None
    if "products" in done:
        rate = done["products"].flops / median(done["products"].seconds)
    rows = []
    for name, contender in done.items():
        speed = contender.flops / median(contender.seconds)
        utilisation = f"{speed / rate:.1%}" if rate and name != "products" else ""
        against = report.ratio(contender.seconds, done["qwen"].seconds) if "qwen" in done else ""
        tokens = "" if name == "products" else f"{shape.num_tokens / median(contender.seconds):.0f}"
        peak = f"{memory[name] / 2**20:.0f}" if name in memory else ""
        ms = report.spread([1e3 * seconds for seconds in contender.seconds])
        flops = f"{contender.flops / 1e9:.1f}{' counted' if contender.counted else ''}"
        rows.append([name, ms, tokens, against, flops, f"{speed / 1e9:.1f}", utilisation, peak])
    head = ["step", "ms", "tokens/s", "time / `qwen`", "GFLOP", "GFLOP/s", "of `products`", "peak memory, MiB"]
    title = f"## {shape.name}, {report.count(threads, 'thread')}"
    facts = (
        f"Vocabulary {shape.vocab_size}, {report.count(shape.num_images, 'image')} of "
        f"{shape.grid_side}x{shape.grid_side} tokens a pack, {report.count(shape.num_packs, 'pack')} a step."
    )
    return "\n\n".join([title, facts, report.table(head, rows), "\n".join(_conclusions(shape, done, lm_parts))])


def _conclusions(shape: StepShape, done: dict[str, Contender], lm_parts: dict[str, int]) -> list[str]:
    lines = []
    if "lm" in done and "laver" in done:
        lm, laver = done["lm"], done["laver"]
        phi = (lm_parts["decoder_student"] + lm_parts["attention"]) / lm.flops
        floor = 1 + 4 / 3 * shape.visual_share * phi
        lines.append(
            f"- LaVer / LM: time {report.ratio(laver.seconds, lm.seconds)}; FLOPs {laver.flops / lm.flops:.3f}"
        )
        lines.append(
            f"- LaVer / LM by their FLOPs: {report.ratio(laver.seconds, lm.seconds, over=laver.flops / lm.flops)}"
        )
        lines.append(
            f"- LaVer / LM by the floor: {report.ratio(laver.seconds, lm.seconds, over=floor)}; the floor is "
            f"1 + (4/3) v phi = {floor:.3f} (v = {shape.visual_share:.3f} of the tokens are visual, phi = {phi:.3f} of "
            "the LM's FLOPs are the decoder's layers, attention included)"
        )
    if "official" in done and "laver" in done:
        official, laver = done["official"], done["laver"]
        lines.append(
            f"- tokens/s, LaVer / reading of the official step: {report.ratio(official.seconds, laver.seconds)}; their "
            f"FLOPs: {official.flops / laver.flops:.3f}"
        )
    for name in ("text", "lm", "laver"):
        if name in done:
            share = report.spread([100 * share for share in done[name].overhead], ".2f")
            lines.append(f"- `{name}`: metadata, masks, counts, record and log are {share} % of the step's host time")
    return lines


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=tuple(SHAPES), help=f"default: {' '.join(CPU_SHAPES)}")
    add("--contenders", nargs="+", choices=tuple(CONTENDERS), default=list(CONTENDERS), help="default: all")
    add("--threads", nargs="+", type=int, help="threads of torch, one table each (default: 1 2; on CUDA 1)")
    add("--rounds", type=int, default=7, help="timed steps of each (default: 7)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--bf16", action="store_true", help="ours in bf16 with fp32 master weights, others wholly in bf16")
    add("--one-at-a-time", action="store_true", help="hold one in memory at a time, not all; rounds lie apart")
    add("--no-memory", action="store_true", help="leave out peak memory, which takes a process for each")
    add("--quick", action="store_true", help="one tiny shape, two rounds, one thread")
    add("--output", type=Path, help="a file for the report (default: standard output)")
    add("--peak-of", choices=tuple(CONTENDERS), help=argparse.SUPPRESS)  # a child: prints bytes
    options = parser.parse_args(argv)
    if options.quick:
        options.shapes, options.threads, options.rounds = options.shapes or ["tiny"], [1], 2
    options.shapes = options.shapes or list(CPU_SHAPES)
    options.threads = options.threads or ([1] if options.device == "cuda" else [1, 2])
    return options


def peaks(key: str, options: argparse.Namespace) -> dict[str, int]:
    """Peak memory of each contender's steps, bytes, each in a process of its own."""
    found = {}
    for name in options.contenders:
        if name == "products" or options.no_memory or (options.one_at_a_time and options.device == "cuda"):
            continue  # the last: `measure` does it on the way
        report.progress(f"{key}, {name}: peak memory")
        command = [sys.executable, "-m", "tools.benchmarks.step", "--shapes", key, "--peak-of", name]
        command += ["--device", options.device, "--threads", "1", *(["--bf16"] if options.bf16 else [])]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
        found[name] = json.loads(result.stdout.splitlines()[-1])
    return found


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    device = report.chosen_device(use_backend().device, options.device)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if options.peak_of:
        torch.set_num_threads(options.threads[0])
        with tempfile.TemporaryDirectory() as directory:
            bench = Bench(SHAPES[options.shapes[0]], Path(directory), device, bf16=options.bf16)
            print(peak_of_steps(lambda: bench.build(options.peak_of).step, device))
        return
    sections = [_legend(options)]
    for key in options.shapes:
        memory = peaks(key, options)
        with tempfile.TemporaryDirectory() as directory:
            bench = Bench(SHAPES[key], Path(directory), device, bf16=options.bf16)
            for threads in options.threads:
                report.progress(f"{key}, {report.count(threads, 'thread')}: building {', '.join(options.contenders)}")
                torch.set_num_threads(threads)
                done = measure(bench, options.contenders, options.rounds, one_at_a_time=options.one_at_a_time)
                memory |= {name: one.peak_bytes for name, one in done.items() if one.peak_bytes and name != "products"}
                sections.append(report_shape(SHAPES[key], done, bench.lm_parts, memory, threads))
                if bench.too_large:
                    sections.append(f"Out of memory: {', '.join(bench.too_large)}.")
            bench.forget()
    report.write("One training step", device, sections, options.output)


def _legend(options: argparse.Namespace) -> str:
    dtype = "bf16 (ours with fp32 master weights, the others wholly)" if options.bf16 else "fp32"
    memory = "of the allocator" if options.device == "cuda" else "of the resident set (VmHWM) above the libraries'"
    lines = [f"- `{name}`: {CONTENDERS[name]}" for name in options.contenders]
    lines += [
        f"- {dtype}; median (range) of {options.rounds} rounds, and the ratio of each one's fastest round"
        + (", one contender after the other" if options.one_at_a_time else ", the steps in turns"),
        "- FLOPs of real tokens, the exact mask area and the LM head where ours needs it (of `qwen` everywhere); those "
        "of `official` are counted as executed, full squares of attention included",
        f"- peak memory: {memory}, "
        + (
            "over all steps, "
            if options.device == "cuda" and options.one_at_a_time
            else "over three steps in a process of its own with one thread, "
        )
        + "weights and optimizer included",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
