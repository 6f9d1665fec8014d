"""The run's log: strict JSON lines, the greppable line, resumption, and what is asked for but not installed."""

import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import numpy
import pytest
import torch

from laver_megatron.run_log import metrics, records
from laver_megatron.run_log.metrics import (
    REQUIRED_FIELDS,
    RunLog,
    format_line,
    missing_packages,
    peak_memory_bytes,
)
from laver_megatron.run_log.records import drop_after, read_records


def make_record(iteration: int, **changes) -> dict:
    record = dict.fromkeys(REQUIRED_FIELDS, 0.5)
    record |= {"iteration": iteration, "consumed_samples": 8 * iteration, "consumed_packs": 4 * iteration}
    record |= {"num_masked_tokens": 31, "skipped_iterations": 0, "peak_memory_bytes": 3 * 2**20}
    return record | changes


def make_log(path, **options) -> RunLog:
    options = {"train_iters": 40, "log_interval": 1, "progress_bar": False} | options
    return RunLog(path, **options)


def iterations(path) -> list[int]:
    return [json.loads(line)["iteration"] for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes a second and has its own test file."""
    monkeypatch.setattr("laver_megatron.run_log.curves.draw_curves", lambda source, target: target.touch())


def test_one_strict_json_object_an_iteration(tmp_path):
    log = make_log(tmp_path / "a" / "run")
    log.log(make_record(1, lm_loss=torch.tensor(2.5), mim_loss=numpy.float32(0.25), extra="text"))
    log.log(make_record(2, grad_norm=math.nan, loss=torch.tensor(math.inf), mim_loss=None))

    def refuse(constant):
        raise AssertionError(f"{constant} is not strict JSON")

    # read before close: each line is flushed
    lines = (tmp_path / "a" / "run" / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line, parse_constant=refuse) for line in lines)
    assert first == make_record(1, lm_loss=2.5, mim_loss=0.25, extra="text")
    assert second == make_record(2, grad_norm=None, loss=None, mim_loss=None)
    log.close()
    log.close()
    assert (tmp_path / "a" / "run" / "curves.png").exists()


@pytest.mark.parametrize("field", REQUIRED_FIELDS)
def test_every_required_field_is_required(tmp_path, field):
    record = make_record(1)
    del record[field]
    with pytest.raises(AssertionError, match=field):
        make_log(tmp_path).log(record)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize("iteration", [4, 5])
def test_an_iteration_is_never_logged_twice(tmp_path, iteration):
    log = make_log(tmp_path)
    log.log(make_record(5))
    with pytest.raises(AssertionError, match="after 5"):
        log.log(make_record(iteration))
    assert iterations(tmp_path / "metrics.jsonl") == [5]


def test_the_line_is_greppable():
    record = make_record(
        5,
        consumed_samples=20,
        learning_rate=2e-5,
        learning_rate_connector=1e-3,
        lm_loss=1.5,
        mim_loss=None,
        grad_norm=math.nan,
        tflops_per_gpu=0.25,
        hfu=None,
    )
    line = format_line(record, 40, 0.1234, global_batch_size=4)
    assert line.startswith(" iteration        5/      40 | consumed samples:           20 | ")
    assert line.endswith(" |") and "\n" not in line
    fields = dict(part.strip().rsplit(": ", 1) for part in line.strip(" |").split(" | ")[1:])
    assert {name: value.strip() for name, value in fields.items()} == {
        "consumed samples": "20",
        "elapsed time per iteration (ms)": "123.4",
        "learning rate": "2.000000E-05",
        "connector's": "1.000000E-03",
        "global batch size": "4",
        "lm loss": "1.500000E+00",
        "gram loss": "5.000000E-01",
        "loss": "5.000000E-01",
        "mask ratio": "0.5000",
        "masked tokens": "31",
        "ema momentum": "0.500000",
        "grad norm": "nan",
        "tokens/s": "0.5",
        "visual tokens/s": "0.5",
        "images/s": "0.50",
        "TFLOP/s/GPU": "0.250",
        "MFU": "50.0%",
        "peak memory (MiB)": "3.0",
        "number of skipped iterations": "0",
    }


def test_lines_come_every_interval_and_at_the_end(tmp_path, capsys):
    log = make_log(tmp_path, train_iters=8, log_interval=3, config_dict={"global_batch_size": 16})
    for iteration in range(1, 9):
        log.log(make_record(iteration))
    out = capsys.readouterr().out
    assert [int(number) for number in re.findall(r"^ iteration +(\d+)/ +8 ", out, re.MULTILINE)] == [3, 6, 8]
    assert out.count("global batch size:    16 |") == 3
    assert len(read_records(tmp_path / "metrics.jsonl")) == 8


def test_elapsed_time_is_the_mean_of_the_steps_since_the_last_line(tmp_path, capsys):
    log = make_log(tmp_path, train_iters=7, log_interval=2, resume_iteration=2)
    for iteration, seconds in [(3, 1.0), (4, 3.0), (5, 0.25), (6, 0.75), (7, 4.0)]:
        log.log(make_record(iteration, elapsed_seconds=seconds))
        if iteration == 4:  # validation's time is not training's
            log.log_validation(4, {"lm_loss": 1.0, "elapsed_seconds": 7.0})
    out = capsys.readouterr().out
    assert re.findall(r"\(ms\): ([\d.]+)", out) == ["2000.0", "500.0", "4000.0"]


def test_validation_has_its_own_file(tmp_path, capsys):
    log = make_log(tmp_path)
    log.log(make_record(1))
    log.log_validation(1, {"lm_loss": torch.tensor(1.25)})
    assert read_records(tmp_path / "validation.jsonl") == [{"iteration": 1, "lm_loss": 1.25}]
    assert iterations(tmp_path / "metrics.jsonl") == [1]
    assert " validation at iteration        1 | lm loss: 1.250000E+00 |" in capsys.readouterr().out


def test_a_progress_bar_and_its_lines(tmp_path, capsys):
    log = make_log(tmp_path, progress_bar=True, resume_iteration=10)
    log.log(make_record(11, lm_loss=1.23456))
    log.close()
    captured = capsys.readouterr()
    assert " iteration       11/      40 |" in captured.out
    assert "11/40" in captured.err and "lm=1.2346" in captured.err


def test_resume_drops_what_came_after_the_checkpoint(tmp_path):
    log = make_log(tmp_path)
    for iteration in range(1, 8):
        log.log(make_record(iteration))
        log.log_validation(iteration, {"lm_loss": 1.0})
    log.close()
    resumed = make_log(tmp_path, resume_iteration=5)
    for path in (tmp_path / "metrics.jsonl", tmp_path / "validation.jsonl"):
        assert iterations(path) == [1, 2, 3, 4, 5]
    with pytest.raises(AssertionError):
        resumed.log(make_record(5))
    resumed.log(make_record(6, lm_loss=9.0))
    assert iterations(tmp_path / "metrics.jsonl") == [1, 2, 3, 4, 5, 6]
    assert read_records(tmp_path / "metrics.jsonl")[-1]["lm_loss"] == 9.0
    assert not list(tmp_path.glob("*.tmp"))


def test_a_torn_last_line_is_tolerated(tmp_path, recwarn):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n{"iteration": 2}\n{"iteration": 3, "lo')
    assert [record["iteration"] for record in read_records(path)] == [1, 2]
    log = make_log(tmp_path, resume_iteration=3)
    log.log(make_record(4))
    log.close()
    assert iterations(path) == [1, 2, 4]
    assert not recwarn.list


def test_a_bad_line_elsewhere_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"iteration": 1}\n\x00\x00\x00\n[2]\n{"iteration": 3}\n')
    with pytest.warns(UserWarning) as warned:
        assert [record["iteration"] for record in read_records(path)] == [1, 3]
    assert ["line 2" in str(warned[0].message), "line 3" in str(warned[1].message)] == [True, True]


def test_dropping_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    before = '{"iteration": 1}\n{"iteration": 2}\n'
    path.write_text(before)

    def crash(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(records.os, "fsync", crash)
    with pytest.raises(OSError, match="disk full"):
        drop_after(path, 1)
    assert path.read_text() == before


def test_a_new_run_in_an_old_directory_keeps_the_old_numbers(tmp_path):
    log = make_log(tmp_path)
    log.log(make_record(1, lm_loss=3.0))
    log.close()
    make_log(tmp_path).log(make_record(1, lm_loss=4.0))
    assert read_records(tmp_path / "metrics.jsonl")[0]["lm_loss"] == 4.0
    assert read_records(tmp_path / "metrics.previous.jsonl")[0]["lm_loss"] == 3.0


def test_closing_an_empty_log_draws_nothing(tmp_path):
    make_log(tmp_path).close()
    assert not (tmp_path / "curves.png").exists()


def test_missing_packages_are_named_together(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert missing_packages(False, None) == []
    assert len(missing_packages(True, "project")) == 2
    with pytest.raises(ValueError, match=r"tensorboard.*laver_megatron\[log\].*wandb.*laver_megatron\[log\]"):
        make_log(tmp_path / "run", tensorboard=True, wandb_project="project")
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = make_log(tmp_path, tensorboard=True, config_dict={"lr": 1e-5})
    log.log(make_record(1, lm_loss=2.5, mim_loss=None))
    log.log(make_record(2, lm_loss=math.nan))
    log.log_validation(2, {"lm_loss": 3.0})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/lm_loss")] == [(1, 2.5)]
    assert [event.step for event in events.Scalars("train/mim_loss")] == [2]
    assert [(event.step, event.value) for event in events.Scalars("validation/lm_loss")] == [(2, 3.0)]


class FakeWandb:
    """Stands for the wandb module: remembers what it is told."""

    def __init__(self):
        self.inits, self.logs, self.metrics, self.finished = [], [], [], False

    def init(self, **options):
        self.inits.append(options)
        self.id = options["id"] or f"id{len(self.inits)}"
        return self

    def define_metric(self, name, step_metric=None):
        self.metrics.append((name, step_metric))

    def log(self, values):
        self.logs.append(values)

    def finish(self):
        self.finished = True


def test_wandb_goes_on_under_the_same_id(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(metrics, "missing_packages", lambda *_: [])
    for resume in (0, 1, 0):
        log = make_log(tmp_path, wandb_project="p", resume_iteration=resume, config_dict={"lr": 1})
        log.log(make_record(resume + 1, grad_norm=math.inf))
        log.close()
    assert [options["id"] for options in fake.inits] == [None, "id1", None]  # the last is a new run
    assert fake.inits[0]["project"] == "p" and fake.inits[0]["config"] == {"lr": 1}
    assert [values["iteration"] for values in fake.logs] == [1, 2, 1]
    assert fake.logs[0]["train/lm_loss"] == 0.5 and "train/grad_norm" not in fake.logs[0]
    assert ("*", "iteration") in fake.metrics and fake.finished


def test_peak_memory_on_the_cpu_is_in_bytes():
    peak = peak_memory_bytes("cpu")
    # a Python process with torch holds over 50 MB and, here, under 1 TB: a unit wrong by 1024 falls outside
    assert 50e6 < peak < 1e12
    status = Path("/proc/self/status")
    if status.exists():
        high_water_kib = int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])
        # the kernel updates the two counters at different moments
        assert peak > 0.95 * 1024 * high_water_kib


def test_peak_memory_on_cuda_is_the_allocators(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1000 + device.index)
    assert peak_memory_bytes("cuda:3") == 1003
