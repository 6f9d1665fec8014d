"""Disks that are full: what is lost of a run's log is said, and neither ends the run nor hides its error."""

import errno
import json
import os
import resource
import sys
from contextlib import contextmanager
from unittest import mock

import pytest

from laver_megatron import train
from laver_megatron.run_log import curves, metrics, records, run_summary, tolerance
from laver_megatron.run_log.records import JsonLines, read_records, truncate_after
from laver_megatron.run_log.tolerance import tolerating
from laver_megatron.runtime import terminal
from tests.distributed.build import make_assets
from tests.switches import trainer_of
from tests.unit.run_log.test_metrics import make_log, make_record

LINES = [json.dumps({"iteration": number, "text": "x" * 50}) + "\n" for number in range(1, 9)]


@contextmanager
def largest_file(num_bytes):
    """Files cannot grow beyond that in this process: writing answers EFBIG, as a full disk answers ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    monkeypatch.setattr(tolerance, "_said", set())


def no_space(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_lines_that_do_not_fit_wait_and_no_half_line_stays(tmp_path):
    file = JsonLines(tmp_path / "lines.jsonl")
    file.append(LINES[0])
    with largest_file(len(LINES[0]) + 20):
        for line in LINES[1:4]:
            with pytest.raises(OSError):
                file.append(line)
            assert (tmp_path / "lines.jsonl").read_text() == LINES[0]
        assert file.num_waiting == 3
    file.append(LINES[4])
    assert (tmp_path / "lines.jsonl").read_text() == "".join(LINES[:5]) and file.num_waiting == file.num_lost == 0
    file.close()


def test_not_more_lines_wait_than_may(tmp_path):
    (tmp_path / "full").symlink_to("/dev/full")
    file = JsonLines(tmp_path / "full", max_waiting=3)
    for line in LINES:
        with pytest.raises(OSError, match="No space left"):
            file.append(line)
    assert (file.num_waiting, file.num_lost) == (3, 5)
    with pytest.raises(OSError, match="No space left"):
        file.close()


def test_a_file_is_cut_where_there_is_no_room_for_another(tmp_path, monkeypatch):
    log = make_log(tmp_path)
    for iteration in range(1, 5):
        log.log(make_record(iteration))
    monkeypatch.setattr(metrics, "drop_after", no_space)
    make_log(tmp_path, resume_iteration=2).log(make_record(3))
    assert [record["iteration"] for record in read_records(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_cutting_keeps_everything_up_to_the_iteration(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text("".join([*LINES[:2], "no record\n", *LINES[2:5]]) + '{"iteration": 6')
    truncate_after(path, 3)
    assert path.read_text() == "".join([*LINES[:2], "no record\n", LINES[2]])
    path.write_text("".join(LINES[:2]) + '{"iteration": 3')
    truncate_after(path, 7)
    assert path.read_text() == "".join(LINES[:2])


def test_a_failure_is_said_once_of_each_kind(caplog, tmp_path):
    for kind in ("curves", "curves", "summary"):
        with tolerating(kind, tmp_path, "it is drawn later"):
            no_space()
    assert [record.getMessage() for record in caplog.records] == [
        f"{kind} cannot be written to {tmp_path} ([Errno 28] No space left on device); it is drawn later; "
        "the run goes on"
        for kind in ("curves", "summary")
    ]
    with pytest.raises(KeyboardInterrupt), tolerating("curves", tmp_path, "no matter"):
        raise KeyboardInterrupt


def test_a_terminal_that_takes_no_more_ends_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sys, "stderr", mock.Mock(write=no_space))
    monkeypatch.setattr(sys, "stdout", mock.Mock(write=no_space))
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    terminal.say("saved")
    log = make_log(tmp_path, log_interval=1)
    for iteration in (1, 2):
        log.log(make_record(iteration))
    assert len(read_records(tmp_path / "metrics.jsonl")) == 2
    assert caplog.text.count("lines of the log cannot be written to standard output") == 1


def test_tensorboard_and_wandb_may_fail_whenever_they_like(tmp_path, monkeypatch, caplog):
    """They are told once to be failing, and metrics.jsonl has everything."""
    writer, run = mock.Mock(), mock.Mock()
    writer.add_scalar.side_effect = run.log.side_effect = no_space
    writer.close.side_effect = run.finish.side_effect = no_space
    monkeypatch.setattr(metrics, "missing_packages", lambda *_: [])
    monkeypatch.setattr(metrics.RunLog, "_open_tensorboard", lambda *_: writer)
    monkeypatch.setattr(metrics.RunLog, "_open_wandb", lambda *_: run)
    monkeypatch.setattr(curves, "draw_curves", lambda *_: None)
    log = make_log(tmp_path, tensorboard=True, wandb_project="p")
    for iteration in (1, 2):
        log.log(make_record(iteration))
    log.close()
    assert len(read_records(tmp_path / "metrics.jsonl")) == 2
    assert len(caplog.records) == 4, [record.getMessage() for record in caplog.records]
    monkeypatch.setattr(metrics.RunLog, "_open_wandb", no_space)
    make_log(tmp_path / "other", wandb_project="p").log(make_record(1))
    assert "there will be no W&B run" in caplog.text


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    return make_assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture
def full_disk(monkeypatch):
    """No room for whatever a log writes. (Links to /dev/full will not do: it can be read without end.)"""
    for owner, name in ((records.os, "pwrite"), (run_summary, "write_text"), (train, "write_text")):
        monkeypatch.setattr(owner, name, no_space)
    monkeypatch.setattr(metrics.RunLog, "_draw", no_space)


@pytest.mark.usefixtures("full_disk")
def test_a_run_with_no_room_for_its_log_goes_on_to_its_end(assets, tmp_path, caplog):
    directory = tmp_path / "run"
    settings = {"data_path": ("nan",), "valid_data_path": ("packs",), "eval_interval": 2, "eval_iters": 1}
    with (
        trainer_of(assets, str(directory), **settings) as trainer,
        mock.patch.object(train, "save") as save,
    ):
        train.train(trainer)
    assert trainer.progress.iteration == 4 and trainer.progress.skipped_iterations == 1
    save.assert_called_once()
    for lost in ("config.yaml", "metrics.jsonl", "validation.jsonl", "skipped.jsonl", "run_summary.json", "curves"):
        said = [record for record in caplog.records if record.getMessage().startswith(f"{lost} cannot be written")]
        assert len(said) == 1 and str(directory) in said[0].getMessage(), lost


@pytest.mark.usefixtures("full_disk")
def test_closing_the_log_hides_no_error(assets, tmp_path, caplog):
    with (
        trainer_of(assets, str(tmp_path / "run"), data_path=("all-nan",), max_skipped_iterations=1) as trainer,
        pytest.raises(train.TrainingFailed, match="1 iterations in a row"),
    ):
        train.train(trainer)
    assert "curves cannot be written" in caplog.text and "its last 1 lines are lost" in caplog.text
