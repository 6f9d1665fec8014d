"""The step benchmark: what it compares is of one size, and its report holds every part."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from laver_megatron.objective.language import IGNORE_LABEL
from tools.benchmarks import report, step
from tools.benchmarks.plain_steps import MatrixProducts, OfficialReadingStep, QwenStep, unshifted
from tools.benchmarks.step_shapes import SHAPES, make_packs

ROOT = Path(__file__).parents[3]
TINY, CPU = SHAPES["tiny"], torch.device("cpu")


def test_packs_hold_the_stated_share_of_visual_tokens():
    for shape in SHAPES.values():
        packs = make_packs(shape, 1)
        assert int((packs.image_BS >= 0).sum()) == shape.visual_share * shape.seq_length <= shape.visual_seq_length
        assert (packs.document_BS == 0).all(), "one document, no padding"
    visual_BS = packs.image_BS >= 0
    assert (packs.labels_BS[visual_BS] == IGNORE_LABEL).all()
    labelled_BS = packs.labels_BS != IGNORE_LABEL
    assert torch.equal(packs.labels_BS[labelled_BS], packs.tokens_BS.roll(-1, 1)[labelled_BS])
    assert torch.equal(unshifted(packs.labels_BS)[0, 1:], packs.labels_BS[0, :-1])


def test_the_cpu_shapes_are_those_of_a_7b_model_in_proportion():
    for key in step.CPU_SHAPES:
        shape = SHAPES[key]
        layer = 2 * shape.hidden_size**2 + shape.hidden_size * 256 + 3 * shape.hidden_size * shape.ffn_hidden_size
        share = shape.num_layers * layer / (shape.num_layers * layer + shape.hidden_size * shape.vocab_size)
        assert abs(share - 0.9) < 0.02 and abs(shape.visual_share - 0.63) < 0.01


@pytest.mark.parametrize("kind", [QwenStep, OfficialReadingStep])
def test_plain_steps_train(kind):
    torch.manual_seed(0)
    plain = kind(TINY, CPU, torch.float32)
    model = plain.model if kind is QwenStep else plain.student
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    plain()
    same = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert not same, f"not trained: {same}"


def test_the_reading_moves_its_teacher_and_masks_as_an_image_sees_itself():
    torch.manual_seed(0)
    plain = OfficialReadingStep(TINY, CPU, torch.float32)
    before = [teacher.clone() for teacher, _ in plain.pairs]
    plain()
    moved = [not torch.equal(teacher, old) for (teacher, _), old in zip(plain.pairs, before, strict=True)]
    # The token embedding moves where a token was read, all else everywhere.
    assert all(moved)
    image_BS = torch.tensor([[-1, 0, 0, 1, -1]])
    seen = (plain._attention_mask(image_BS)[0, 0] == 0).int().tolist()
    assert seen == [[1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_products_count_what_they_multiply():
    from torch.utils.flop_counter import FlopCounterMode

    products = MatrixProducts(TINY, CPU, torch.float32)
    counter = FlopCounterMode(display=False)
    with counter, torch.random.fork_rng():
        for (inputs, weight, outputs), times in zip(products.operands, products.repeats, strict=True):
            for _ in range(times):
                inputs @ weight.T, outputs @ weight, outputs.T @ inputs
    assert counter.get_total_flops() == products.flops


def test_the_report_holds_ratios_of_the_same_round():
    assert report.ratio([2.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == "2.000 (2.000-3.000), of the fastest rounds 2.000"
    done = {
        name: step.Contender(name, lambda: None, flops, seconds=[seconds] * 3, overhead=[0.01] * 3)
        for name, flops, seconds in [("products", 4, 1e-9), ("qwen", 4, 2e-9), ("lm", 4, 2e-9), ("laver", 7, 4e-9)]
    }
    text = step.report_shape(TINY, done, {"decoder_student": 2, "attention": 1}, {"lm": 2**20}, 1)
    assert "| lm | 0.0 (0.0-0.0) |" in text and "| 50.0% | 1 |" in text
    floor = 1 + 4 / 3 * TINY.visual_share * 0.75
    assert f"= {floor:.3f}" in text and f"by the floor: {2 / floor:.3f} (" in text
    assert "by their FLOPs: 1.143 (" in text


PEAK = """
from tools.benchmarks.memory import peak_of_steps
import torch

def build():
    torch.ones(64 * 2**18).sum()  # 64 MiB that are freed before the first step
    kept = torch.ones(16 * 2**18)
    return lambda: (kept + kept).sum()

print(peak_of_steps(build, torch.device("cpu")))
"""


@pytest.mark.processes
def test_peak_memory_is_that_of_the_steps():
    """In a process of its own: in one that has freed memory before, tensors may take no more of it."""
    done = subprocess.run([sys.executable, "-c", PEAK], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 30 * 2**20 < int(done.stdout) < 60 * 2**20


@pytest.mark.processes
def test_a_quick_run_reports_every_contender(capsys):
    step.main(["--quick", "--no-memory"])
    text = capsys.readouterr().out
    assert all(f"\n| {name} |" in text for name in step.CONTENDERS)
    assert "by the floor" in text and "of the step's host time" in text
