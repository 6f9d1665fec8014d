"""Whether a Hugging Face directory and a Megatron checkpoint hold the same model: keys, shapes, settings, outputs.

    report = verify(hugging_face, megatron, layouts=[(1, 1), (2, 2)])
    print(report.table())
    assert report.is_same

Names and shapes are checked against the name table, both ways, and all values are compared by it. The outputs are
computed from the files alone, by transformers on the one side and by Megatron's pipeline schedule on the other, at
every layout in processes of its own, so that nothing which converted the weights is trusted to say that they are right.

Letters: T tokens of a probe.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from laver_megatron.config.layout_checks import decoder_sizes, tensor_parallel_faults
from laver_megatron.convert.verification.forward import STUDENT, Outputs, run_megatron, run_transformers
from laver_megatron.convert.verification.pair import (
    Pair,
    key_problems,
    open_pair,
    setting_problems,
    value_problems,
    with_names,
)
from laver_megatron.convert.verification.probes import Probe, make_probes, pack_probes
from laver_megatron.convert.verification.workers import WorkerFailed, run_workers
from laver_megatron.hf.shape import ModelShape

Say = Callable[[str], None]
Layout = tuple[int, int]
"""Tensor-parallel and pipeline-parallel size."""

TENSOR_PARALLEL_SIZES, PIPELINE_PARALLEL_SIZES = (1, 2, 4, 8), (1, 2, 4)
DEFAULT_TOLERANCE = 1e-4
"""fp32 rounding: some 1e-6 a layer on values of order 1 to 10."""


@dataclass(frozen=True)
class Difference:
    """Largest absolute differences over all probes; NaN where one side is NaN.

    Attributes:
        logits: at all tokens.
        hidden, images: of the hidden states, at text tokens and at visual ones; None without pictures.
    """

    logits: float
    hidden: float
    images: float | None


@dataclass(frozen=True)
class Row:
    """One comparison: what was compared, the difference if it is one of numbers, and what is wrong."""

    what: str
    difference: Difference | None = None
    problems: tuple[str, ...] = ()


@dataclass
class Report:
    """All comparisons of a pair of directories.

    Attributes:
        tolerance: largest difference that counts as rounding.
        rows: one for each comparison.
        scale: largest absolute logit and hidden state of transformers, to judge differences by.
    """

    tolerance: float
    rows: list[Row] = field(default_factory=list)
    scale: tuple[float, float] | None = None

    @property
    def is_same(self) -> bool:
        """Nothing differs, and outputs were compared at all."""
        return all(not row.problems for row in self.rows) and any(row.difference for row in self.rows)

    def table(self) -> str:
        """For people: one line a comparison, then everything that is wrong, in words."""
        header = ("compared", "logits", "hidden", "at images", "tolerance", "verdict")
        lines = [header, *(self._line(row) for row in self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        text.insert(1, "-" * len(text[0]))
        if self.scale:
            text.append(f"largest logit {self.scale[0]:.4g}, largest hidden state {self.scale[1]:.4g}, in transformers")
        text += [f"  - {row.what}: {problem}" for row in self.rows for problem in row.problems]
        text.append("the two hold the same model" if self.is_same else "the two DIFFER")
        return "\n".join(text)

    def _line(self, row: Row) -> tuple[str, ...]:
        verdict = "DIFFERS" if row.problems else "same"
        if row.difference is None:
            return (row.what, "", "", "", "", verdict)
        images = "none" if row.difference.images is None else f"{row.difference.images:.1e}"
        numbers = (f"{row.difference.logits:.1e}", f"{row.difference.hidden:.1e}", images)
        return (row.what, *numbers, f"{self.tolerance:.1e}", verdict)


_say_at_once = partial(print, flush=True)


def verify(
    hugging_face: Path,
    megatron: Path,
    *,
    layouts: Sequence[Layout] | None = None,
    max_processes: int = 4,
    prompts: Sequence[str] = (),
    image_files: Sequence[Path] = (),
    tolerance: float = DEFAULT_TOLERANCE,
    weights: str = STUDENT,
    say: Say = _say_at_once,
) -> Report:
    """Compares the two directories in fp32.

    Args:
        layouts: None for every one of the grid that the model's sizes and max_processes allow.
        prompts, image_files: as in `make_probes`.
        weights: `student` or `teacher`, what the Hugging Face directory was exported with.
        say: is told of every long step.

    Raises:
        ValueError: directories that are missing, incomplete or of different kinds, a layout that the model does not
            divide into, a tolerance that is not positive. Differences of the models are no error.
    """
    if not tolerance > 0:
        raise ValueError(f"the tolerance is {tolerance}, but it must be above 0")
    pair = open_pair(hugging_face, megatron, weights)
    if layouts is None:
        layouts = grid(pair.shape, max_processes, say)
    if not layouts:
        raise ValueError(f"there is no layout to compare; allow more than {max_processes} processes")
    for layout in layouts:
        if problem := layout_problem(pair.shape, layout):
            raise ValueError(f"{_name(layout)}: {problem}")
    model = pair.megatron
    cap = model.settings.max_image_tokens
    probes = make_probes(model.checkpoint / "hf", model.encoder_dir, prompts, image_files, cap)
    report = Report(tolerance, [Row("names and shapes", None, key_problems(pair))])
    try:
        with _step(say, "values of all tensors"):
            report.rows.append(Row("values", None, value_problems(pair)))
    except ValueError as error:  # a file is damaged: the layouts will say so, too
        report.rows.append(Row("values", None, (str(error),)))
    if settings := setting_problems(pair):
        report.rows.append(Row("settings", None, settings))
    reference = _run_reference(pair, probes, report, say)
    if reference is not None:
        _run_layouts(pair, probes, reference, layouts, report, say)
    return report


def _run_reference(pair: Pair, probes: list[Probe], report: Report, say: Say) -> Outputs | None:
    """The outputs of transformers; None, and a row that says why, if there are none."""
    num_tokens = sum(map(len, probes))
    try:
        with _step(say, f"transformers: {len(probes)} prompts, {num_tokens} tokens, processes 1"):
            ((reference, unlike_training),) = run_workers(
                run_transformers, 1, pair.hugging_face, probes, result_types=[Outputs]
            )
    except WorkerFailed as error:
        report.rows.append(Row("transformers", None, (str(error),)))
        return None
    report.rows.append(Row("tokens and pixels", None, tuple(unlike_training)))
    if reference.unread:
        report.rows.append(Row("transformers", None, (with_names("weights not in the directory", reference.unread),)))
    report.scale = _largest(reference.logits_TW), _largest(reference.hidden_TH)
    return reference


def _run_layouts(
    pair: Pair, probes: list[Probe], reference: Outputs, layouts: Sequence[Layout], report: Report, say: Say
) -> None:
    """A row for every layout, also for one that fails."""
    packed = pack_probes(probes)
    for number, layout in enumerate(layouts):
        num_workers = layout[0] * layout[1]
        check_files = number == 0
        try:
            with _step(say, f"Megatron {_name(layout)}: processes {num_workers}"):
                results = run_workers(
                    run_megatron,
                    num_workers,
                    pair.megatron,
                    probes,
                    packed,
                    layout,
                    check_files,
                    result_types=[Outputs],
                )
            report.rows.append(compare_outputs(_name(layout), probes, reference, results, report.tolerance))
        except WorkerFailed as error:
            report.rows.append(Row(_name(layout), None, (str(error),)))


@contextmanager
def _step(say: Say, text: str) -> Iterator[None]:
    """Says what is going on, and how long it took."""
    say(f"{text} ...")
    start = time.monotonic()
    yield
    say(f"  done after {time.monotonic() - start:.1f} s")


# --- layouts ------------------------------------------------------------------------------------------


def grid(shape: ModelShape, max_processes: int, say: Say) -> list[Layout]:
    """Every layout that fits; says which do not, and why."""
    layouts = []
    for tensor_parallel in TENSOR_PARALLEL_SIZES:
        for pipeline_parallel in PIPELINE_PARALLEL_SIZES:
            layout = (tensor_parallel, pipeline_parallel)
            problem = layout_problem(shape, layout)
            if tensor_parallel * pipeline_parallel > max_processes:
                problem = f"needs {tensor_parallel * pipeline_parallel} processes, at most {max_processes} are allowed"
            if problem:
                say(f"leaving out {_name(layout)}: {problem}")
            else:
                layouts.append(layout)
    return layouts


def layout_problem(shape: ModelShape, layout: Layout) -> str:
    """Why a model of this shape cannot be divided like this; empty if it can."""
    tp, pp = layout
    if min(layout) < 1:
        return "sizes must be at least 1"
    if faults := tensor_parallel_faults(decoder_sizes(shape), shape.num_query_groups, tp):
        return f"{tp} {', '.join(faults)}"
    return f"{shape.num_layers} layers do not divide into {pp} stages" if shape.num_layers % pp else ""


def _name(layout: Layout) -> str:
    return f"TP{layout[0]} x PP{layout[1]}"


# --- outputs -------------------------------------------------------------------------------------------


def _largest(tensors: Sequence[Tensor]) -> float:
    return max(tensor.abs().max().item() for tensor in tensors)


def compare_outputs(
    what: str, probes: Sequence[Probe], reference: Outputs, results: Sequence[Outputs | list[str]], tolerance: float
) -> Row:
    """results: of every rank; one of them has the outputs."""
    (ours,) = (result for result in results if isinstance(result, Outputs))
    unread = sorted({key for result in results for key in (result.unread if isinstance(result, Outputs) else result)})
    difference = difference_of(probes, reference, ours)
    problems = [with_names("weights never written (still NaN after loading)", unread)] if unread else []
    for name, value in (
        ("logits", difference.logits), ("hidden states", difference.hidden), ("those at images", difference.images)
    ):  # fmt: skip
        if value is not None and not value <= tolerance:  # also for NaN
            problems.append(f"{name} differ by {value:.2e}, more than {tolerance:.1e}")
    return Row(what, difference, tuple(problems))


def difference_of(probes: Sequence[Probe], theirs: Outputs, ours: Outputs) -> Difference:
    """The largest differences between two sets of outputs of the same probes."""
    logits = [(a - b).abs().max() for a, b in zip(ours.logits_TW, theirs.logits_TW, strict=True)]
    text, images = [], []
    for probe, a_TH, b_TH in zip(probes, ours.hidden_TH, theirs.hidden_TH, strict=True):
        gap_T = (a_TH - b_TH).abs().amax(-1)
        text.append(gap_T[~probe.visual_T].max())
        if probe.pixels:
            images.append(gap_T[probe.visual_T].max())
    # torch's max passes NaN on, Python's does not.
    worst = [torch.stack(gaps).max().item() if gaps else None for gaps in (logits, text, images)]
    assert worst[0] is not None and worst[1] is not None
    return Difference(worst[0], worst[1], worst[2])
