"""How the numbers of many samples become one."""

import math
from pathlib import Path

import numpy as np
import pytest

from laver_megatron.inspection.collect import Inspection, is_run, mean_and_error, shown_layers
from laver_megatron.inspection.sources import Source


def inspection(directory: str = "run/checkpoints/iter_0000010", step: int | None = 10) -> Inspection:
    return Inspection(Source(directory, Path(directory), "laver", step), num_layers=2)


def test_means_leave_out_what_has_no_value():
    values = np.array([[1.0, np.nan, np.nan], [2.0, 5.0, np.nan], [6.0, np.nan, np.nan]])
    mean, error, count = mean_and_error(values)
    assert mean[:2].tolist() == [3, 5] and math.isnan(mean[2]) and count.tolist() == [3, 1, 0]
    assert error[0] == pytest.approx(np.std([1, 2, 6], ddof=1) / math.sqrt(3)) and np.isnan(error[1:]).all()


def test_the_answer_is_shown_as_far_as_half_of_the_samples_reach():
    found = inspection()
    found.answers = [np.array([[1.0, 2, 3], [4, 5, 6]]), np.array([[3.0], [2.0]]), np.array([[5.0, 4], [0, 1]])]
    mean_LP, count_P = found.decay()
    assert mean_LP.tolist() == [[3, 3], [2, 3]] and count_P.tolist() == [3, 2]
    found.answers = [np.zeros((2, 0))]
    assert found.decay()[0].shape == (2, 0)


def test_steps_of_one_run_are_told_from_several_models():
    one, two = inspection(), inspection("run/checkpoints/iter_0000020", 20)
    assert is_run([one, two])
    assert not is_run([two, one]), "out of order"
    assert not is_run([one]) and not is_run([one, inspection("other/checkpoints/iter_0000020", 20)])
    assert not is_run([inspection("export", None), inspection("export-2", None)])


def test_shown_layers_go_from_the_input_to_the_last():
    assert shown_layers(28) == (0, 9, 19, 28) and shown_layers(1) == (0, 1)
