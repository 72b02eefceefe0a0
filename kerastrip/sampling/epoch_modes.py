"""Which classes a batch draws: the two epoch modes of `PKPlan`.

A *draw* takes K samples of one class; a batch is P draws of distinct classes of
one group (without `groups=` there is one group). Both schedules answer
`draws(epoch, steps, columns)`: for the batches `steps` (n,) and the places
`columns` (m,) of 0..P-1, the class and the number of that draw among the draws
of the class, both (n, m) int64. Classes are numbered group by group.
"""

from __future__ import annotations

import numpy as np

from kerastrip.sampling import permutation
from kerastrip.sampling.permutation import mix, permute

__all__ = [
    "Balanced",
    "Coverage",
]

# Parts of a coverage table: in one part, classes of one row do not meet.
_PARTS = 3


class Balanced:
    """Every class equally often: the closed form of balanced epochs.

    A group of C classes that has N = L*P slots in an epoch, N = q*C + r, draws
    every class q times (q *rounds*, each a shuffle of all classes), then r of
    them once more. Those r are the classes at places s, ..., s+r-1 (mod C) of
    one keyed order, where s counts the slots of the group before the epoch. So
    counts differ by at most 1 in each epoch and over all of them, and the draws
    of the class at place x before the epoch are the numbers below s that are
    congruent to x modulo C. For C = 5, P = 3 and L = 4 an epoch has N = 12 slots, so
    that q = 2 and r = 2:

        epoch     s     extra places       batch      0       1        2       3
        0         0     0, 1               round    0 0 0   0 0 1    1 1 1   1 2 2
        1        12     2, 3               place    0 1 2   3 4 0    1 2 3   4 0 1
        2        24     4, 0

    Where a batch runs across the seam of two rounds, `arrange` keeps the tail of
    the one and the head of the other apart: an epoch splits the classes in two
    halves, tails are taken from the one and heads from the other. The extra r
    count to the half of the heads, as far as they fit. With fewer than 2 (P - 1)
    classes there is no room for that: there the rounds between two places where
    a round and a batch end together repeat one order, and a batch of P
    neighbours on a circle of C >= P classes is distinct anyway.

    Batches go to groups in proportion to their classes, evenly interleaved.

    Args:
        group_sizes: `(groups,)` classes of each group, all >= P.
        classes_per_batch: P.
        batches: L, batches in an epoch.
        key: 64-bit integer.
    """

    def __init__(
        self, group_sizes: np.ndarray, classes_per_batch: int, batches: int, key: int
    ) -> None:
        self.batches = batches
        self._sizes = group_sizes
        self._first = np.cumsum(group_sizes) - group_sizes
        self._p = classes_per_batch
        self._key = key
        # Which group each of C_total consecutive batches goes to: the i-th turn
        # of a group of C_g stands at (i + 1/2) / C_g of the way.
        group = np.repeat(np.arange(len(group_sizes)), group_sizes)
        turn = np.arange(len(group)) - self._first[group]
        size = group_sizes[group]
        way = (turn + 0.5) / size
        self._turns = group[np.argsort(way, kind="stable")]
        self._places = np.sort(self._turns * len(group) + np.arange(len(group)))
        # The class at each place of the one keyed order of its group.
        self._classes = self._first[group] + permute(turn, size, mix(key, group))

    def _turns_before(self, batch: np.ndarray | int, group: np.ndarray) -> np.ndarray:
        """How many of the batches 0..batch-1 go to `group`."""
        cycles, rest = np.divmod(batch, len(self._turns))
        counted = np.searchsorted(self._places, group * len(self._turns) + rest)
        return cycles * self._sizes[group] + counted - self._first[group]

    def draws(
        self, epoch: int, steps: np.ndarray, columns: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The classes and draw numbers of some batches (module docstring)."""
        start, steps = epoch * self.batches, steps[:, None]
        group = self._turns[(start + steps) % len(self._turns)]
        p, size = self._p, self._sizes[group]
        past = self._turns_before(start, group) * p
        slots = self._turns_before(start + self.batches, group) * p - past
        batch = self._turns_before(start + steps, group) - past // p
        full_rounds, extra = np.divmod(slots, size)
        round_, place, head, tail = permutation.deal(batch, columns, size, p)
        key = mix(self._key, epoch, group)

        roomy = size >= 2 * (p - 1)
        item = np.empty_like(place)
        if roomy.any():
            held = np.where(round_ < full_rounds, size, np.maximum(extra, 1))
            tail = np.where(round_ < full_rounds, tail, 0)
            half = np.minimum((size + 1) // 2, held)
            item = permutation.arrange(place, held, head, tail, half, mix(key, round_))
        if not roomy.all():
            # The last turn of the circle begins with the extra classes.
            turns = p // np.gcd(size, p)
            turn = round_ // turns
            first = np.where(turn == full_rounds // turns, extra, 0)
            circle = permutation.split_permute(place, first, size, mix(key, turn))
            item = np.where(roomy, item, circle)

        # Items below `extra` are the extra ones of this epoch.
        at = (past + item) % size
        draw = (past - at + size - 1) // size + round_
        return self._classes[self._first[group] + at], draw

    def draws_per_class(self, epoch: int) -> np.ndarray:
        """`(classes,)` how often each class is drawn in `epoch`."""
        group = np.repeat(np.arange(len(self._sizes)), self._sizes)
        size, at = self._sizes[group], np.arange(len(group)) - self._first[group]
        before, after = (
            (self._turns_before(batch, group) * self._p - at + size - 1) // size
            for batch in (epoch * self.batches, (epoch + 1) * self.batches)
        )
        counts = np.empty_like(size)
        counts[self._classes] = after - before
        return counts


class Coverage:
    """Every class often enough to see all its samples, in the fewest batches.

    A class of n samples needs D = ceil(n / K) draws. P distinct classes in each
    batch allow no fewer than L = max(ceil(sum D / P), max D) batches. The spare
    slots go to the classes drawn least, level by level.

    The draws of all classes, class after class in an order keyed by the epoch,
    fill a table of P rows and L columns row by row; a column is a batch. No class
    has more than L draws, so a column holds it once (McNaughton, "Scheduling with
    deadlines and loss functions", 1959).

    So that classes mix, every third column goes to one of three parts. Each is
    such a table itself, and is filled anew with its classes in an order of its
    own. Then the draws inside each row are shuffled, row by row. Only the class
    that runs across the end of a row keeps to columns in which the next row does
    not hold it.

    Args:
        group_sizes: `(groups,)` classes of each group, all >= P.
        needed: `(classes,)` draws that each class needs, >= 1.
        classes_per_batch: P.
        key: 64-bit integer.
    """

    def __init__(
        self,
        group_sizes: np.ndarray,
        needed: np.ndarray,
        classes_per_batch: int,
        key: int,
    ) -> None:
        self._p = classes_per_batch
        self._key = key
        ends = np.cumsum(group_sizes)
        self._needed = np.split(needed, ends[:-1])
        self._first = ends - group_sizes
        lengths = [
            max(-(-int(part.sum()) // self._p), int(part.max()))
            for part in self._needed
        ]
        self._levels = [
            _fill_level(part, length * self._p)
            for part, length in zip(self._needed, lengths, strict=True)
        ]
        self._lengths = np.array(lengths, np.int64)
        self._ends = np.cumsum(self._lengths)
        self.batches = int(self._ends[-1])
        self._tables: dict[tuple[int, int], _Table] = {}

    def draws(
        self, epoch: int, steps: np.ndarray, columns: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The classes and draw numbers of some batches (module docstring)."""
        batch = steps
        if len(self._lengths) > 1:
            batch = permute(steps, self.batches, mix(self._key, epoch, 0))
        group = np.searchsorted(self._ends, batch, "right")
        batch = batch - (self._ends - self._lengths)[group]
        class_ = np.empty((len(steps), len(columns)), np.int64)
        draw = np.empty_like(class_)
        for g in np.unique(group):
            rows = group == g
            table = self._table(epoch, int(g))
            class_[rows], draw[rows] = table.draws(batch[rows], columns)
            class_[rows] += self._first[g]
        return class_, draw

    def _table(self, epoch: int, group: int) -> _Table:
        """The table of a group in an epoch; those of the last epoch are kept."""
        tables = self._tables
        table = tables.get((epoch, group))
        if table is None:
            needed, spare_level = self._needed[group], self._levels[group]
            table = _Table(
                needed,
                spare_level,
                self._p,
                int(self._lengths[group]),
                mix(self._key, epoch, 1, group),
            )
            # A new dict instead of a lock: another thread at most makes the same
            # table once more.
            kept = {at: other for at, other in tables.items() if at[0] == epoch}
            self._tables = {**kept, (epoch, group): table}
        return table

    def draws_per_class(self, epoch: int) -> np.ndarray:
        """`(classes,)` how often each class is drawn in `epoch`."""
        groups = range(len(self._needed))
        return np.concatenate([self._table(epoch, g).counts for g in groups])


class _Table:
    """The P x L table of one group in one epoch (see `Coverage`)."""

    def __init__(
        self, needed: np.ndarray, level: int, p: int, length: int, key: int
    ) -> None:
        self._length, self._key = length, key
        classes = len(needed)
        order = permute(np.arange(classes), classes, mix(key, 0))
        draws = np.maximum(needed[order], level)
        at_level = draws == level
        at_level &= np.cumsum(at_level) <= length * p - draws.sum()
        draws += at_level
        ends = np.concatenate(([0], np.cumsum(draws)))
        # Part s has the columns s, s + parts, s + 2 parts, ... of the table, and so
        # an even share of every class.
        rounds, rest = np.divmod(ends, length)
        parts = min(_PARTS, length)
        self._parts: list[_Part] = []
        self.counts = np.zeros(classes, np.int64)
        for part in range(parts):
            columns = (length - part + parts - 1) // parts
            share = np.empty_like(self.counts)
            share[order] = np.diff(
                rounds * columns + (rest - part + parts - 1) // parts
            )
            self._parts.append(_Part(share, self.counts, p, columns, mix(key, 1, part)))
            self.counts = self.counts + share

    def draws(
        self, batches: np.ndarray, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The classes and draw numbers of the cells in some columns and rows."""
        column = permute(batches, self._length, mix(self._key, 2))
        column, part = np.divmod(column, len(self._parts))
        class_ = np.empty((len(batches), len(rows)), np.int64)
        draw = np.empty_like(class_)
        for number in np.unique(part):
            at = part == number
            class_[at], draw[at] = self._parts[number].draws(column[at], rows)
        return class_, draw


class _Part:
    """Some columns of a table, filled row by row (see `Coverage`).

    For three rows, seven columns and classes a, b, c, d, e of 4, 5, 4, 5 and 3 draws:

        filled row by row       tail, head     in the order of some key
        a a a a b b b           b 3            b b b a a a a
        b b c c c c d           d 1, b 2       c c c b b d c
        d d d d e e e           d 4            e d d d d e e

    Class b runs across the end of the first row: its tail has 3 draws there and its head
    2 in the second row. In the shuffled rows it keeps to columns 0 ... 2 and 3 ... 4, so
    that no column holds it twice. Likewise d. All other draws of a row (inner ones) are
    shuffled freely over the columns that are left.

    Args:
        counts: `(classes,)` draws of each class in this part, at most `columns`.
        before: `(classes,)` draws of each class in the parts before.
        p: rows; the counts fill all of the cells.
        columns: number of columns.
        key: 64-bit integer.
    """

    def __init__(
        self, counts: np.ndarray, before: np.ndarray, p: int, columns: int, key: int
    ) -> None:
        self._columns, self._key = columns, key
        self._classes = permute(np.arange(len(counts)), len(counts), mix(key, 0))
        self._ends = np.concatenate(([0], np.cumsum(counts[self._classes])))
        self._before = before
        # Tails and heads are intervals on the circle of columns. The head of a row
        # begins at `_head_at`; `_tail_at` columns after it the tail of that row
        # begins, and after the tail the head of the next row. Between them lie random
        # gaps: were they side by side, classes across neighbouring ends would hardly
        # meet.
        border = np.arange(1, p) * columns
        at = np.searchsorted(self._ends, border, "right") - 1
        self._tail = tail = np.append(border - self._ends[at], 0)
        self._head = head = np.append(
            0, np.where(tail[:-1], self._ends[at + 1] - border, 0)
        )
        row = np.arange(p)
        room = columns - head - tail, columns - tail - np.append(head[1:], 0)
        gap, next_gap = (
            (mix(key, number, row) % (free + 1).view(np.uint64)).view(np.int64)
            for number, free in enumerate(room, 1)
        )
        self._tail_at = head + gap
        ahead = self._tail_at + tail + next_gap
        self._head_at = np.cumsum(ahead) - ahead

    def draws(
        self, column: np.ndarray, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The classes and draw numbers of the cells in some columns and rows."""
        columns, head, tail = self._columns, self._head[rows], self._tail[rows]
        # Round the circle from the head: head, inner, tail, inner ("behind").
        at = (column[:, None] - self._head_at[rows]) % columns
        tail_at = self._tail_at[rows]
        behind = at >= tail_at + tail
        in_tail = ~behind & (at >= tail_at) & (tail > 0)
        inner = (at >= head) & ~in_tail
        shuffled = permute(
            np.where(inner, at - head - np.where(behind, tail, 0), 0),
            np.maximum(columns - head - tail, 1),
            mix(self._key, 3, rows),
        )
        cell = np.where(in_tail, columns - tail + at - tail_at, at)
        cell = rows * columns + np.where(inner, head + shuffled, cell)
        place = np.searchsorted(self._ends, cell, "right") - 1
        class_ = self._classes[place]
        return class_, self._before[class_] + cell - self._ends[place]


def _fill_level(needed: np.ndarray, slots: int) -> int:
    """The largest level w with sum(max(needed, w)) <= slots."""
    ordered = np.sort(needed)
    # Raising the i smallest to w costs i * w instead of their sum.
    above = needed.sum() - np.cumsum(ordered)
    counts = np.arange(1, len(ordered) + 1)
    level = (slots - above) // counts
    # The first i for which the next class is not below the level it would get.
    following = np.append(ordered[1:], np.iinfo(np.int64).max)
    return int(level[np.argmax(level < following)])
