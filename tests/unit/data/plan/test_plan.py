import hashlib
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laver_megatron.data.plan.plan import PackPlan, PlanMark
from laver_megatron.data.plan.sizes import SampleSizes


def sizes(count, seed=0, longest=120):
    rng = random.Random(seed)
    tokens = [rng.randint(5, longest) for _ in range(count)]
    return tokens, [rng.choice((0, min(16, n), n // 2)) for n in tokens]


def source(count=300, seed=0, longest=120, shard_size=20, weight=1.0):
    return SampleSizes(*sizes(count, seed, longest), np.arange(count) // shard_size, weight)


def plan(*sources, seq_length=100, visual_seq_length=40, seed=5, window=100):
    return PackPlan(sources or [source()], seq_length, visual_seq_length, seed, window)


def epoch_packs(plan, epoch):
    first = sum(plan.num_packs(e) for e in range(epoch))
    return [plan.pack(first + i) for i in range(plan.num_packs(epoch))]


@pytest.mark.processes
@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 200),
    st.integers(0, 99),
    st.integers(60, 300),
    st.integers(20, 100),
    st.sampled_from([1, 7, 90, 999]),
)
def test_an_epoch_holds_every_fitting_sample_once_within_both_budgets(
    count, case, seq_length, visual_seq_length, window
):
    tokens, visual = sizes(count, seed=case)
    fitting = [i for i in range(count) if tokens[i] <= seq_length and visual[i] <= visual_seq_length]
    if not fitting:
        return
    p = PackPlan([SampleSizes(tokens, visual, [0] * count)], seq_length, visual_seq_length, case, window)
    for epoch in range(3):
        packs = epoch_packs(p, epoch)
        assert sorted(i for pack in packs for i in pack) == fitting
        assert all(sum(tokens[i] for i in pack) <= seq_length for pack in packs)
        assert all(sum(visual[i] for i in pack) <= visual_seq_length for pack in packs)
    assert sum(p.skipped.values()) == count - len(fitting)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.05, 2.5), min_size=1, max_size=3), st.integers(0, 9))
def test_weights_are_how_often_a_sample_comes(weights, seed):
    p = plan(*(source(60, seed=i, longest=90, weight=weight) for i, weight in enumerate(weights)), seed=seed)
    for epoch in range(2):
        times = Counter(i for pack in epoch_packs(p, epoch) for i in pack)
        for number, weight in enumerate(weights):
            ids = [60 * number + row for part in p.rows[number].chunks() for row in part.tolist()]
            assert {times[i] for i in ids} <= {int(weight), int(weight) + 1}
            assert sum(times[i] for i in ids) == int(weight) * len(ids) + round(weight % 1 * len(ids))


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(150)))
def test_it_does_not_matter_how_the_plan_is_asked(numbers):
    in_order, other = plan(), plan()
    shuffled = {number: other.pack(number) for number in numbers}
    assert [in_order.pack(number) for number in range(150)] == [shuffled[number] for number in range(150)]


@pytest.mark.processes
def test_a_new_process_packs_the_same():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_plan import plan\n"
        "p = plan(); print([p.pack(i) for i in (300, 7, 150)], p.fingerprint())"
    )
    run = [sys.executable, "-c", code, str(__file__).rsplit("/", 1)[0]]
    output = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    p = plan()
    assert output.strip() == f"{[p.pack(i) for i in (300, 7, 150)]} {p.fingerprint()}"


def test_locate_counts_through_the_epochs():
    p = plan()
    first, second = p.num_packs(0), p.num_packs(1)
    fresh = plan()
    assert fresh.locate(first + second) == (2, 0)
    assert fresh.locate(first - 1) == (0, first - 1)
    assert fresh.locate(first) == (1, 0)
    # A batch across the end of an epoch is the end of one and the beginning of the next.
    assert [fresh.pack(first + i) for i in (-1, 0)] == [epoch_packs(p, 0)[-1], epoch_packs(p, 1)[0]]


def test_windows_are_packed_when_asked_for_and_counted_once(monkeypatch):
    packed = []
    pack_window = PackPlan._pack_window
    monkeypatch.setattr(
        PackPlan, "_pack_window", lambda self, window: packed.append(window) or pack_window(self, window)
    )
    p = plan(source(2000, longest=90))
    assert p.num_windows == 20
    p.pack(0)
    assert packed == [0] and abs(p.estimate_num_packs() / plan(source(2000, longest=90)).num_packs() - 1) < 0.1
    packed.clear()
    last = p.num_packs(0) - 1
    assert packed == list(range(1, 20))
    packed.clear()
    p.pack(0), p.locate(last), p.locate(last // 2)
    assert packed == [0]  # its packs were dropped; the numbers of the others' are remembered
    assert len(p._windows) <= 4


def test_what_is_kept_of_epochs_is_bounded():
    p = plan(source(2000, longest=90))
    for epoch in range(5):
        p.num_packs(epoch)
    assert len(p._orders) <= 2 and len(p._windows) <= 4
    for order in p._orders.values():  # of 100 shards
        assert sum(part.nbytes for part in vars(order).values() if isinstance(part, np.ndarray)) < 100 * 100


def test_a_position_means_what_it_meant_before():
    """Packs, fingerprint and mark as noted with the code of commit 4d1fafb, which held an epoch's order in a list."""
    n = np.arange(40_000)
    first, second, third = (
        (n[:size] * 7919 * factor + 13) % 131 for size, factor in ((40_000, 1), (9000, 3), (500, 5))
    )
    p = plan(
        SampleSizes(first, first // 3, n // 300, 1.3),
        SampleSizes(second, second // 2, n[:9000] // 77, 2.0),
        SampleSizes(third, 0 * third, n[:500] // 9, 0.25),
        visual_seq_length=45,
        seed=7,
        window=5000,
    )
    digest = hashlib.sha256()
    for window in (0, 1, 30):
        packs = p.window_packs(window)
        digest.update(f"{packs.sample_id_I.tolist()}{packs.begin_P.tolist()}".encode())
    assert digest.hexdigest()[:16] == "c1eeaf9edd88fbf7" and p.fingerprint() == "e18229f0e0e08bba"
    mark = PlanMark(window=3, first_pack=7107, digest="7014f0af0dcd08c6")
    expected = p.pack(7110)
    assert p.mark(7110) == mark
    fresh = PackPlan(p.sources, 100, 45, 7, 5000)
    fresh.resume_from(mark)
    assert fresh.pack(7110) == expected


def test_epochs_and_seeds_and_windows_differ():
    p = plan()
    assert epoch_packs(p, 0) != epoch_packs(p, 1)
    assert epoch_packs(p, 0) != epoch_packs(plan(seed=6), 0)
    assert sorted(epoch_packs(p, 0)) != sorted(epoch_packs(plan(window=50), 0))


def test_the_fingerprint_changes_whenever_a_pack_could():
    base = source()
    changed_tokens, changed_visual, changed_shards = (
        part.copy() for part in (base.tokens_I, base.visual_I, base.shard_I)
    )
    changed_tokens[17] += 1
    changed_visual[17] += 1
    changed_shards[19] += 1
    others = [
        plan(seed=6), plan(window=99), plan(seq_length=101), plan(visual_seq_length=41), plan(source(301)),
        plan(source(weight=1.01)), plan(source(150), source(150)), plan(source(), source()),
        plan(SampleSizes(changed_tokens, base.visual_I, base.shard_I)),
        plan(SampleSizes(base.tokens_I, changed_visual, base.shard_I)),
        plan(SampleSizes(base.tokens_I, base.visual_I, changed_shards)),
    ]  # fmt: skip
    prints = [one.fingerprint() for one in (plan(), *others)]
    assert len(set(prints)) == len(prints) and plan().fingerprint() == prints[0]


def test_the_order_is_the_same_on_every_machine():
    # Written down once: a change of these numbers would make old checkpoints go on with other data.
    p = PackPlan([SampleSizes([10] * 8, [0] * 8, [0, 0, 1, 1, 2, 2, 3, 3])], 20, 0, seed=1234, window=4)
    assert [p.pack(i) for i in range(6)] == [(5, 6), (4, 7), (0, 2), (1, 3), (1, 2), (3, 0)]


def test_a_window_opens_few_shards():
    p = plan(source(2000, longest=70, shard_size=50), window=200)  # all of them fit
    for window in range(p.num_windows):
        shards = {i // 50 for i in p.window_packs(window).sample_id_I.tolist()}
        assert len(shards) <= 200 // 50 + 1  # the ones it holds whole, and one or two in part


def test_samples_of_a_window_are_shuffled():
    p = plan(source(2000, longest=20, shard_size=50), window=1000)
    pack = p.pack(3)
    assert len({i // 50 for i in pack}) > len(pack) / 3 and list(pack) != sorted(pack)


def test_windows_are_of_one_size():
    p = plan(source(2001, longest=70), window=1000)
    assert [len(p.window_packs(window).sample_id_I) for window in range(3)] == [667, 667, 667]


def test_skipped_are_counted_by_reason_and_unreadable_ones_never_planned():
    p = plan(SampleSizes([50, 101, 60, 0], [10, 10, 41, 0], [0] * 4))
    assert p.skipped == {"more than 100 tokens": 1, "more than 40 visual tokens": 1}
    assert p.pack(0) == p.pack(1) == (0,)


def test_nothing_fits():
    with pytest.raises(
        ValueError, match=r"shortest has 50 tokens \(seq_length is 40\).*10 \(visual_seq_length is 40\)"
    ):
        plan(SampleSizes([50, 60, 0], [10, 11, 0], [0] * 3), seq_length=40)
    with pytest.raises(ValueError, match="none of the 1 samples can be used"):
        plan(SampleSizes([0], [0], [0]))
    with pytest.raises(ValueError, match="none of the 0 samples can be used"):
        plan(SampleSizes([], [], []))
    with pytest.raises(ValueError, match=r"weights \[0.0\] leave none of"):
        plan(source(weight=0))
    with pytest.raises(ValueError, match="window of 0"):
        plan(window=0)


def test_ids_count_through_the_sources():
    p = plan(source(30), source(50))
    assert [p.locate_sample(i) for i in (0, 29, 30, 79)] == [(0, 0), (0, 29), (1, 0), (1, 49)]
    assert p.sizes(range(30, 80))[0].tolist() == source(50).tokens_I.tolist()
    assert all(type(i) is int for i in p.pack(0)) and not isinstance(p.pack(0)[0], np.integer)
    empty_first = plan(SampleSizes([], [], []), source(50))
    assert empty_first.locate_sample(0) == (1, 0)


def test_sizes_are_not_copied():
    one = source()
    assert plan(one).sources[0].tokens_I is one.tokens_I
    assert one.tokens_I.dtype == one.visual_I.dtype == one.shard_I.dtype == np.int32


def test_a_weight_that_leaves_nothing_is_an_error():
    sizes = [10] * 66
    sources = [SampleSizes(sizes, [0] * 66, [0] * 66), SampleSizes(sizes, [0] * 66, [0] * 66, weight=0.001)]
    with pytest.raises(ValueError, match=r"weight of 0.001 leaves none of a source's 66 samples"):
        PackPlan(sources, 64, 32, seed=1)
    assert PackPlan([sources[0], SampleSizes(sizes, [0] * 66, [0] * 66, weight=0.02)], 64, 32, seed=1).num_samples == 67


@pytest.fixture
def packed(monkeypatch):
    """The windows that plans have packed, in order."""
    windows, pack_window = [], PackPlan._pack_window
    monkeypatch.setattr(
        PackPlan, "_pack_window", lambda self, number: windows.append(number) or pack_window(self, number)
    )
    return windows


@pytest.mark.parametrize("epoch, share", [(0, 0.0), (0, 0.5), (0, 0.99), (2, 0.3)])
def test_from_a_mark_on_nothing_before_it_is_packed(packed, epoch, share):
    whole = plan(source(2000, longest=90))
    position = sum(whole.num_packs(e) for e in range(epoch)) + int(share * whole.num_packs(epoch))
    expected = [whole.pack(position + i) for i in range(60)]
    mark = whole.mark(position)
    resumed = plan(source(2000, longest=90))
    packed.clear()
    resumed.resume_from(mark)
    assert [resumed.pack(position + i) for i in range(60)] == expected
    assert min(packed) == mark.window == whole._find(position) and len(packed) <= 4
    assert resumed.mark(position) == mark
    assert resumed.locate(position) == whole.locate(position)
    packed.clear()
    assert resumed.pack(3) == whole.pack(3) and resumed.mark(3) == whole.mark(3)
    assert resumed.num_packs(epoch) == whole.num_packs(epoch)


def test_a_mark_packs_one_window_at_most(packed):
    p = plan(source(2000, longest=90))
    p.num_packs(0)
    packed.clear()
    p.mark(200)
    assert len(packed) == 1
    fresh = plan(source(2000, longest=90))
    assert fresh.mark(200).window == 0  # nothing is known yet beyond the first


def test_a_mark_of_anything_else_is_noticed():
    p = plan(source(2000, longest=90))
    p.num_packs(0)
    mark = p.mark(100)
    wrong = [
        replace(mark, first_pack=mark.first_pack + 1), replace(mark, window=mark.window + 1),
        replace(mark, digest="0" * 16), plan(source(2000, longest=90), seed=6).mark(0), replace(mark, window=-1),
    ]  # fmt: skip
    for one in wrong:
        with pytest.raises(ValueError, match="other data or to another version"):
            plan(source(2000, longest=90)).resume_from(one)


def test_other_packs_than_those_of_a_mark_are_noticed(monkeypatch):
    p = plan(source(2000, longest=90))
    p.num_packs(0)
    mark = p.mark(100)
    monkeypatch.setattr("laver_megatron.data.plan.plan.pack_window", lambda tokens_I, *_: np.arange(len(tokens_I)))
    with pytest.raises(ValueError, match="another version of laver_megatron"):
        plan(source(2000, longest=90)).resume_from(mark)


def test_what_lies_before_a_mark_is_held_against_it():
    p = plan(source(2000, longest=90))
    p.resume_from(p._mark(5, 77))  # all its parts agree, and yet the fifth window begins elsewhere
    p.pack(100)
    for _ in range(2):  # it stays wrong however often it is asked
        with pytest.raises(ValueError, match=r"window 5 begins at pack \d+, but 77 was noted"):
            p.pack(10)
