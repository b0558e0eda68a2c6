"""Shapes of padded batches: every text in exactly one row that holds it, and as little padding as brute force finds."""

from functools import cache
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samescore.runtime.batches import (
    CALL_TOKENS,
    MOST_ROWS,
    Bucket,
    best_lengths,
    bucket_batches,
    budget_batches,
    measure_plan,
    parse_buckets,
    plan_buckets,
    rounded_lengths,
)
from samescore.runtime.errors import UsageError

lengths_of_texts = st.lists(st.integers(1, 700), min_size=1, max_size=60)
few_lengths = st.lists(st.integers(1, 40), min_size=1, max_size=9)
some_buckets = st.sets(st.builds(Bucket, st.integers(1, 5), st.integers(1, 40)), min_size=1, max_size=4)


def padded_to(lengths, reach):
    return sum(min(r for r in reach if r >= length) for length in lengths)


@given(few_lengths, st.integers(1, 5))
def test_best_lengths_are_what_brute_force_finds(lengths, most):
    distinct = sorted(set(lengths))
    for count, found in enumerate(best_lengths(np.array(lengths), most), start=1):
        assert len(found) <= count and found[-1] == max(lengths) and list(found) == sorted(set(found))
        sets = [s for size in range(1, count + 1) for s in combinations(distinct, size) if s[-1] == distinct[-1]]
        assert padded_to(lengths, found) == min(padded_to(lengths, s) for s in sets)


@given(lengths_of_texts, st.integers(2, 8), st.integers(1, 20_000), st.sampled_from([1, 8, 64]))
@settings(deadline=None)
def test_a_plan_holds_every_text_and_says_its_waste(lengths, limit, batch_tokens, multiple):
    longest = 640
    plan = plan_buckets(lengths, longest=longest, limit=limit, batch_tokens=batch_tokens, multiple=multiple)
    assert len(plan.buckets) <= limit and plan.texts == len(lengths)
    assert plan.buckets[-1].sequence == longest and Bucket(1, longest) in plan.buckets
    assert all(b.sequence % multiple == 0 or b.sequence == longest for b in plan.buckets)
    assert all(b.batch == 1 or b.tokens <= batch_tokens for b in plan.buckets)
    cut = [min(length, longest) for length in lengths]
    shared = [b.sequence for b in plan.buckets if b.batch > 1]
    reach = [b.sequence for b in plan.buckets if b.batch > 1 or b.sequence > max(shared, default=0)]
    assert plan.waste == pytest.approx(1 - sum(cut) / padded_to(cut, reach))
    batches = bucket_batches(cut, plan.buckets)
    assert plan.waste_at_once == pytest.approx(1 - sum(cut) / sum(b.shape.tokens for b in batches))
    assert plan.calls == len(batches)


@given(lengths_of_texts, st.integers(2, 8))
@settings(deadline=None)
def test_the_fewest_buckets_that_keep_the_waste(lengths, limit):
    """Where the plan exceeds the waste, no choice of so many lengths keeps it."""
    plan = plan_buckets(lengths, longest=700, limit=limit, waste=0.1, batch_tokens=10**6, multiple=1)
    shared = [b.sequence for b in plan.buckets if b.batch > 1]
    every = best_lengths(np.array(lengths), limit - 1)
    wasted = [1 - sum(lengths) / padded_to(lengths, found) for found in every]
    assert 1 - sum(lengths) / padded_to(lengths, shared) == pytest.approx(wasted[len(shared) - 1])
    assert all(w > 0.1 for w in wasted[: len(shared) - 1])
    assert plan.waste <= 0.1 or len(shared) >= min(limit - 1, len(set(lengths)))


def test_even_lengths_need_more_than_eight():
    """For lengths spread evenly k lengths waste 1 / (k + 1): with 7 of them, 12.5 %."""
    plan = plan_buckets(range(1, 561), longest=560, multiple=1)
    assert len(plan.buckets) == 8
    assert plan.waste == pytest.approx(1 / 8, abs=2e-3)
    assert plan_buckets(range(1, 561), longest=560, limit=11, multiple=1).waste <= 0.1


@given(st.lists(st.integers(1, 40), max_size=7), some_buckets)
def test_bucket_batches_are_what_brute_force_finds(lengths, buckets):
    lengths = [min(length, max(b.sequence for b in buckets)) for length in lengths]
    batches = bucket_batches(lengths, sorted(buckets))
    assert sorted(row for batch in batches for row in batch.rows) == list(range(len(lengths)))
    for batch in batches:
        assert batch.shape in buckets and 1 <= len(batch.rows) <= batch.shape.batch
        assert all(lengths[row] <= batch.shape.sequence for row in batch.rows)

    @cache
    def least(left):
        """Over every bucket and every set of texts in it, not only neighbours and full batches."""
        if not left:
            return 0
        return min(
            b.tokens + CALL_TOKENS + least(tuple(sorted(set(left) - {left[0], *others})))
            for b in buckets
            if b.sequence >= lengths[left[0]]
            for fits in [[i for i in left[1:] if lengths[i] <= b.sequence]]
            for size in range(min(b.batch - 1, len(fits)) + 1)
            for others in combinations(fits, size)
        )

    cost = sum(batch.shape.tokens + CALL_TOKENS for batch in batches)
    assert cost == least(tuple(range(len(lengths))))


@given(st.lists(st.integers(1, 3000), max_size=300), st.integers(1, 20_000))
@settings(deadline=None)
def test_budget_batches(lengths, batch_tokens):
    batches = budget_batches(lengths, longest=2048, batch_tokens=batch_tokens)
    assert sorted(row for batch in batches for row in batch.rows) == list(range(len(lengths)))
    shapes = set(rounded_lengths(max([2048, *lengths])))
    for batch in batches:
        inside = [lengths[row] for row in batch.rows]
        assert batch.shape.batch == len(inside) <= MOST_ROWS and batch.shape.sequence in shapes
        assert batch.shape.batch == 1 or batch.shape.tokens <= batch_tokens
        assert max(inside) <= batch.shape.sequence and inside == sorted(inside, reverse=True)
    assert [b.shape.sequence for b in batches] == sorted((b.shape.sequence for b in batches), reverse=True)


def test_many_texts_waste_little_and_few_share_a_call():
    lengths = np.random.default_rng(0).integers(16, 2049, 5000).tolist()
    batches = budget_batches(lengths, longest=2048)
    assert 1 - sum(lengths) / sum(b.shape.tokens for b in batches) < 0.1
    assert len({b.shape.sequence for b in batches}) <= len(rounded_lengths(2048)) == 29
    assert len(budget_batches([20, 21, 22, 30], longest=512)) == 1
    assert len(budget_batches([20, 512], longest=512)) == 2


@pytest.mark.parametrize("longest", [1, 15, 16, 17, 512, 1000])
def test_rounding_up_adds_less_than_a_fifth(longest):
    grid = rounded_lengths(longest)
    assert grid[-1] == longest and list(grid) == sorted(set(grid))
    for length in range(17, longest + 1):
        assert 1 - length / min(g for g in grid if g >= length) < 1 / 5


def test_named_buckets():
    assert parse_buckets(" 1x512, 8x128,4x128") == (Bucket(4, 128), Bucket(8, 128), Bucket(1, 512))
    assert parse_buckets([(1, 512), Bucket(8, 128)]) == (Bucket(8, 128), Bucket(1, 512))
    assert str(Bucket(8, 128)) == "8x128"
    for wrong in ("", "8", "8x", "0x8", "8x128;", "-1x5", []):
        with pytest.raises(UsageError, match="8x128,1x512"):
            parse_buckets(wrong)


def test_what_cannot_be_planned():
    with pytest.raises(UsageError, match="700 tokens is longer than the longest bucket, 1x512"):
        bucket_batches([3, 700], [Bucket(1, 512), Bucket(8, 128)])
    for wrong in ({"lengths": []}, {"lengths": [0]}, {"lengths": [4], "limit": 1}, {"lengths": [4], "longest": 0}):
        with pytest.raises(UsageError):
            plan_buckets(**{"longest": 512, **wrong})


def test_a_single_text_is_not_padded_to_a_batch():
    plan = plan_buckets([30] * 900 + [200] * 90 + [500] * 10, longest=512)
    (alone,) = bucket_batches([30], plan.buckets)
    assert alone.shape == Bucket(1, 32) or alone.shape.batch == 1
    assert measure_plan(plan.buckets, [30]).calls == 1
