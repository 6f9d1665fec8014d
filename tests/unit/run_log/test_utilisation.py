"""MFU and HFU of a step by hand, and when there is none."""

from dataclasses import replace
from unittest import mock

import pytest
import torch

from laver_megatron.config.fields import Config
from laver_megatron.data.batch.batches import GlobalCounts
from laver_megatron.flops.step import model_flops
from laver_megatron.run_log import utilisation as module
from laver_megatron.run_log.utilisation import UTILISATION_FIELDS, missing_peak, peak_of_run, utilisation
from tests.small_run import SHAPE

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
COUNTS = GlobalCounts(
    labels=10, masked=5, images=1, visual_tokens=16, tokens=60, samples=1, bad_samples=0,
    language_span_area=60 * 61 // 2 + 16 * 15 // 2, image_span_area=256, image_window_area=0,
)  # fmt: skip
MODEL = model_flops(SHAPE, vision_head_hidden_size=64, connector_input_size=12)


def config(**changes):
    return Config.of(data_path=("d",), train_iters=1, run_dir="r", seq_length=64, **changes)


def measured(seconds=2.0, num_devices=4, counts=COUNTS, **changes):
    settings = config(peak_tflops=0.5, **changes)
    return utilisation(MODEL, counts, settings, seconds=seconds, num_devices=num_devices, device=CPU)


def flops_of(share):
    """Of all devices in two seconds."""
    return share * 0.5e12 * 2.0 * 4


def test_mfu_counts_what_the_method_needs_by_hand():
    # Forward FLOPs of a token and layer: QKV (16 heads' widths 128 + 2 * 32), projection, three matrices of the MLP.
    layer = 2 * (128 * (128 + 64) + 128 * 128 + 3 * 128 * 320)
    head = 2 * 512 * 128
    area = COUNTS.language_span_area
    lm = 3 * (3 * (60 * layer + 4 * area * 128) + 10 * head)
    connector = 16 * 2 * (2 * 12 * 128 + 3 * 128 * 128)  # the pixels need no gradient
    found = measured(laver=False)
    assert flops_of(found["mfu"]) == pytest.approx(lm + connector)
    assert found["hfu"] == found["mfu"]
    published = 3 * (3 * (60 * layer + 4 * 64**2 * 128) + 60 * head) + connector
    assert flops_of(found["mfu_full_square"]) == pytest.approx(published)


def test_the_teacher_is_needed_and_recomputation_is_not():
    plain, full, selective = (measured(recompute_granularity=kind) for kind in (None, "full", "selective"))
    without = measured(laver=False)
    assert plain["mfu"] == plain["hfu"] == full["mfu"] > without["mfu"]
    layers = 3 * ((60 + 16) * 2 * (128 * 192 + 128 * 128 + 3 * 128 * 320) + 4 * (COUNTS.language_span_area + 256) * 128)
    assert flops_of(full["hfu"] - full["mfu"]) == pytest.approx(layers)
    attention = 3 * 4 * (COUNTS.language_span_area + 256) * 128
    assert flops_of(selective["hfu"] - selective["mfu"]) == pytest.approx(attention)


def test_a_share_is_of_all_devices_in_the_time():
    twice = measured(seconds=1.0), measured(num_devices=2)
    assert [found["mfu"] for found in twice] == pytest.approx([2 * measured()["mfu"]] * 2)
    more_labels = measured(counts=replace(COUNTS, labels=40))
    assert more_labels["mfu"] > measured()["mfu"] and more_labels["mfu_full_square"] == measured()["mfu_full_square"]


def test_without_a_known_peak_there_is_none_and_the_reason_is_said():
    settings = config(bf16=True)
    found = utilisation(MODEL, COUNTS, settings, seconds=1.0, num_devices=1, device=CPU)
    assert found == dict.fromkeys(UTILISATION_FIELDS)
    message = missing_peak(settings, CPU)
    assert "the peak bf16 throughput of the CPU is not known" in message and "--peak-tflops" in message
    assert missing_peak(config(peak_tflops=1.5), CPU) is None and peak_of_run(config(peak_tflops=1.5), CPU) == 1.5


@pytest.mark.parametrize(("name", "bf16", "peak"), [("NVIDIA H200", True, 989.4), ("NVIDIA H200", False, None)])
def test_a_gpu_is_held_against_its_data_sheet_in_bf16_alone(name, bf16, peak):
    module._table_entry.cache_clear()
    with mock.patch.object(torch.cuda, "get_device_name", lambda device: name):
        assert peak_of_run(config(bf16=bf16), CUDA) == peak
        if peak is None:
            assert "the peak fp32 throughput of NVIDIA H200 is not known" in missing_peak(config(bf16=bf16), CUDA)
    module._table_entry.cache_clear()
