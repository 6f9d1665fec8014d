"""Who is named as slower than those that do the same work."""

from laver_megatron.resilience.heartbeat import Beat
from laver_megatron.resilience.stragglers import Stragglers


def beats(looks, *busy, stages=(0, 0, 0, 0)):
    """Beats of ranks that were busy for these shares of so many looks."""
    return {
        rank: Beat(f"host{rank}", 7, 1, "step", 1, 1, "", True, round(share * looks), looks, stage)
        for rank, (share, stage) in enumerate(zip(busy, stages, strict=False))
    }


def line(percent, *busy, **others):
    stragglers = Stragglers(percent)
    assert stragglers.line(beats(0, *busy, **others)) is None
    assert stragglers.line(beats(100, *busy, **others)) is None, "too few to say"
    return stragglers.line(beats(1000, *busy, **others))


def test_the_slow_rank_is_named_with_its_host():
    assert line(50, 0.5, 0.5, 0.9, 0.5) == (
        "straggler: rank 2 (process 7 on host2) is busy for 90% of the time, the others of its stage for 50%"
    )


def test_nobody_is_slow():
    assert line(50, 0.5, 0.6, 0.7, 0.5) is None
    assert line(None, 0.1, 1.0, 0.1, 0.1) is None
    assert line(50, 0.01, 0.01, 0.1, 0.01) is None, "idle ranks"
    assert line(50, 0.9) is None


def test_the_option_is_the_bound():
    assert line(50, 0.5, 0.5, 0.7, 0.5) is None and "rank 2" in line(30, 0.5, 0.5, 0.7, 0.5)


def test_two_ranks():
    assert "rank 1" in line(50, 0.3, 0.9)


def test_stages_differ_by_design():
    assert line(50, 0.4, 0.4, 0.9, 0.9, stages=(0, 0, 1, 1)) is None
    assert "rank 3" in line(50, 0.4, 0.4, 0.5, 0.9, stages=(0, 0, 1, 1))


def test_it_is_said_of_every_period_anew():
    stragglers = Stragglers(50)
    stragglers.line(beats(0, 0.5, 0.9))
    assert stragglers.line(beats(300, 0.5, 0.9)) is not None
    assert stragglers.line(beats(310, 0.5, 0.9)) is None
