"""Whom the watchdog blames, from heartbeats that are made up."""

import pytest

from laver_megatron.resilience.heartbeat import Beat
from laver_megatron.resilience.judge import Judge, numbers

LIMITS = {"start": 100.0, "data": 20.0, "step": 10.0, "save": 60.0, "validate": 10.0}
WORLD = 4


def beat(count, phase="step", iteration=5, number=1, waits=True, place="", ended=False):
    return Beat("host", 100, count, phase, iteration, number, place, waits, ended=ended)


class Clock:
    """Beats of all ranks once a second; those that are given differ from a rank that waits in a step."""

    def __init__(self, limits=LIMITS):
        self.judge, self.now = Judge(limits, interval=1.0), 0

    def verdict(self, seconds, silent=(), **ranks):
        """The first verdict within so many seconds, or None. silent: whose count stays as it is."""
        for _ in range(seconds):
            self.now += 1
            beats = {
                rank: beat(**{"count": 0 if rank in silent else self.now, **ranks.get(f"rank{rank}", {})})
                for rank in range(WORLD)
            }
            self.judge.hear(beats, self.now)
            if found := self.judge.verdict(self.now):
                return found
        return None


def named(verdict):
    return [it.rank for it in verdict.named]


def test_a_rank_without_a_heartbeat():
    clock = Clock()
    verdict = clock.verdict(20, silent=(2,))
    assert named(verdict) == [2] and clock.now == 12  # more than 10 s after the first
    assert "rank 2 (process 100 on host) has given no heartbeat for 11 s, in phase step after iteration 5" in str(
        verdict
    )


def test_silence_needs_no_hour_in_a_save():
    verdict = Clock().verdict(20, silent=(1,), rank1={"phase": "save"})
    assert named(verdict) == [1]


def test_a_rank_that_does_not_wait_is_the_one_that_the_others_wait_for():
    verdict = Clock().verdict(20, rank3={"waits": False, "place": "loader.py:7 read"})
    assert named(verdict) == [3]
    assert "is alive but has not moved" in str(verdict) and "loader.py:7 read" in str(verdict)


def test_the_furthest_behind_of_those_that_do_not_wait():
    ranks = {f"rank{rank}": {"waits": False, "phase": "step"} for rank in range(WORLD)}
    ranks["rank1"] = {"waits": False, "phase": "data"}
    verdict = Clock({**LIMITS, "data": 5.0}).verdict(20, **ranks)
    assert named(verdict) == [1]


def test_others_wait_for_a_long_save_without_a_verdict():
    clock = Clock()
    assert clock.verdict(58, rank0={"waits": False, "phase": "save"}) is None
    assert named(clock.verdict(20, rank0={"waits": False, "phase": "save"})) == [0]
    assert clock.now == 62


def test_all_wait_for_each_other():
    verdict = Clock().verdict(20, rank1={"place": "there"})
    assert verdict.named == ()
    assert "no rank can be singled out" in str(verdict) and "rank 1 at there" in str(verdict)


@pytest.mark.parametrize("ranks", [{}, {"rank0": {"waits": False}}])
def test_a_run_that_moves_is_left_alone(ranks):
    clock = Clock()
    for step in range(30):
        assert (
            clock.verdict(
                9, **{f"rank{rank}": {**ranks.get(f"rank{rank}", {}), "number": step} for rank in range(WORLD)}
            )
            is None
        )


def test_phases_without_a_limit_last_any_time():
    assert Clock(dict.fromkeys(LIMITS)).verdict(500, silent=(0,), rank1={"waits": False}) is None


def test_ranks_that_have_ended_are_not_watched():
    assert Clock().verdict(9, silent=(0, 1, 2, 3), **{f"rank{rank}": {"ended": True} for rank in range(WORLD)}) is None
    clock = Clock()
    assert clock.verdict(50, silent=(0,), rank0={"ended": True}, **moving()) is not None


def moving():
    return {f"rank{rank}": {"waits": rank != 2} for rank in (1, 2, 3)}


def test_a_monitor_that_was_stopped_itself_blames_nobody():
    clock = Clock()
    assert clock.verdict(5) is None
    clock.now += 1000
    clock.judge.forgive(clock.now)
    assert clock.verdict(8) is None


def test_living_ranks_beat():
    clock = Clock()
    clock.verdict(8, silent=(2,))
    assert sorted(clock.judge.living(clock.now)) == [0, 1, 3]


def test_thousands_of_ranks_are_some_and_a_number():
    assert numbers(range(3)) == "0, 1, 2" and numbers(range(4000)) == "0, 1, 2, 3, 4, 5, 6, 7 and 3992 more"
