"""Where the time of a run goes, by a clock that stands still between what the test lets pass."""

import pytest

from laver_megatron.checkpoint.progress import Progress
from laver_megatron.resilience import goodput
from laver_megatron.resilience.goodput import CARRIED, KEPT, Ledger


class Run:
    """A run whose phases take as long as the test says."""

    def __init__(self, monkeypatch):
        self.now, self.phases = 1000.0, {}
        monkeypatch.setattr(goodput.time, "time", lambda: self.now)
        monkeypatch.setattr(goodput, "seconds_by_phase", lambda: self.phases)

    def start(self, earlier, seconds, progress):
        """A process begins; the run's state is filled after so many seconds."""
        self.phases = dict.fromkeys(("start", "data", "step", "save", "validate"), 0.0)
        ledger = Ledger(earlier)
        self.spend(start=seconds)
        ledger.follow(progress)
        return ledger

    def spend(self, **seconds):
        for name, value in seconds.items():
            self.phases[name] += value
            self.now += value

    def iterate(self, progress, *, step=4.0, data=1.0, logging=0.5, skipped=False):
        self.spend(data=data, step=step + logging)
        progress.training_seconds += step + data
        progress.data_seconds += data
        progress.skipped_seconds += step * skipped


def assert_adds_up(ledger, run):
    seconds = ledger.seconds()
    assert seconds.keys() == {*KEPT, *CARRIED}
    assert sum(seconds.values()) == pytest.approx(run.now - ledger.born)
    assert all(value >= -1e-9 for value in seconds.values()), seconds


def test_one_attempt(monkeypatch):
    run, progress = Run(monkeypatch), Progress()
    ledger = run.start(None, 20.0, progress)
    for number in range(5):
        run.iterate(progress, skipped=number == 2)
    run.spend(save=3.0, validate=2.0)
    assert_adds_up(ledger, run)
    seconds = ledger.seconds()
    assert seconds == {
        "step": 16, "data": 5, "skipped": 4, "lost": 0, "start": 20, "validate": 2, "save": 3, "restart": 0,
        "other": pytest.approx(2.5),
    }  # fmt: skip
    assert ledger.summary()["share"] == pytest.approx(16 / 52.5)


def test_a_kill_loses_what_came_after_the_checkpoint(monkeypatch):
    run, progress = Run(monkeypatch), Progress()
    ledger = run.start(None, 20.0, progress)
    for _ in range(3):
        run.iterate(progress)
    kept = Progress(**vars(progress))
    run.spend(save=3.0)
    for _ in range(2):
        run.iterate(progress)
    run.spend(step=2.0)  # of an iteration that does not end
    last_words = ledger.plain()
    run.now += 30.0
    ledger = run.start(last_words, 10.0, kept)
    assert_adds_up(ledger, run)
    seconds = ledger.seconds()
    assert (seconds["step"], seconds["data"], seconds["lost"]) == (12, 3, 10)
    assert (seconds["start"], seconds["restart"], seconds["save"]) == (30, 30, 3)
    assert seconds["other"] == pytest.approx(2.5 + 2.0)
    run.iterate(kept)
    assert_adds_up(ledger, run)
    assert ledger.seconds()["step"] == 16
    # Again, with nothing lost.
    last_words = ledger.plain()
    run.now += 5.0
    ledger = run.start(last_words, 1.0, kept)
    assert_adds_up(ledger, run)
    assert ledger.seconds()["lost"] == 10 and ledger.seconds()["restart"] == 35


def test_a_kill_before_the_state_is_filled(monkeypatch):
    run, progress = Run(monkeypatch), Progress(training_seconds=0.0)
    ledger = run.start(None, 5.0, progress)
    run.iterate(progress)
    last_words = ledger.plain()
    run.phases = dict.fromkeys(run.phases, 0.0)
    ledger = Ledger(last_words)
    run.spend(start=7.0)
    assert_adds_up(ledger, run)
    ledger = run.start(ledger.plain(), 1.0, Progress())
    assert_adds_up(ledger, run)
    assert ledger.seconds()["start"] == 13 and ledger.seconds()["lost"] == 5


def test_a_run_that_was_begun_without_accounts(monkeypatch):
    run, progress = Run(monkeypatch), Progress(training_seconds=500.0, data_seconds=20.0)
    ledger = run.start(None, 5.0, progress)
    run.iterate(progress)
    assert_adds_up(ledger, run)
    assert ledger.seconds()["step"] == 4
