"""The attention benchmark: streams and areas are those of the mask, and the report holds every part."""

import pytest
import torch

from laver_megatron.model.spans import spans_to_mask
from tools.benchmarks import attention
from tools.benchmarks.step_shapes import SHAPES

TINY = SHAPES["tiny"]


def test_areas_are_those_of_the_mask():
    language, both = attention.streams_of(TINY)
    assert language.area == int(spans_to_mask(language.spans_B2L).sum())
    # Every image sees itself; a visual slot that no image fills is no work.
    images = TINY.num_images * TINY.image_tokens**2
    assert both.area == language.area + images
    assert sum(both.segments) == both.spans_B2L.shape[2] == TINY.seq_length + TINY.visual_seq_length
    assert attention.flops_of(TINY, 10, backward=False) == 2 * 2 * 10 * TINY.hidden_size


def test_other_lengths_keep_heads_and_share():
    longer = attention.of_length(TINY, 512)
    assert longer.visual_share == TINY.visual_share and longer.num_attention_heads == TINY.num_attention_heads
    assert attention.streams_of(longer)[0].spans_B2L.shape[2] == 512


def test_plain_causal_is_ours_on_text():
    stream = attention.streams_of(TINY.with_images(0))[0]
    task = attention.Task(TINY, stream, torch.device("cpu"), torch.float32, 1)
    plain, dense = attention.contenders_of(stream, ["dense"], task.device)
    assert plain.area == dense.area
    torch.testing.assert_close(*(one.attend(*task.inputs, task.spans_B2L) for one in (plain, dense)))


def test_a_quick_run_reports_every_kernel(capsys, tmp_path):
    attention.main(["--quick", "--output", str(tmp_path / "report.md")])
    text, said = (tmp_path / "report.md").read_text(), capsys.readouterr().err
    for kernel in attention.KERNELS:
        if kernel == "dense":
            assert "\ndense: warming up\n" in said
        else:
            assert f"- `{kernel}` does not run here: {kernel} needs CUDA\n" in f"{text}\n"
    assert said.endswith(f"wrote {tmp_path / 'report.md'}\n")
    assert "\n| causal |" in text and "\n| dense |" in text and "language and reconstruction" in text


def test_kernels_that_need_cuda_are_refused_by_name():
    with pytest.raises(SystemExit, match="--kernels flex flash need CUDA; leave them out, or use --device cuda"):
        attention.main(["--quick", "--kernels", "flex", "dense", "flash"])
