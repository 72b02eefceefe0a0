"""Keyed permutations against their promises and against plain loops."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kerastrip.sampling.permutation import (
    arrange,
    cycle,
    deal,
    mix,
    permute,
    split_permute,
    stream,
)

KEYS = st.integers(0, 2**64 - 1)


def test_mix_keeps_tuples_apart():
    keys = [
        (),
        *((a,) for a in range(-3, 4)),
        *itertools.product(range(-3, 4), repeat=2),
        (0, 0, 0),
        (2**63,),
        (2**64,),
        (2**64 + 1,),
        (-(2**64),),
        (2**200,),
        (2**200, 1),
    ]
    assert len({mix(*key) for key in keys}) == len(keys)
    assert all(0 <= mix(*key) < 2**64 for key in keys)


def test_mix_of_arrays_is_the_mix_of_their_elements():
    column, row = np.array([[-5], [0], [2**62]]), np.array([1, 2, 3, 4])
    hashed = mix(7, column, 2**70, row)
    assert hashed.dtype == np.uint64
    expected = [[mix(7, a, 2**70, b) for b in row.tolist()] for a in column[:, 0]]
    assert hashed.tolist() == expected
    assert column[:, 0].tolist() == [-5, 0, 2**62]


def test_mix_spreads_every_bit():
    hashed = mix(np.arange(20_000))
    bits = (hashed[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.02
    flipped = mix(np.arange(20_000) ^ 1) ^ hashed
    bits = (flipped[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.02


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 2000), key=KEYS)
def test_permute_is_a_bijection(n, key):
    order = permute(np.arange(n), n, key)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(n))


def test_permute_is_a_bijection_for_every_small_number():
    n = np.repeat(np.arange(1, 150), np.arange(1, 150))
    x = np.concatenate([np.arange(size) for size in range(1, 150)])
    order = permute(x, n, mix(3, n))
    assert np.lexsort((x, n)).tolist() == np.argsort(n * 1000 + x).tolist()
    for size in range(1, 150):
        assert sorted(order[n == size].tolist()) == list(range(size))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(10**6, 2**52 - 1), key=KEYS)
def test_permute_of_a_huge_range_stays_distinct_and_inside(n, key):
    x = np.concatenate((np.arange(500), np.arange(n - 500, n)))
    order = permute(x, n, key)
    assert len(set(order.tolist())) == 1000
    assert 0 <= order.min() <= order.max() < n
    # Neither end is drawn to itself: means of 1000 uniform places, 5 deviations.
    assert abs(order.mean() / n - 0.5) < 5 / np.sqrt(12 * 1000)


def test_permute_looks_at_one_element_at_a_time():
    x, n = np.arange(40), np.full(40, 40)
    key = mix(1, np.arange(40) % 3)
    together = permute(x, n, key)
    alone = [permute(x[i : i + 1], 40, int(key[i]))[0] for i in range(40)]
    assert together.tolist() == alone
    grid = permute(np.arange(6)[None], np.array([[6], [9]]), mix(np.array([[1], [2]])))
    assert grid.shape == (2, 6)
    np.testing.assert_array_equal(grid[0], permute(np.arange(6), 6, mix(1)))
    np.testing.assert_array_equal(grid[1], permute(np.arange(6), 9, mix(2)))


@pytest.mark.parametrize("n", [2, 3, 4, 5, 7, 30])
def test_orders_are_fair(n):
    orders = permute(np.arange(n)[None], n, mix(11, np.arange(40_000)[:, None]))
    items = np.eye(n)[orders]
    # 0.10 beside the noise of 40,000 keys, four deviations.
    noise = 4 * np.sqrt(n / 40_000)
    assert np.abs(items.mean(axis=0) * n - 1).max() < 0.10 + noise
    if n <= 5:
        possible = int(np.prod(np.arange(1, n + 1)))
        assert len(np.unique(orders, axis=0)) == possible
    else:
        assert len(np.unique(orders, axis=0)) > 4000


@settings(max_examples=60, deadline=None)
@given(data=st.data(), n=st.integers(1, 60), key=KEYS)
def test_split_permute_keeps_both_sides(data, n, key):
    split = data.draw(st.integers(0, n))
    order = split_permute(np.arange(n), split, n, key).tolist()
    assert sorted(order[:split]) == list(range(split))
    assert sorted(order[split:]) == list(range(split, n))


@settings(max_examples=100, deadline=None)
@given(data=st.data(), n=st.integers(1, 60), key=KEYS)
def test_arrange_guards_its_ends(data, n, key):
    split = data.draw(st.integers(0, n))
    head = data.draw(st.integers(0, split))
    tail = data.draw(st.integers(0, n - split))
    order = arrange(np.arange(n), n, head, tail, split, key).tolist()
    assert sorted(order) == list(range(n))
    assert all(item < split for item in order[:head])
    assert all(item >= split for item in order[n - tail :])


def test_guarded_places_hold_every_item_they_may():
    keys = mix(5, np.arange(3000)[:, None])
    orders = arrange(np.arange(9)[None], 9, 2, 3, 5, keys)
    assert set(orders[:, 0]) == set(orders[:, 1]) == set(range(5))
    assert set(orders[:, 8]) == set(range(5, 9))
    assert set(orders[:, 4]) == set(range(9))
    # Each place between the guards takes from the low items what the two heads
    # leave of them: 3 of 4.
    assert abs((orders[:, 4] < 5).mean() - 3 / 4) < 0.04


@settings(max_examples=60, deadline=None)
@given(data=st.data(), n=st.integers(1, 25))
def test_deal_counts_along(data, n):
    k = data.draw(st.integers(1, n))
    draws = 4 * n
    dealt = deal(np.arange(draws)[:, None], np.arange(k)[None], n, k)
    round_, place, head, tail = (np.broadcast_to(part, (draws, k)) for part in dealt)
    whose = [draw for draw in range(draws) for _ in range(k)]
    for flat, draw in enumerate(whose):
        at = draw, flat % k
        assert (round_[at], place[at]) == divmod(flat, n)
        start = flat - flat % n
        own = whose[start : start + n]
        if len(own) < n:
            break
        before = whose[start - 1] if start else None
        after = whose[start + n] if start + n < len(whose) else None
        assert head[at] == own.count(before)
        if after is not None:
            assert tail[at] == own.count(after)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), n=st.integers(1, 25), key=KEYS)
def test_cycle_deals_every_item_before_any_comes_again(data, n, key):
    k = data.draw(st.integers(1, n))
    items = cycle(np.arange(3 * n)[:, None], np.arange(k)[None], n, k, key)
    uses = Counter()
    for draw in items.tolist():
        assert len(set(draw)) == k
        uses.update(draw)
        counts = [uses[item] for item in range(n)]
        assert max(counts) - min(counts) <= 1
    flat = items.ravel()
    for start in range(0, len(flat) - n + 1, n):
        assert sorted(flat[start : start + n].tolist()) == list(range(n))


@settings(max_examples=100, deadline=None)
@given(data=st.data(), n=st.integers(1, 25), key=KEYS)
def test_any_window_of_a_stream_holds_distinct_items(data, n, key):
    window = data.draw(st.integers(1, n))
    items = stream(np.arange(4 * n), n, window, key).tolist()
    for start in range(4 * n - window + 1):
        assert len(set(items[start : start + window])) == window
    for start in range(0, 4 * n, n):
        assert sorted(items[start : start + n]) == list(range(n))


def test_cycles_differ_from_one_another():
    items = cycle(np.arange(40)[:, None], np.arange(4)[None], 20, 4, 9).ravel()
    cycles = {tuple(items[start : start + 20]) for start in range(0, 160, 20)}
    assert len(cycles) == 8


def test_the_shuffle_does_not_change():
    """Any change of these changes every batch of every seed."""
    assert mix(1, 2, 3) == 5246500226706903259
    assert mix(-1, 2**100) == 14175014658515544684
    assert permute(np.arange(10), 10, mix(0)).tolist() == [1, 3, 5, 8, 2, 0, 6, 4, 9, 7]
    assert permute(np.arange(3), 10**12, mix(1)).tolist() == [
        892985664505,
        20806465570,
        296958726051,
    ]
    assert cycle(np.arange(5)[:, None], np.arange(3), 7, 3, mix(2)).tolist() == [
        [4, 2, 6],
        [0, 3, 1],
        [5, 3, 0],
        [1, 4, 2],
        [6, 5, 0],
    ]
