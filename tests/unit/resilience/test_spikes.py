"""What counts as a spike, by numbers alone."""

import math

import numpy as np
import pytest

from laver_megatron.checkpoint.progress import Progress
from laver_megatron.config.reliability_fields import ReliabilityConfig
from laver_megatron.resilience.skipped import RankView, join_views, remember_step, skip_reason
from laver_megatron.resilience.spikes import find_spike, remember, spike_limit


def test_the_limit_is_mean_and_deviations():
    recent = np.random.default_rng(0).normal(3.0, 0.5, 200).tolist()
    assert spike_limit(recent, 4.0) == pytest.approx(np.mean(recent) + 4 * np.std(recent), rel=1e-12)


def test_values_that_do_not_move_make_no_spike_of_a_small_rise():
    assert find_spike("loss", 2.005, [2.0] * 10, sigmas=6, window=10) == ""
    assert find_spike("loss", 2.02, [2.0] * 10, sigmas=6, window=10) != ""
    assert find_spike("loss", 1.0, [0.0] * 10, sigmas=6, window=10) != ""


def test_only_a_full_window_has_spikes_and_only_above_it():
    recent = [1.0, 1.2, 0.8, 1.1]
    assert find_spike("loss", 1e9, recent, sigmas=3, window=5) == ""
    found = find_spike("loss", 1e9, recent, sigmas=3, window=4)
    assert found.startswith("loss 1e+09 is above 1.4") and "the last 4 steps" in found
    assert find_spike("loss", -1e9, recent, sigmas=3, window=4) == ""
    # A window that was longer before counts from its end.
    assert find_spike("loss", 1.5, [900.0, *recent], sigmas=3, window=4) != ""


def test_the_window_forgets():
    recent = ()
    for value in range(7):
        recent = remember(recent, float(value), 3)
    assert recent == (4.0, 5.0, 6.0)


@pytest.mark.parametrize("action", ["skip", "stop"])
def test_steps_are_held_against_those_that_were_applied(action):
    settings, progress = ReliabilityConfig(spike_action=action, spike_sigmas=5.0, spike_window=4), Progress()
    for loss in (2.0, 2.1, 1.9, 2.0):
        assert skip_reason(loss, 1.0, progress, settings) == ""
        remember_step(loss, 1.0, progress, settings)
    assert "loss 3 is above" in skip_reason(3.0, 1.0, progress, settings)
    assert "gradient norm 1.2 is above" in skip_reason(2.0, 1.2, progress, settings)
    assert skip_reason(2.0, 1.0, progress, settings) == ""


def test_without_an_action_nothing_is_kept_and_only_what_is_not_finite_counts():
    settings, progress = ReliabilityConfig(spike_window=2), Progress()
    for _ in range(3):
        remember_step(1.0, 1.0, progress, settings)
    assert progress == Progress()
    assert skip_reason(1e30, 1e30, progress, settings) == ""
    assert skip_reason(math.nan, 1.0, progress, settings) == "loss not finite"
    assert skip_reason(1.0, math.inf, progress, settings) == "gradient norm not finite"


def view(replica, names=(), **known):
    return RankView(replica, list(names), len(names), **known)


def test_ranks_name_parameters_and_samples_together():
    """Two replicas of two ranks: the first reads, the second has the loss."""
    views = [
        view(0, ["a", "b"], keys=[["k0"], ["k1", "k2"]]),
        view(0, ["b"]),
        view(1, keys=[["k3"], ["k4"]]),
        view(1, ["c"], bad=[1]),
    ]
    joined = join_views(views)
    assert [(part["name"], part["ranks"]) for part in joined["parameters"]] == [("a", [0]), ("b", [0, 1]), ("c", [3])]
    assert joined["num_bad_gradients"] == 4
    assert joined["micro_batches"] == [{"replica": 1, "micro_batch": 1, "keys": ["k4"]}]
    assert joined["keys"] == ["k4"]
    views[3] = view(1)
    assert join_views(views)["keys"] == ["k0", "k1", "k2", "k3", "k4"], "the whole step, where nothing is known"


def test_a_record_stays_short():
    names = [f"p{number}" for number in range(5)]
    joined = join_views([view(replica, names, keys=[["k"]]) for replica in range(100)])
    assert len(joined["parameters"]) == 5 and joined["num_bad_gradients"] == 500
    assert all(len(part["ranks"]) == 8 and part["num_ranks"] == 100 for part in joined["parameters"])
