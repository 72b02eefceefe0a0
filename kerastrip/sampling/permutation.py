"""Keyed permutations: shuffles that are looked up, not stored.

Everything here is integer arithmetic on NumPy arrays, element by element, so an
answer depends on its key alone: not on the order of calls, on the other
elements asked for, or on the version of NumPy.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = [
    "arrange",
    "cycle",
    "deal",
    "mix",
    "numbered_cycle",
    "permute",
    "split_permute",
    "stream",
]

_MASK = (1 << 64) - 1
# Odd 64-bit constants: the golden ratio (Weyl sequence) and the two multipliers
# of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number
# generators", 2014).
_WEYL = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
# Six rounds: all orders of a few items occur, and each item stands in each place
# equally often within 10 %; the 120 orders of five items differ by 30 % (rms; with
# four rounds by 60 %), which a sampler does not feel.
_ROUND_KEYS = np.arange(1, 7, dtype=np.uint64) * np.uint64(_WEYL)


def mix(*parts: Any) -> Any:
    """The 64-bit hash of a tuple of integers, element by element.

    Parts are taken one after the other, never added, so (1, 0) and (0, 1) have
    nothing in common. Python integers of any size give a Python integer; with
    an array among the parts the result is an array, broadcast over all.
    """
    state: Any = _WEYL
    for part in parts:
        if isinstance(part, np.ndarray):
            part = np.atleast_1d(part).astype(np.uint64, copy=False)
        else:
            part = int(part)
            while not -(1 << 63) <= part < 1 << 64:
                state = _scramble(state ^ (part & _MASK) ^ _WEYL)
                part >>= 64
            part &= _MASK
        state = _scramble(state ^ part)
    return state


def _scramble(x: Any) -> Any:
    """SplitMix64: a bijection of 64-bit integers whose output bits look random."""
    # The same arithmetic twice: arrays wrap round at 64 bits, Python integers do not.
    if not isinstance(x, np.ndarray):
        x = (x + _WEYL) & _MASK
        x = ((x ^ (x >> 30)) * _MIX_1) & _MASK
        x = ((x ^ (x >> 27)) * _MIX_2) & _MASK
        return x ^ (x >> 31)
    x = x + _WEYL
    x ^= x >> 30
    x *= _MIX_1
    x ^= x >> 27
    x *= _MIX_2
    x ^= x >> 31
    return x


def permute(x: np.ndarray, n: Any, key: Any) -> np.ndarray:
    """The place of `x` in the permutation of 0..n-1 that belongs to `key`.

    A Feistel network on a grid of a x b >= n cells (a = ceil(sqrt(n))) with
    additions modulo a and b. The grid has fewer than a cells too many. An index that
    lands on one of them is permuted again, until it is below n (cycle walking: Black
    and Rogaway, "Ciphers with arbitrary finite domains", 2002). Memory and time do not
    depend on n.

    Args:
        x: int64, 0 <= x < n.
        n: how many there are, 1 <= n < 2**52; broadcast with x.
        key: 64-bit integer(s) from `mix`; broadcast with x.

    Returns:
        int64, of the broadcast shape: a bijection of 0..n-1 for each key.
    """
    n = np.atleast_1d(np.asarray(n, np.int64))
    rows = np.ceil(np.sqrt(n)).astype(np.int64)
    columns = -(-n // rows)
    rows, columns = rows.view(np.uint64), columns.view(np.uint64)
    key = np.atleast_1d(np.asarray(key, np.uint64))
    x = np.asarray(x, np.int64).view(np.uint64)
    out = _feistel(x, rows, columns, key).view(np.int64)
    outside = np.nonzero(out >= n)
    if outside[0].size:
        # Cycle walking: an index outside of 0..n-1 is still a cell of the grid, so it is
        # permuted again.
        n, key = np.broadcast_to(n, out.shape), np.broadcast_to(key, out.shape)
        out[outside] = permute(out[outside], n[outside], key[outside])
    return out


def _feistel(
    x: np.ndarray, rows: np.ndarray, columns: np.ndarray, key: np.ndarray
) -> np.ndarray:
    """One pass through the network: x is the cell (i, j) of a grid of rows x columns.

    Even rounds shift i by a hash of j, modulo `rows`; odd rounds shift j by a hash of i,
    modulo `columns`. Each round can be undone, so the whole is a permutation.
    """
    i = x // columns
    j = x - i * columns
    keys = np.add.outer(_ROUND_KEYS, key)
    for number, round_key in enumerate(keys):
        source, target, size = (i, j, columns) if number % 2 else (j, i, rows)
        step = source * _MIX_1 + round_key
        step ^= step >> 32
        step *= _MIX_2
        # The upper half of `step`, as a fraction of 2**32, times `size` and rounded
        # down, is a number below `size` (a multiplication instead of a division).
        step >>= 32
        step *= size
        step >>= 32
        step += target
        # Modulo `size`, without a division: if `step` is below `size`, the unsigned
        # difference wraps round to a huge number, and the minimum is `step` itself.
        np.minimum(step, step - size, out=step)
        if number % 2:
            j = step
        else:
            i = step
    return i * columns + j


def split_permute(x: np.ndarray, split: Any, n: Any, key: Any) -> np.ndarray:
    """A keyed permutation of 0..n-1 that keeps 0..split-1 among themselves."""
    split, n = np.asarray(split, np.int64), np.asarray(n, np.int64)
    low = x < split
    first = np.where(low, 0, split)
    size = np.where(low, split, n - split)
    return first + permute(x - first, size, mix(np.asarray(key, np.uint64), low))


def arrange(
    place: np.ndarray, n: Any, head: Any, tail: Any, split: Any, key: Any
) -> np.ndarray:
    """The item at `place` of a keyed order of 0..n-1 with guarded ends.

    The first `head` places hold items below `split`, and the last `tail` places hold
    items from `split` on. So where one order follows another, the tail of the first and
    the head of the second have no item in common.

    Two shuffles do it. For n = 7, head = 2, tail = 2 and split = 4:

        place   0 1 2 3 4 5 6
        slot    0 1 4 2 3 5 6     places 2 ... 4, between head and tail, are shuffled
        item    3 1 5 0 2 6 4     slots 0 ... 3 are shuffled, and slots 4 ... 6

    Args:
        place: int64, 0 <= place < n.
        n: number of items; broadcast with place, as are the following.
        head: guarded places at the start, 0 <= head <= split.
        tail: guarded places at the end, 0 <= tail <= n - split.
        split: heads hold items below `split`, tails hold the other items.
        key: 64-bit integer(s) from `mix`.

    Returns:
        int64 items, of the broadcast shape.
    """
    key = np.asarray(key, np.uint64)
    inner = (place >= head) & (place < n - tail)
    shuffled = permute(
        np.where(inner, place - head, 0),
        np.where(inner, n - head - tail, 1),
        key,
    )
    slot = np.where(inner, head + shuffled, place)
    guarded = np.broadcast_to(np.add(head, tail) > 0, slot.shape)
    if guarded.any():
        split, n, key = (
            np.broadcast_to(part, slot.shape)[guarded] for part in (split, n, key)
        )
        slot[guarded] = split_permute(slot[guarded], split, n, key)
    return slot


def deal(
    draw: np.ndarray, row: np.ndarray, n: Any, k: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Which round and place each row of a draw comes from.

    Cards are dealt in the same way: round after round of n cards lies in a row, and draw
    d takes the k cards d*k ... d*k + k - 1. A draw that runs across the seam of two
    rounds takes the last places of the first round (its *tail*) and the first places of
    the second (its *head*). For n = 7 and k = 3, seven draws take three rounds:

        draw    0 0 0 1 1 1 2 | 2 2 3 3 3 4 4 | 4 5 5 5 6 6 6
        round   0 0 0 0 0 0 0 | 1 1 1 1 1 1 1 | 2 2 2 2 2 2 2
        place   0 1 2 3 4 5 6 | 0 1 2 3 4 5 6 | 0 1 2 3 4 5 6
                            t   h h       t t   h

    Round 0 has a tail of 1 place, round 1 a head of 2 and a tail of 2, round 2 a head
    of 1.

    Args:
        draw: int64, >= 0.
        row: int64 in 0..k-1; broadcast with draw, as are the following.
        n: places of a round, >= k.
        k: rows of a draw, >= 1.

    Returns:
        (round, place in the round, head of the round, tail of the round). The first
        `head` places of a round belong to a draw that begins in the round before, and
        its last `tail` places to a draw that ends in the round after. int64, of the
        broadcast shape.
    """
    # `draw` has one entry for all rows of a draw, so `start` and `first` are computed
    # once for each draw. The sums with `row` broadcast over the rows.
    start = draw * k
    first = start // n
    place = start - first * n + row
    over = place >= n
    # A seam in front of round r stands r * n places from the start. The draw across it
    # has r * n % k of its rows before the seam: these are the tail of round r - 1. Its
    # -r * n % k other rows are the head of round r.
    before = [(first + later) * n % k for later in range(3)]
    return (
        first + over,
        np.where(over, place - n, place),
        np.where(over, -before[1] % k, -before[0] % k),
        np.where(over, before[2], before[1]),
    )


def cycle(draw: np.ndarray, row: np.ndarray, n: Any, k: Any, key: Any) -> np.ndarray:
    """The item in a row of a draw of k from shuffled cycles of 0..n-1.

    The rows of a draw are distinct, also where the draw runs across the seam of two
    cycles, and each cycle holds every item once. Every cycle has a shuffle of its own.
    The exception are fewer than 2 (k - 1) items, where a seam cannot be guarded: there
    k / gcd(n, k) cycles in a row have the same order. (After so many cycles a cycle and
    a draw end together.)

    For n = 7, k = 3 and the key `mix(2)`, with cycles and draws as for `deal`:

        4 2 6 0 3 1 5 | 3 0 1 4 2 6 5 | 0 2 6 4 3 1 5

    Draw 2 is 5 | 3 0 and draw 4 is 6 5 | 0. Tails hold items of 4 ... 6 only, and heads
    hold items of 0 ... 3 only, so that the two never share an item.

    Args:
        draw: int64, >= 0.
        row: int64 in 0..k-1; broadcast with draw, as are the following.
        n: number of items, >= 1.
        k: rows of a draw, 1 <= k <= n.
        key: 64-bit integer(s) from `mix`.

    Returns:
        int64 items, of the broadcast shape.
    """
    return numbered_cycle(draw, row, n, k, key)[1]


def numbered_cycle(
    draw: np.ndarray, row: np.ndarray, n: Any, k: Any, key: Any
) -> tuple[np.ndarray, np.ndarray]:
    """The number of the cycle that a row of a draw is in, and the item of `cycle`."""
    number, place, head, tail = deal(draw, row, n, k)
    roomy = n >= 2 * (k - 1)
    order = np.where(roomy, number, number // (k // np.gcd(n, k)))
    guard = np.where(roomy, head, 0), np.where(roomy, tail, 0)
    key = mix(np.asarray(key, np.uint64), order)
    return number, arrange(place, n, *guard, (n + 1) // 2, key)


def stream(place: np.ndarray, n: Any, window: Any, key: Any) -> np.ndarray:
    """The item at a place of an endless stream of shuffled cycles of 0..n-1.

    Each n places hold every item once, and any `window` places in a row hold distinct
    items. So a draw may take any number of items up to `window`, another number than
    the draw before. `cycle`, whose draws all take k, guards only the seams that a draw
    runs across; here the last `window` - 1 places of every cycle hold items of one half,
    and the first places of the next cycle hold items of the other half. Fewer than
    2 (`window` - 1) items come in the same order in all cycles.

    Args:
        place: int64, >= 0.
        n: number of items, >= 1; broadcast with place, as are the following.
        window: 1 <= window <= n.
        key: 64-bit integer(s) from `mix`.

    Returns:
        int64 items, of the broadcast shape.
    """
    number, place = np.divmod(place, n)
    roomy = n >= 2 * (window - 1)
    guard = np.where(roomy, window - 1, 0)
    key = mix(np.asarray(key, np.uint64), np.where(roomy, number, 0))
    return arrange(place, n, guard, guard, (n + 1) // 2, key)
