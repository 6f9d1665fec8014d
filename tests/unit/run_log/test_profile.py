"""Where the time of profiled steps goes: parts, their backward passes, and waiting."""

import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.checkpoint import checkpoint

from laver_megatron.run_log.profile import (
    COLLECTIVES,
    OTHER,
    PARTS,
    PIPELINE,
    STEP,
    _overlap,
    _union,
    format_table,
    mark_parts,
    times_of_parts,
)

BUSY = 0.02  # seconds


class Slow(torch.autograd.Function):
    """Takes its time backward alone."""

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        time.sleep(BUSY)
        return gradient


class SlowLayer(nn.Module):
    def forward(self, x):
        return Slow.apply(x)


class RecomputedLayer(nn.Module):
    def forward(self, x):
        def slow(x):
            time.sleep(BUSY)
            return x * 2

        return checkpoint(slow, x, use_reentrant=True)


def profiled(work):
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler, record_function(STEP):
        work()
    return times_of_parts(profiler.events(), on_cuda=False)


def stage(**modules):
    found = dict.fromkeys(("encoder", "connector", "decoder", "output_layer", "vision_head", "teacher"))
    return SimpleNamespace(**(found | modules))


def test_a_backward_pass_counts_to_the_part_of_its_forward_pass():
    parts = stage(encoder=nn.Linear(4, 4), decoder=SlowLayer(), output_layer=nn.Linear(4, 4))
    handles = mark_parts(parts)

    def work():
        loss = parts.output_layer(parts.decoder(parts.encoder(torch.randn(3, 4)))).sum()
        loss.backward()

    times = profiled(work)
    assert times["student"] > 0.9e6 * BUSY
    assert times["encoder"] > 0 and times["heads"] > 0
    assert sum(us for part, us in times.items() if part != STEP) == pytest.approx(times[STEP])
    for handle in handles:
        handle.remove()
    assert profiled(work)["student"] == 0


def test_recomputation_counts_to_its_part():
    parts = stage(decoder=RecomputedLayer())
    mark_parts(parts)
    times = profiled(lambda: parts.decoder(torch.ones(2, requires_grad=True)).sum().backward())
    assert times["student"] > 1.8e6 * BUSY  # forward, and again


def test_ranges_count_by_name_and_what_lies_in_none_is_other():
    def work():
        time.sleep(BUSY)
        for part, seconds in (("data wait", BUSY), ("EMA", 2 * BUSY)):
            with record_function(part):
                time.sleep(seconds)

    times = profiled(work)
    for part, seconds in ((OTHER, BUSY), ("data wait", BUSY), ("EMA", 2 * BUSY)):
        assert times[part] >= 1e6 * seconds, part  # sleeping is never too short
    assert {part for part in PARTS if times[part] > 0} == {"data wait", "EMA"}
    table = format_table(times, 2, "stage-0")
    assert f"| EMA | {times['EMA'] / 2e3:.3f} | {times['EMA'] / times[STEP]:.1%} |" in table


def event(number, name, start, end, parent=None, is_async=False):
    made = SimpleNamespace(
        id=number, name=name, device_type=torch.autograd.DeviceType.CPU, sequence_nr=-1, scope=0, is_async=is_async,
        cpu_parent=parent, cpu_children=[], kernels=[],
        time_range=SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start),
    )  # fmt: skip
    if parent is not None:
        parent.cpu_children.append(made)
    return made


def test_waiting_counts_to_what_is_waited_for():
    step = event(1, STEP, 0, 100)
    optimizer = event(2, "optimizer", 10, 60, step)
    work = event(3, "aten::mul", 20, 30, optimizer)
    reduce = event(4, "c10d::allreduce_", 30, 32, optimizer)
    # In other threads: a sum while the host multiplies and then waits for it, and a neighbour's message.
    waited = event(5, "gloo:all_reduce", 25, 50, is_async=True)
    message = event(6, "gloo:recv", 70, 90, is_async=True)
    times = times_of_parts([step, optimizer, work, reduce, waited, message], on_cuda=False)
    assert times[COLLECTIVES] == 2 + 18 and times[PIPELINE] == 20
    assert times["optimizer"] == 50 - 20 and times[OTHER] == 50 - 20
    assert sum(us for part, us in times.items() if part != STEP) == times[STEP] == 100


def test_on_cuda_kernels_count():
    step = event(1, STEP, 0, 100)
    student = event(2, "student", 0, 50, step)
    student.kernels = [SimpleNamespace(name="student", duration=50)]  # the range's shadow
    gemm = event(3, "aten::mm", 0, 5, student)
    gemm.kernels = [SimpleNamespace(name="sm90_gemm", duration=40)]
    sum_of = event(4, "c10d::allreduce_", 50, 55, step)
    sum_of.kernels = [SimpleNamespace(name="ncclDevKernel_AllReduce_Sum", duration=7)]
    message = event(5, "c10d::send", 55, 60, step)
    message.kernels = [SimpleNamespace(name="ncclDevKernel_SendRecv", duration=11)]
    times = times_of_parts([step, student, gemm, sum_of, message], on_cuda=True)
    assert (times["student"], times[COLLECTIVES], times[PIPELINE]) == (40, 7, 11)
    assert times["device idle"] == 100 - 58 and times[STEP] == 100


def test_intervals():
    assert _union([(5, 7), (1, 2), (2, 4), (6, 9)]) == [(1, 4), (5, 9)]
    assert _overlap([(0, 3), (3.5, 6), (20, 30)], [(1, 4), (5, 9)]) == 2 + 0.5 + 1
