"""Functions in fresh processes: results by rank, and the first failure in its own words."""

import os
import signal
import time
from pickle import UnpicklingError

import pytest
import torch

from laver_megatron.convert.verification.workers import WorkerFailed, run_workers


def rank_and_argument(worker, argument):
    return worker.rank, worker.num_workers, argument


def fail_on_rank_1(worker):
    if worker.rank == 1:
        raise ValueError("of its own")
    torch.distributed.FileStore(str(worker.store), 2).wait(["never set"])


class Named:
    def __init__(self, number):
        self.number = number


def name_a_class(worker):
    return Named(torch.ones(2))


def be_killed_on_rank_1(worker):
    report = worker.store.with_name("error-0")
    if worker.rank == 0:
        report.write_text("lost its partner")
        time.sleep(60)
    while not report.exists():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)


def die(worker):
    os._exit(3)


@pytest.mark.processes
def test_workers_answer_by_rank():
    assert run_workers(rank_and_argument, 2, "x") == [(0, 2, "x"), (1, 2, "x")]


@pytest.mark.processes
def test_a_result_runs_no_code():
    """Of classes only those are made that are expected."""
    (result,) = run_workers(name_a_class, 1, result_types=[Named])
    assert torch.equal(result.number, torch.ones(2))
    with pytest.raises(UnpicklingError, match="Named"):
        run_workers(name_a_class, 1)


@pytest.mark.processes
def test_the_worker_that_failed_is_heard_and_the_others_are_ended():
    with pytest.raises(WorkerFailed, match="^ValueError: of its own$"):
        run_workers(fail_on_rank_1, 2)
    with pytest.raises(WorkerFailed, match="without a word.*{0: 3}"):
        run_workers(die, 1)
    with pytest.raises(WorkerFailed, match="without a word.*{1: -9}.*enough memory"):
        run_workers(be_killed_on_rank_1, 2)
