"""What the main thread says it is doing, and the limits that go with it."""

import time

import pytest

from laver_megatron.config.fields import Config
from laver_megatron.resilience import phases
from laver_megatron.resilience.limits import beat_interval, collective_timeout_minutes, phase_limits


def config(**settings):
    return Config.of(data_path=("x",), run_dir="x", seq_length=8, train_iters=1, **settings)


def test_phases_nest_and_tile_the_time():
    before, start = phases.seconds_by_phase(), time.monotonic()
    phases.enter("step", 7)
    seen = []
    with phases.phase("data"):
        time.sleep(0.05)
        seen.append(phases.now())
    seen.append(phases.now())
    assert [(it.phase, it.iteration) for it in seen] == [("data", 7), ("step", 7)]
    assert seen[1].number > seen[0].number
    passed = {name: spent - before[name] for name, spent in phases.seconds_by_phase().items()}
    assert passed["data"] >= 0.05 and passed["save"] == 0
    assert sum(passed.values()) == pytest.approx(time.monotonic() - start, abs=0.01)


def test_a_phase_ends_with_an_error_and_decorates():
    phases.enter("step", 1)

    @phases.phase("save")
    def fail():
        assert phases.now().phase == "save"
        raise OSError

    for _ in range(2):
        with pytest.raises(OSError):
            fail()
        assert phases.now().phase == "step"


def test_limits_are_the_options():
    limits = phase_limits(config(step_timeout_minutes=0.5, data_timeout_minutes=2, save_timeout_minutes=None))
    assert limits == {"start": 3600, "data": 120, "step": 30, "save": None, "validate": 30}
    assert beat_interval(limits) == 3.0
    assert phase_limits(config(start_timeout_minutes=1))["start"] == 60
    assert beat_interval(phase_limits(config())) == 5.0


def test_the_watchdog_comes_before_the_collectives():
    assert collective_timeout_minutes(config()) == 62
    assert collective_timeout_minutes(config(save_timeout_minutes=90)) == 92
    never = {f"{name}_timeout_minutes": None for name in ("start", "data", "step", "save")}
    assert collective_timeout_minutes(config(**never)) == 10
    given = config(distributed_timeout_minutes=10)
    assert collective_timeout_minutes(given) == 10
    assert set(phase_limits(given).values()) == {480}
    assert set(phase_limits(config(distributed_timeout_minutes=10, **never)).values()) == {None}
