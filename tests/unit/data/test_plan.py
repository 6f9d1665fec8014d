import random

import numpy as np
import pytest

from laver_megatron.data.plan import PackPlan


def sizes(count, seed=0, longest=120):
    rng = random.Random(seed)
    tokens = [rng.randint(5, longest) for _ in range(count)]
    return tokens, [rng.choice((0, min(16, n), n // 2)) for n in tokens]


def plan(count=300, seed=5, seq_length=100, visual_seq_length=40, longest=120):
    return PackPlan(*sizes(count, longest=longest), seq_length, visual_seq_length, seed)


def epoch_packs(plan, epoch):
    first = sum(plan.num_packs(e) for e in range(epoch))
    return [plan.pack(first + i) for i in range(plan.num_packs(epoch))]


@pytest.mark.parametrize("case", range(8))
def test_an_epoch_holds_every_fitting_sample_once_within_both_budgets(case):
    rng = random.Random(case)
    tokens, visual = sizes(rng.randint(1, 400), seed=case)
    seq_length, visual_seq_length = rng.randint(60, 300), rng.randint(20, 100)
    plan = PackPlan(tokens, visual, seq_length, visual_seq_length, seed=case)
    fitting = [i for i in range(len(tokens)) if tokens[i] <= seq_length and visual[i] <= visual_seq_length]
    for epoch in range(3):
        packs = epoch_packs(plan, epoch)
        assert sorted(i for pack in packs for i in pack) == fitting
        assert all(sum(tokens[i] for i in pack) <= seq_length for pack in packs)
        assert all(sum(visual[i] for i in pack) <= visual_seq_length for pack in packs)
    assert sum(plan.skipped.values()) == len(tokens) - len(fitting)


def test_it_does_not_matter_how_the_plan_is_asked():
    numbers = list(range(400))
    in_order, one = plan(), {}
    shuffled = random.Random(1).sample(numbers, len(numbers))
    other = plan()
    one = {number: other.pack(number) for number in shuffled}
    assert [in_order.pack(number) for number in numbers] == [one[number] for number in numbers]
    assert other.pack(3) == one[3]  # again, after its epoch has left the cache


def test_locate_counts_through_the_epochs():
    p = plan()
    first, second = p.num_packs(0), p.num_packs(1)
    fresh = plan()
    assert fresh.locate(first + second) == (2, 0)
    assert fresh.locate(first - 1) == (0, first - 1)
    assert fresh.locate(first) == (1, 0)


def test_epochs_and_seeds_differ():
    p = plan()
    assert epoch_packs(p, 0) != epoch_packs(p, 1)
    assert epoch_packs(p, 0) != epoch_packs(plan(seed=6), 0)
    assert p.fingerprint() == plan().fingerprint() != plan(seed=6).fingerprint()
    assert p.fingerprint() != plan(count=301).fingerprint()


def test_the_order_is_the_same_on_every_machine():
    # Written down once: a change of these numbers would make old checkpoints go on with other data.
    p = PackPlan([10] * 8, [0] * 8, 20, 0, seed=1234)
    assert [p.pack(i) for i in range(5)] == [(5, 6), (3, 7), (4, 1), (2, 0), (2, 0)]


def test_short_samples_fill_packs():
    p = plan(count=2000, visual_seq_length=100, longest=50)
    fill = p.token_counts_I.sum() / (p.num_packs(0) * 100)
    assert fill > 0.9  # samples of 5 to 50 tokens in packs of 100; one sample a pack would give 0.28


def test_skipped_are_counted_by_reason_and_unreadable_ones_never_planned():
    p = PackPlan([50, 101, 60, 0], [10, 10, 41, 0], 100, 40, seed=0)
    assert p.skipped == {"more than 100 tokens": 1, "more than 40 visual tokens": 1}
    assert p.pack(0) == p.pack(1) == (0,)


def test_nothing_fits():
    with pytest.raises(
        ValueError, match=r"shortest has 50 tokens \(seq_length is 40\).*10 \(visual_seq_length is 40\)"
    ):
        PackPlan([50, 60, 0], [10, 11, 0], 40, 40, seed=0)
    with pytest.raises(ValueError, match="none of the 1 samples can be used"):
        PackPlan([0], [0], 40, 40, seed=0)


def test_ids_are_plain_integers():
    assert all(type(i) is int for i in plan().pack(0)) and not isinstance(plan().pack(0)[0], np.integer)
